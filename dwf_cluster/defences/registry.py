"""Models, methods and defences by name, and their settings.

A *model* is a row of the result table; its ModelSpec says how it is built. A *method* is how a model is trained: two
functions in a file of this folder. A *defence* is a paper's recipe: from settings to ModelSpecs, the last of which is
the defended model. To add a method or a defence: a file beside this one, and an entry in `METHODS` or `DEFENCES`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, model_validator

from dwf_cluster.attacks.settings import Fgsm, Pgd
from dwf_cluster.models.registry import Model
from dwf_cluster.settings import Count, CountOrNone, Decay, Rate, Settings

# ------------------------------------------------------------------------------------------------ settings


class Gate(Settings):
    """The multilayer perceptron that weighs the experts, equation (2)."""

    hidden: Annotated[int, Field(ge=1, le=65_536)] = 128
    """Units of its hidden layer. Our assumption: 128; the paper calls the gate small."""
    learning_rate: Rate = 0.01
    """Peak learning rate of its parameters. Our assumption: 0.01, in the joint stage only; the paper lists
    hyper-parameters of the gate's own, epochs among them, and does not say when they are used."""
    weight_decay: Decay = 5e-4
    """Weight decay of its parameters. Our assumption: 5e-4."""
    kind: Literal["soft", "hard"] = "soft"
    """`hard` gives each image to the one expert of the largest weight; gradients, those of attacks too, pass through
    the soft weights (straight-through estimator). That gradient is not the model's, so accuracies under attacks that
    follow it are upper bounds; `pgd_route`, which does not, measures every hard gate. The paper's is soft."""


class Training(Settings):
    """SGD with momentum and weight decay, cosine annealing over all its steps, cross-entropy."""

    epochs: Count = 200
    """Passes over the training images. Our assumption: 200 for the experts, 50 for the joint stage."""
    learning_rate: Rate = 0.1
    """Peak learning rate. Our assumption: 0.1 for the experts, 0.01 for the joint stage."""
    batch_size: Count = 128
    """Images of one step, over all workers; the joint stage trains on three versions of each.
    Our assumption: 128."""
    weight_decay: Decay = 5e-4
    """Weight decay. Our assumption: 5e-4."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum. Our assumption: 0.9."""
    accumulation: Count = 1
    """Cut each batch into n parts whose gradients are added up before the step: less memory, the same
    gradient, but BatchNorm then normalises with the statistics of a part."""
    keep: Literal["last", "best"] = "last"
    """Weights that are kept: of the last epoch, or of the one with the highest robust accuracy of the probe on the
    validation images (of equal ones the first), as Rice et al. (2020) do against robust overfitting; `best` needs
    `data.validation_examples`. Our assumption: the paper keeps the last."""
    attack_batchnorm: Literal["eval", "train"] = "eval"
    """How BatchNorm normalises while the model is attacked in training: `eval` with its running statistics, `train`
    with those of the images under attack, as in a training step; the attack changes no statistics. Our assumption:
    `eval`, the mode in which the model is evaluated."""

    @property
    def of_a_model(self) -> Training:
        """These values without the fields of a subclass."""
        return Training(**{name: getattr(self, name) for name in Training.model_fields})


class Experts(Training):
    """How many experts of each kind, and how each is trained (algorithms 1 and 2)."""

    benign: CountOrNone = 1
    """Experts trained on clean images."""
    fgsm: CountOrNone = 4
    """Experts trained on FGSM examples of a random epsilon."""
    pgd: CountOrNone = 4
    """Experts trained on PGD examples of a random number of iterations."""

    @model_validator(mode="after")
    def _at_least_one(self) -> Experts:
        if self.benign + self.fgsm + self.pgd == 0:
            raise ValueError("a mixture needs at least one expert (benign, fgsm or pgd)")
        return self


class Joint(Training):
    """How experts and gate are trained together, end to end (algorithm 3)."""

    epochs: Count = 50
    """Passes over the training images. Our assumption: 50."""
    learning_rate: Rate = 0.01
    """Peak learning rate of the experts. Our assumption: 0.01."""
    freeze_experts: bool = False
    """Train the gate alone: the experts stay as they were pre-trained. The paper freezes nothing."""


