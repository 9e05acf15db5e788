"""The Experiment: all settings that decide the numbers, and its signature.

An Experiment composes the settings that each part of the package declares, and is a list of models to train and suites
to measure. Importing this module costs neither torch nor ray, so a typing mistake is reported at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from dwf_cluster.attacks.settings import Fgsm, Pgd
from dwf_cluster.data.registry import DATASETS, Data
from dwf_cluster.defences.names import DefenceName
from dwf_cluster.defences.recipes import weights
from dwf_cluster.defences.registry import METHODS, WEIGHTS, ModelSpec, recipe, recipe_names
from dwf_cluster.defences.settings import AdvMoe, AdvTraining, Experts, Free, Gate, Given, Joint, NFgsm, Soe, Trades
from dwf_cluster.evaluation.registry import AUTOATTACK, ROUTE, SUITES, Column, all_columns, suite_names
from dwf_cluster.evaluation.settings import Evaluation, Threat, threats
from dwf_cluster.models.registry import Model, fail_if_not_buildable
from dwf_cluster.settings import InvalidInput, Name, OneOf, Settings, as_tuple, first_error
from dwf_cluster.store import RowLabels, Store

ADDED_LATER = frozenset(
    {
        "defence",
        "given",
        "model.backbone",
        "gate.kind",
        "joint.freeze_experts",
        "joint.parallelism",
        "data.validation_examples",
        "experts.keep",
        "joint.keep",
        "evaluation.corruptions",
        "evaluation.corruption_severities",
        "fgsm.draw",
        "pgd.step_sizes",
        "pgd.random_start",
        "experts.attack_batchnorm",
        "joint.attack_batchnorm",
        "experts.precision",
        "joint.precision",
        "evaluation.norm",
        "evaluation.epsilon",
        "evaluation.step_size",
        "evaluation.random_start",
        "evaluation.l1_epsilon",
        "evaluation.l1_step_size",
        "evaluation.autoattack_examples",
        "evaluation.targets",
        "evaluation.curve_examples",
        "evaluation.curve_multiples",
        "evaluation.curve_steps",
        "evaluation.curve_restarts",
        "soe",
        "advmoe",
        "adversarial_training",
        "trades",
        "free",
        "n_fgsm",
    }
)
"""Fields, and whole sections, that were added after results were published: at their defaults they are no part of the
signature."""

PAPER_WIDTH = 64
"""Width of the paper's networks."""