class DefenceSettings(Protocol):
    """The settings that a defence's recipe may read; an Experiment has them."""

    @property
    def model(self) -> Model: ...
    @property
    def gate(self) -> Gate: ...
    @property
    def fgsm(self) -> Fgsm: ...
    @property
    def pgd(self) -> Pgd: ...
    @property
    def experts(self) -> Experts: ...
    @property
    def joint(self) -> Joint: ...


# ------------------------------------------------------------------------------------- models and methods


@dataclass(frozen=True)
class ModelSpec:
    """One model, and how it is built and trained.

    Attributes:
        name: as in every table: `benign`, `fgsm-2`, `mixture`.
        backbone, width: its network, a key of `models.registry.BACKBONES`, and the network's width.
        method: how it is trained, a key of `METHODS`.
        training: epochs, learning rate, batch size and so on.
        options: what the method takes, such as epsilons and steps, as pairs of name and value.
        parents: names of the models whose trained weights it starts from.
        own_rates: submodules with a learning rate of their own: name, peak learning rate, weight decay.
    """

    name: str
    backbone: str
    width: int
    method: str
    training: Training
    options: tuple[tuple[str, Any], ...] = ()
    parents: tuple[str, ...] = ()
    own_rates: tuple[tuple[str, float, float], ...] = ()

    def option(self, name: str, default: Any = None) -> Any:
        """The value of an option; `default` if the spec does not give it."""
        return dict(self.options).get(name, default)

    @property
    def networks(self) -> int:
        """How many backbones it consists of."""
        return max(1, len(self.parents))


@dataclass(frozen=True)
class Method:
    """How a model is trained.

    Attributes:
        build: `module:function` of `(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module])`; returns
            the model before its training. `parents` are in the order of `spec.parents`. Random numbers of torch are
            seeded from the experiment's seed and the model's name.
        losses: `module:function` of `(spec, model, frozen, x, y, draws)`; a generator of `defences.loss.Loss`. It is
            called for each part of a batch: pixels `x` in [0, 1], labels `y`. After each loss that it yields, the
            optimiser takes a step, and `frozen()` is the changed model. Every batch needs the same number of losses,
            one at least. A loss trains what has `requires_grad` and is reached through `model(...)`. None: a model of
            this method is not trained; it is what `build` makes of its trained parents, and has no checkpoint.
        passes: of a spec, forward passes through one backbone for one training image: an input gradient counts as 2
            and a training step as 3.
        options: of the settings, what a model of this method takes where its recipe does not say otherwise.
        has_gate: whether its models have `experts` and a `gate`, which attacks can aim at.
        needs_parents: whether its models start from others, so that only a defence's recipe can name one.
        selects: of a spec, whether the model has a gate that gives each image to one expert. The gradient that passes
            such a choice (straight-through) is not the model's, so the attacks that follow it leave an upper bound.
    """

    build: str
    losses: str | None
    passes: Callable[[ModelSpec], float]
    options: Callable[[DefenceSettings], Mapping[str, Any]] = lambda settings: {}
    has_gate: bool = False
    needs_parents: bool = False
    selects: Callable[[ModelSpec], bool] = lambda spec: False


def _attacked_step(gradients: float, spec: ModelSpec) -> float:
    return 3 + 2 * gradients * float(spec.option("fraction", 1.0))


def _fgsm_options(settings: DefenceSettings) -> dict[str, Any]:
    return {"epsilons": settings.fgsm.epsilons, "epsilon_draw": settings.fgsm.draw}


def _pgd_options(settings: DefenceSettings) -> dict[str, Any]:
    pgd = settings.pgd
    return {
        "epsilon": pgd.epsilon,
        "step_sizes": pgd.step_sizes or (pgd.step_size,),
        "steps": pgd.steps,
        "random_start": pgd.random_start,
    }


def _no_passes(spec: ModelSpec) -> float:
    return 0.0


_ADVERSARIAL = "dwf_cluster.defences.adversarial"
_DWF = "dwf_cluster.defences.dwf"
_CONTROLS = "dwf_cluster.defences.controls"

METHODS: Mapping[str, Method] = {
    "standard": Method(f"{_ADVERSARIAL}:build", f"{_ADVERSARIAL}:standard", lambda spec: 3.0),
    "fgsm": Method(
        f"{_ADVERSARIAL}:build",
        f"{_ADVERSARIAL}:fgsm",
        lambda spec: _attacked_step(1, spec),
        _fgsm_options,
    ),
    "pgd": Method(
        f"{_ADVERSARIAL}:build",
        f"{_ADVERSARIAL}:pgd",
        lambda spec: _attacked_step(fmean(spec.option("steps")), spec),
        _pgd_options,
    ),
    "dwf": Method(
        f"{_DWF}:build",
        f"{_DWF}:losses",
        # Three versions of each image; the first of PGD's gradients is FGSM's too, unless PGD starts elsewhere.
        lambda spec: len(spec.parents) * (2 * (fmean(spec.option("steps")) + spec.option("random_start")) + 9),
        lambda settings: {
            **_fgsm_options(settings),
            **_pgd_options(settings),
            "gate_hidden": settings.gate.hidden,
            "gate_kind": settings.gate.kind,
            "freeze_experts": settings.joint.freeze_experts,
        },
        has_gate=True,
        needs_parents=True,
        selects=lambda spec: spec.option("gate_kind") == "hard",
    ),
    "uniform": Method(f"{_CONTROLS}:uniform", None, _no_passes, has_gate=True, needs_parents=True),
    "expert": Method(f"{_CONTROLS}:expert", None, _no_passes, needs_parents=True),
    "given": Method("dwf_cluster.defences.given:build", "dwf_cluster.defences.given:losses", _no_passes),
}
"""Methods by name; a model of `given` is a user's own, which is measured and not trained."""


def trained_sources(specs: Sequence[ModelSpec], name: str) -> tuple[str, ...]:
    """The models whose checkpoints a model is loaded from: its own or, if it is not trained, those of its parents."""
    spec = next(spec for spec in specs if spec.name == name)
    if METHODS[spec.method].losses is not None:
        return (name,)
    return tuple(dict.fromkeys(source for parent in spec.parents for source in trained_sources(specs, parent)))


# ------------------------------------------------------------------------------------------------ defences


def single(name: str, method: str, settings: DefenceSettings, **options: Any) -> ModelSpec:
    """A model without parents, with the experts' backbone and training.

    Args:
        name: of the model.
        method: a key of `METHODS`.
        settings: give backbone, training, and the method's options.
        options: of the method, where they differ from the settings.
    """
    all_options = {**METHODS[method].options(settings), **options}
    backbone = settings.model
    return ModelSpec(
        name, backbone.backbone, backbone.width, method, settings.experts.of_a_model, tuple(sorted(all_options.items()))
    )


_RECIPES = "dwf_cluster.defences.recipes"

DEFENCES: Mapping[str, str] = {
    "dwf": f"{_RECIPES}:dwf",
    "fgsm-at": f"{_RECIPES}:fgsm_at",
    "pgd-at": f"{_RECIPES}:pgd_at",
    "pgd-at-matched": f"{_RECIPES}:pgd_at_matched",
    "controls": f"{_RECIPES}:controls",
    "given": f"{_RECIPES}:given",
}
"""`module:function` of each defence's recipe: from `DefenceSettings` to ModelSpecs, the defended model last. The module
imports no torch, because a run is planned without it."""


def recipe(name: str, settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """The models of a defence, the defended model last; of a method, one model of the same name."""
    if name not in DEFENCES:
        return (single(name, name, settings),)
    specs: tuple[ModelSpec, ...] = pkgutil.resolve_name(DEFENCES[name])(settings)
    return specs


def recipe_names() -> tuple[str, ...]:
    """Names that `recipe` takes: every defence, and every method that can train a model without parents."""
    trainable = (name for name, method in METHODS.items() if not method.needs_parents and name not in DEFENCES)
    return (*DEFENCES, *trainable)