class Experiment(Settings):
    """Everything that decides the numbers, and nothing else: neither where it runs nor where results are stored."""

    preset: Name = "cifar10"
    """Name of the preset that it is based on; part of the folder's name."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random draw."""
    checkpoint_minutes: Annotated[float, Field(gt=0, le=1_000_000)] = 10.0
    """Minutes between checkpoints within an epoch that takes longer. Changes no number, and no signature."""
    save_adversarial: Literal["float", "uint8"] | None = None
    """Keep the adversarial images of every evaluation, in one `.npz` file a shard: as they are, or rounded to uint8
    within the ball. Changes no number, and no signature."""
    defence: DefenceName = "dwf"
    """The defence (or method) that the experiment is about; its last model is the defended one."""
    baselines: Annotated[tuple[Annotated[str, OneOf(recipe_names)], ...], BeforeValidator(as_tuple)] = ()
    """Defences and methods beside it, such as `fgsm-at` and `pgd-at`: ResNet-18 with half of each batch adversarial
    (`adversarial_training.fraction`) at a fixed strength (PGD with 10 iterations). Our assumption: FGSM at
    `pgd.epsilon`. `pgd-at-matched` is `pgd-at` with the compute of the whole defence; `controls` are the mixture's
    experts, alone and with equal weights; `pgd-ensemble` is the mean of as many PGD-AT networks; `resnet18-wide` has
    three times the width; `advmoe-wide` is `advmoe` with `advmoe.ratio=1`."""
    given: Annotated[tuple[Given, ...], BeforeValidator(as_tuple)] = ()
    """Networks beside it whose weights the user has, as a JSON list: `[{"name": "r18", "file": "resnet18.pth",
    "accuracy": 93.02}]`. They are tested, stored and attacked, and not trained. The fields of an entry:"""
    data: Data = Data()
    model: Model = Model()
    gate: Gate = Gate()
    fgsm: Fgsm = Fgsm()
    pgd: Pgd = Pgd()
    experts: Experts = Experts()
    joint: Joint = Joint()
    soe: Soe = Soe()
    advmoe: AdvMoe = AdvMoe()
    adversarial_training: AdvTraining = AdvTraining()
    trades: Trades = Trades()
    free: Free = Free()
    n_fgsm: NFgsm = NFgsm()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _models_have_names_of_their_own(self) -> Experiment:
        names = self.names
        if repeated := next((name for name in names if names.count(name) > 1), None):
            sources = "defence, baselines and given" if self.given else "defence and baselines"
            raise ValueError(f"{sources} give two models the name {repeated!r}: allowed is one")
        return self

    @model_validator(mode="after")
    def _models_have_their_parents(self) -> Experiment:
        for spec in self.models:
            if missing := next((parent for parent in spec.parents if parent not in self.names), None):
                raise ValueError(
                    f"{spec.name} is built from {missing}, which the experiment does not train: allowed is to add dwf"
                )
        if METHODS[self.defended.method].losses is None:
            raise ValueError(f"defence {self.defence!r} trains no model: allowed is to add it to the baselines")
        return self

    @model_validator(mode="after")
    def _best_needs_validation(self) -> Experiment:
        for name, training in (("experts", self.experts), ("joint", self.joint)):
            if training.keep == "best" and self.data.validation_examples is None:
                raise ValueError(
                    f"{name}.keep: 'best' cannot be used: it needs data.validation_examples; allowed is last"
                )
        return self

    @model_validator(mode="after")
    def _corruption_files_are_of_cifar10(self) -> Experiment:
        if self.evaluation.corruptions == "files" and self.data.source != "cifar10":
            raise ValueError(
                "evaluation.corruptions: 'files' cannot be used: they are of cifar10; allowed is generated"
            )
        return self

    @model_validator(mode="after")
    def _networks_can_be_built(self) -> Experiment:
        # The size of the images of an .npz file is not known before it is read: `plan.jobs` looks at it.
        dataset, padding = DATASETS.get(self.data.source), 2 * self.data.padding
        self.fail_if_not_buildable(min(dataset.shape[1:]) + padding if dataset else None)
        return self

    def fail_if_not_buildable(self, side: int | None) -> None:
        """Check every network's width and, if it is known, the smaller side of the padded images.

        Raises:
            InvalidInput: for the first network that has no such width, or needs larger images, or a method that cannot
                use it.
        """
        for spec in self.models:
            if (known := METHODS[spec.method].backbones) and spec.backbone not in known:
                verb = "is" if len(known) == 1 else "are"
                allowed = f"cannot be used with {spec.method}: allowed {verb} {', '.join(known)}"
                raise InvalidInput(f"model.backbone: {spec.backbone!r} {allowed}")
            field = "given.width" if spec.method == WEIGHTS else "model.width"
            for name in spec.backbones:
                fail_if_not_buildable(name, spec.width, side, field)

    @property
    def corruption_files(self) -> tuple[int, ...]:
        """Severities of the corrupted images that are read from files."""
        is_used = self.evaluation.corruptions == "files" and "corruptions" in self.evaluation.beyond
        return self.evaluation.corruption_severities if is_used else ()

    @property
    def models(self) -> tuple[ModelSpec, ...]:
        """Every model: those that the defended one starts from, the baselines, those with given weights, the defended
        model."""
        *parents, defended = recipe(self.defence, self)
        baselines = (spec for name in self.baselines for spec in recipe(name, self))
        return (*parents, *baselines, *map(weights, self.given), defended)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of `models`."""
        return tuple(spec.name for spec in self.models)

    @property
    def defended(self) -> ModelSpec:
        """The model that the experiment is about."""
        return self.models[-1]

    def spec(self, name: str) -> ModelSpec:
        """The model of that name."""
        return next(spec for spec in self.models if spec.name == name)

    @property
    def threats(self) -> tuple[Threat, ...]:
        """The threat models of the evaluation, the primary one first."""
        return threats(self.evaluation, Threat(self.pgd.epsilon, self.pgd.step_size))

    @property
    def threat(self) -> Threat:
        """The primary threat model: of the probe and the checks."""
        return self.threats[0]

    def suites(self, *specs: ModelSpec) -> tuple[str, ...]:
        """Names of the suites that a model, or any of several, is measured by."""
        has_gate = any(METHODS[spec.method].has_gate for spec in specs)
        selects = any(METHODS[spec.method].selects(spec) for spec in specs)
        default = (*((ROUTE,) if selects else ()), *((AUTOATTACK,) if self._has_autoattack else ()))
        return suite_names(
            self.evaluation, has_gate, (name for name in default if self.evaluation.norm in SUITES[name].norms)
        )

    @property
    def _has_autoattack(self) -> bool:
        """Whether models are measured by AutoAttack, even if `evaluation.beyond` does not name it."""
        if self.evaluation.autoattack_examples:
            return True
        # How many classes an .npz file has is not known before it is read.
        classes = DATASETS[self.data.source].classes if self.data.source in DATASETS else 0
        return self.model.width >= PAPER_WIDTH and classes >= SUITES[AUTOATTACK].classes

    @property
    def columns(self) -> list[Column]:
        """Every column that the defended model is measured in, in the order of the result table."""
        return all_columns(self.evaluation, self.threats, self.suites(self.defended))

    @property
    def selecting(self) -> tuple[str, ...]:
        """Names of the models that give each image to one expert."""
        return tuple(spec.name for spec in self.models if METHODS[spec.method].selects(spec))

    @property
    def selection_notes(self) -> tuple[str, ...]:
        """A sentence on the columns of these models, if there are any."""
        if not self.selecting:
            return ()
        return (
            f"{', '.join(self.selecting)}: gives each image to one expert. Attacks that follow the gradient of the "
            "whole model (fgsm, PGD, gate, APGD, autoattack) follow a straight-through gradient there, which is not "
            "the model's, or that of the chosen expert alone: their accuracies are upper bounds. route and expert aim "
            "at each expert.",
        )

    @property
    def column_notes(self) -> tuple[str, ...]:
        """Sentences that every table of accuracies needs below it."""
        notes = list(self.selection_notes)
        examples = SUITES[AUTOATTACK].examples(self.evaluation)
        if examples and self.data.test_examples:
            examples = min(examples, self.data.test_examples)
        if examples and AUTOATTACK in self.suites(self.defended):
            notes.append(
                f"autoattack: the first {examples:,} test images. worst_case takes, for each image, all attacks that "
                "were run on it."
            )
        return tuple(notes)

    @property
    def signature(self) -> str:
        """Ten hexadecimal digits of the SHA-256 of the canonical JSON.

        An `.npz` source and a file of given weights count with their content, not with their path; the accuracy that
        these weights are expected to have, `checkpoint_minutes` and `save_adversarial` do not count.
        """
        fields = self._deciding_fields()
        for name in ADDED_LATER:
            *parents, leaf = name.split(".")
            settings: Any = type(self)
            values = fields
            for parent in parents:
                settings, values = settings.model_fields[parent].annotation, values[parent]
            default = settings.model_fields[leaf].default
            if isinstance(default, Settings):
                default = default.model_dump(mode="json")
            if values[leaf] == (list(default) if isinstance(default, tuple) else default):  # as in JSON
                del values[leaf]
        return _digest(fields)[:10]

    def model_signature(self, name: str) -> str:
        """SHA-256 of what decides one model without parents and its rows of `metrics`, in hexadecimal digits.

        Experiments for which it is the same train the same model, to the last bit on the same hardware.
        """
        fields, evaluation = self._deciding_fields(), self.evaluation
        return _digest(
            {
                "seed": fields["seed"],
                "data": fields["data"],
                "model": {**asdict(self.spec(name)), "training": self.spec(name).training.model_dump(mode="json")},
                "probe": (
                    asdict(self.threat),
                    evaluation.probe_examples,
                    evaluation.probe_steps,
                    evaluation.random_start,
                ),
            }
        )

    def _deciding_fields(self) -> dict[str, Any]:
        fields = self.model_dump(mode="json", exclude={"checkpoint_minutes", "save_adversarial"})
        if self.data.sha256:
            fields["data"]["source"] = "npz"
        for entry in fields["given"]:
            del entry["accuracy"]
            if entry["sha256"]:
                del entry["file"]
        return fields

    @property
    def folder(self) -> str:
        """Name of the experiment's folder below the storage URL."""
        return f"{self.preset}-seed{self.seed}-{self.signature}"

    @property
    def labels(self) -> RowLabels:
        """The columns of every table that say which experiment a row belongs to."""
        dataset = self.data.source.replace("\\", "/").rsplit("/", 1)[-1]
        return RowLabels(self.signature, self.preset, dataset, self.seed)

    def store(self, storage: str) -> Store:
        """Its folder below a storage URL."""
        return Store(storage, self.folder, labels=self.labels)

    def to_json(self) -> str:
        """Readable JSON; `from_json` gives an equal Experiment back."""
        return self.model_dump_json(indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Experiment:
        """Read and validate an experiment.

        Raises:
            InvalidInput: at the first field that is unknown, of the wrong type or out of range.
        """
        try:
            return Experiment.model_validate_json(text)
        except ValidationError as error:
            raise InvalidInput(first_error(error)) from None


def _digest(fields: Mapping[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
