"""What decides the numbers: the Experiment, its presets and its signature.

Everything here is a frozen, validated value. Importing this module costs neither torch nor ray, so a
typing mistake is answered at once.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import re
import stat
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator


def printable(text: object, limit: int | None = None) -> str:
    """Text that a terminal shows as it is, on one line.

    Line breaks, escape sequences, characters that change the direction of writing and bytes that are no UTF-8 become
    escapes such as `\\x1b`. Whatever comes from a store, a file or a command line passes through this function before
    it is printed.

    Args:
        text: to be shown.
        limit: characters to show; a longer text ends in `...`.
    """
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 3] + "..."


def printable_lines(text: object) -> str:
    """As `printable`, for text of several lines."""
    return "\n".join(map(printable, str(text).split("\n")))


class InvalidInput(ValueError):
    """A value that cannot be used. Its text is one line: the field, the value, and what is allowed."""

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


# --------------------------------------------------------------------------------------- field types


def _as_tuple(value: Any) -> Any:
    """Let a lone number, or numbers with commas between (`0.1,0.2`), stand for a tuple."""
    if isinstance(value, str):
        try:
            return tuple(json.loads(part) for part in value.split(","))
        except (json.JSONDecodeError, RecursionError):
            return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return (value,)
    return value


Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
CountOrNone = Annotated[int, Field(ge=0, le=1_000)]
Rate = Annotated[float, Field(gt=0, le=100)]
Decay = Annotated[float, Field(ge=0, le=1)]
Pixels = Annotated[float, Field(gt=0, le=1)]
Strengths = Annotated[tuple[Pixels, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Counts = Annotated[tuple[Count, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
PerChannel = Annotated[tuple[float, ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Spreads = Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_as_tuple), Field(min_length=1)]
Beyond = Annotated[
    tuple[
        Literal[
            "pgd_gate",
            "pgd_expert",
            "pgd_momentum",
            "pgd_cw",
            "pgd_l2",
            "apgd",
            "apgd_l2",
            "square",
            "autoattack",
            "transfer",
            "noise",
        ],
        ...,
    ],
    BeforeValidator(_as_tuple),
]
Baselines = Annotated[tuple[Literal["fgsm-at", "pgd-at"], ...], BeforeValidator(_as_tuple)]


MIXTURE = "mixture"
"""Name of the jointly trained model, beside the names of the experts."""

MAX_JSON_BYTES = 64 << 20
"""Of one file. The largest is a checkpoint's `state.json`, with a row of metrics for each epoch: 100,000 epochs fit."""

STAGES = ("experts", "joint", "evaluate")
"""The pipeline, in order."""

SOURCES: Mapping[str, tuple[int, int, tuple[int, int, int]]] = {
    "digits": (1_437, 360, (1, 8, 8)),
    "fashion-mnist": (60_000, 10_000, (1, 28, 28)),
    "cifar10": (50_000, 10_000, (3, 32, 32)),
    "svhn": (73_257, 26_032, (3, 32, 32)),
}
"""Named data sets: training images, test images, (channels, height, width) as stored."""


class _Part(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


# ------------------------------------------------------------------------------------------- the parts


class Data(_Part):
    """Which images, and how they are augmented."""

    source: str = "cifar10"
    """`digits`, `fashion-mnist`, `cifar10`, `svhn`, or an `.npz` file with `x_train`, `y_train`, `x_test`,
    `y_test` (images uint8, NHWC or NHW; labels integers from 0)."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Digest of an `.npz` source; filled in when the file is read, so that the signature follows the
    content and not the path."""
    train_examples: Count | None = None
    """Train on the first n images; null takes all."""
    test_examples: Count | None = None
    """Test on the first n images; null takes all."""
    padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Black pixels added on each side of every image."""
    mean: PerChannel | None = None
    """Mean of each channel, pixels in [0, 1]; null measures it on the training images."""
    std: Spreads | None = None
    """Standard deviation of each channel, pixels in [0, 1]; null measures it on the training images."""
    crop_padding: Annotated[int, Field(ge=0, le=64)] = 0
    """Augmentation: pad by n pixels, then crop at random to the old size. Our assumption for CIFAR-10
    and SVHN: 4."""
    flip: bool = False
    """Augmentation: mirror each image left to right with probability 1/2. Our assumption: CIFAR-10 only."""

    @model_validator(mode="after")
    def _one_std_for_each_mean(self) -> Data:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean and std need the same number of channels, or null for both")
        return self

    @field_validator("source")
    @classmethod
    def _known_source(cls, source: str) -> str:
        if (source not in SOURCES and not source.endswith(".npz")) or "\0" in source:
            raise ValueError(f"one of {', '.join(SOURCES)}, or the path of an .npz file")
        return source


class Model(_Part):
    """The backbone of every expert."""

    width: Annotated[int, Field(ge=1, le=1024)] = 64
    """Channels of the first convolution; 64 is ResNet-18."""


class Gate(_Part):
    """The multilayer perceptron that weighs the experts, equation (2)."""

    hidden: Annotated[int, Field(ge=1, le=65_536)] = 128
    """Units of its hidden layer (our assumption)."""
    learning_rate: Rate = 0.01
    """Peak learning rate of its parameters in the joint stage (our assumption)."""
    weight_decay: Decay = 5e-4
    """Weight decay of its parameters (our assumption)."""
    kind: Literal["soft", "hard"] = "soft"
    """`hard` gives each image to the one expert of the largest weight; gradients, those of attacks too, pass through
    the soft weights (straight-through estimator). The paper's is soft."""


class Fgsm(_Part):
    """What the FGSM experts and the joint stage train against, equation (3)."""

    epsilons: Strengths = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)
    """The set that a batch's epsilon is drawn from (one value: a fixed strength), pixels in [0, 1]."""


class Pgd(_Part):
    """What the PGD experts and the joint stage train against, equations (4) and (5)."""

    epsilon: Pixels = 8 / 255
    """Radius of the L-infinity ball, pixels in [0, 1] (our assumption: the field's standard)."""
    step_size: Pixels = 2 / 255
    """Length of one step, pixels in [0, 1] (our assumption: the field's standard)."""
    steps: Counts = (10, 20, 30, 40, 50)
    """The set that a batch's number of iterations is drawn from (one value: a fixed number)."""


class Training(_Part):
    """SGD with momentum and weight decay, cosine annealing over all its steps, cross-entropy."""

    epochs: Count = 200
    """Passes over the training images (our assumption: 200 for the experts, 50 for the joint stage)."""
    learning_rate: Rate = 0.1
    """Peak learning rate (our assumption: 0.1 for the experts, 0.01 for the joint stage)."""
    batch_size: Count = 128
    """Images of one step, over all workers; the joint stage trains on three versions of each
    (our assumption: 128)."""
    weight_decay: Decay = 5e-4
    """Weight decay (our assumption)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum (our assumption)."""
    accumulation: Count = 1
    """Cut each batch into n parts whose gradients are added up before the step: less memory, the same
    gradient, but BatchNorm then normalises with the statistics of a part."""


class Experts(Training):
    """How many experts of each regime, and how each is trained (algorithms 1 and 2)."""

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
    """Passes over the training images (our assumption)."""
    learning_rate: Rate = 0.01
    """Peak learning rate of the experts (our assumption)."""
    freeze_experts: bool = False
    """Train the gate alone: the experts stay as they were pre-trained. The paper freezes nothing."""


class Evaluation(_Part):
    """The columns of the result table."""

    fgsm_epsilons: Strengths = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)
    """FGSM columns, pixels in [0, 1]."""
    pgd_steps: Counts = (10, 20, 30, 40, 50)
    """PGD columns, iterations, at the bound and step size of `pgd`."""
    restarts: Count = 3
    """Starts of the `pgd_restarts` column, the image itself and then random points of the ball; an image counts as
    correct if it resists every iterate of each."""
    restart_steps: Count = 100
    """Iterations from each start."""
    adaptive_steps: Count = 100
    """Iterations of `pgd_adaptive`, through experts, gate and routing weights; of `pgd_gate` and `pgd_expert`."""
    eot: Count = 1
    """Gradients averaged in each adaptive iteration (expectation over transformation)."""
    beyond: Beyond = ("pgd_gate", "pgd_expert")
    """Columns beside the paper's: `pgd_gate` aims at the mixture's gate, `pgd_expert` at its experts one by one;
    `pgd_momentum`; `pgd_cw` (Carlini-Wagner loss); `pgd_l2`; `apgd`, `apgd_l2`; `square` (black box);
    `autoattack` (its authors' standard set); `transfer` (made on one model, tested on each other); `noise` (random
    signs, the floor of every attack)."""
    l2_epsilon: Annotated[float, Field(gt=0, le=1000)] = 0.5
    """Radius of the L2 ball, Euclidean length over an image's pixels in [0, 1]."""
    l2_step_size: Annotated[float, Field(gt=0, le=1000)] = 0.1
    """Length of one step of `pgd_l2`."""
    apgd_steps: Count = 100
    """Iterations of `apgd` and `apgd_l2`."""
    square_queries: Count = 5000
    """Forward passes of `square`."""
    check_examples: Count = 128
    """First test images that each model is checked for gradient masking on."""
    shard_examples: Count | None = None
    """Test images of one evaluation task, rounded up to whole batches; null takes as many as keep a CPU core busy
    for minutes."""
    batch_size: Count = 512
    """Images attacked at once."""
    probe_examples: Count = 256
    """Test images of the small PGD probe that follows every epoch of training."""
    probe_steps: Count = 10
    """Iterations of the probe."""


@dataclass(frozen=True)
class Regime:
    """How a model's training batches are perturbed.

    Attributes:
        name: of the model, e.g. `fgsm-2`.
        attack: what perturbs the batch.
        epsilons: for FGSM, the set that a batch's epsilon is drawn from.
        steps: for PGD, the set that a batch's number of iterations is drawn from.
        fraction: share of the batch that is adversarial, 0..1.
    """

    name: str
    attack: Literal["benign", "fgsm", "pgd"]
    epsilons: tuple[float, ...] = ()
    steps: tuple[int, ...] = ()
    fraction: float = 1.0


_LATER: Mapping[str, frozenset[str]] = {"gate": frozenset({"kind"}), "joint": frozenset({"freeze_experts"})}
"""Fields that came after results were out: at their defaults they are no part of the signature."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]


class Experiment(_Part):
    """Everything that decides the numbers, and nothing else (not where it runs, nor where results go)."""

    preset: Name = "cifar10"
    """Name of the preset it started from; part of the folder's name."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of every random draw."""
    checkpoint_minutes: Annotated[float, Field(gt=0, le=1_000_000)] = 10.0
    """Minutes between checkpoints within an epoch that takes longer. Changes no number, and no signature."""
    baselines: Baselines = ()
    """Models beside the mixture: `fgsm-at` and `pgd-at`, ResNet-18 with half of each batch adversarial at a
    fixed strength (FGSM at `pgd.epsilon`: our assumption; PGD with 10 iterations)."""
    data: Data = Data()
    model: Model = Model()
    gate: Gate = Gate()
    fgsm: Fgsm = Fgsm()
    pgd: Pgd = Pgd()
    experts: Experts = Experts()
    joint: Joint = Joint()
    evaluation: Evaluation = Evaluation()

    @property
    def mixture_regimes(self) -> tuple[Regime, ...]:
        """The experts of the mixture, in the order of the gate's outputs."""

        def named(kind: str, count: int) -> list[str]:
            return [kind] if kind == "benign" and count == 1 else [f"{kind}-{i + 1}" for i in range(count)]

        return (
            *(Regime(name, "benign") for name in named("benign", self.experts.benign)),
            *(Regime(n, "fgsm", epsilons=self.fgsm.epsilons) for n in named("fgsm", self.experts.fgsm)),
            *(Regime(n, "pgd", steps=self.pgd.steps) for n in named("pgd", self.experts.pgd)),
        )

    @property
    def regimes(self) -> tuple[Regime, ...]:
        """Every model of the experts stage: the experts, then the baselines."""
        baselines = {
            "fgsm-at": Regime("fgsm-at", "fgsm", epsilons=(self.pgd.epsilon,), fraction=0.5),
            "pgd-at": Regime("pgd-at", "pgd", steps=(10,), fraction=0.5),
        }
        return (*self.mixture_regimes, *(baselines[name] for name in self.baselines))

    def training(self, stage: str) -> Training:
        """Epochs, learning rate, ... of the stage `experts` or `joint`."""
        return self.joint if stage == "joint" else self.experts

    @property
    def signature(self) -> str:
        """Ten hexadecimal digits of the SHA-256 of the canonical JSON.

        An `.npz` source counts with its content, not with its path; `checkpoint_minutes` does not count.
        """
        fields = self._deciding()
        for part, names in _LATER.items():
            for name in names:
                if fields[part][name] == type(getattr(self, part)).model_fields[name].default:
                    del fields[part][name]
        return _digest(fields)[:10]

    def expert_signature(self, model: str) -> str:
        """SHA-256 of what decides one model of the experts stage and its rows of `metrics`, in hexadecimal digits.

        Experiments for which it is the same train the same model, to the last bit on the same hardware.
        """
        (regime,) = (regime for regime in self.regimes if regime.name == model)
        fields, counts = self._deciding(), {"benign", "fgsm", "pgd"}
        return _digest(
            {
                **{name: fields[name] for name in ("seed", "data", "model")},
                "regime": asdict(regime),
                "ball": (self.pgd.epsilon, self.pgd.step_size),
                "training": {name: value for name, value in fields["experts"].items() if name not in counts},
                "probe": (self.evaluation.probe_examples, self.evaluation.probe_steps),
            }
        )

    def _deciding(self) -> dict[str, Any]:
        fields = self.model_dump(mode="json", exclude={"checkpoint_minutes"})
        if self.data.sha256:
            fields["data"]["source"] = "npz"
        return fields

    @property
    def folder(self) -> str:
        """Name of the experiment's folder below the storage URL."""
        return f"{self.preset}-seed{self.seed}-{self.signature}"

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
            raise InvalidInput(_one_line(error)) from None


def _digest(fields: Mapping[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


# --------------------------------------------------------------------------------------------- presets

_CIFAR10 = Experiment(
    baselines=("fgsm-at", "pgd-at"),
    data=Data(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), crop_padding=4, flip=True),
)
_SVHN = _CIFAR10.model_copy(
    update={
        "preset": "svhn",
        "data": Data(source="svhn", mean=(0.4377, 0.4438, 0.4728), std=(0.1980, 0.2010, 0.1970), crop_padding=4),
    }
)
_FASHION_MNIST = Experiment(
    preset="fashion-mnist",
    data=Data(source="fashion-mnist", padding=2, mean=(0.2860,), std=(0.3530,), crop_padding=2, flip=True),
    fgsm=Fgsm(epsilons=(0.02, 0.04, 0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18)),
    pgd=Pgd(epsilon=0.1, step_size=0.04, steps=(2, 3, 4)),
    experts=Experts(epochs=30),
    joint=Joint(epochs=10),
    evaluation=Evaluation(
        fgsm_epsilons=(0.02, 0.04, 0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18),
        pgd_steps=(5, 10),
        restart_steps=20,
        adaptive_steps=20,
        l2_epsilon=1.5,
        l2_step_size=0.3,
    ),
)
_DIGITS = Experiment(
    preset="digits",
    data=Data(source="digits"),
    model=Model(width=8),
    gate=Gate(learning_rate=0.1),  # one joint epoch is all the time it has
    fgsm=Fgsm(epsilons=(0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24, 0.27)),
    pgd=Pgd(epsilon=0.15, step_size=0.03, steps=(2, 4, 6, 8, 10)),
    experts=Experts(epochs=4, batch_size=64),
    joint=Joint(epochs=1, batch_size=64),
    evaluation=Evaluation(
        fgsm_epsilons=(0.03, 0.06, 0.09, 0.12, 0.15, 0.18, 0.21, 0.24, 0.27),
        pgd_steps=(5, 10, 20, 30, 40),
        restart_steps=40,
        adaptive_steps=50,
        l2_epsilon=0.75,
        l2_step_size=0.15,
        check_examples=64,
        probe_examples=128,
    ),
)

PRESETS: Mapping[str, tuple[Experiment, str]] = {
    "digits": (_DIGITS, "scikit-learn's 1,797 digits, embedded; minutes on a laptop"),
    "fashion-mnist": (_FASHION_MNIST, "70,000 images of clothing, 28x28 padded to 32x32"),
    "cifar10": (_CIFAR10, "the paper's scale: width 64, nine experts, its ranges, its two baselines"),
    "svhn": (_SVHN, "the paper's scale on street-view house numbers"),
}


def build(preset: str, seed: int | None = None, assignments: Sequence[str] = ()) -> Experiment:
    """The Experiment that a command line asks for.

    Args:
        preset: a name of `PRESETS`, the path of an `.npz` file (then with the paper's values, the images' own size,
            and mean and std measured), or the path of an `experiment.json`.
        seed: replaces the preset's seed.
        assignments: `dotted.field=value`, value as JSON, a bare word, or numbers with commas between.

    Raises:
        InvalidInput: for the first value that cannot be used.
    """
    experiment = assemble(preset, seed, assignments)
    if not experiment.data.source.endswith(".npz"):
        return experiment
    status = regular_file(experiment.data.source, "data.source")
    try:
        sha256 = _sha256(experiment.data.source, status.st_mtime_ns, status.st_size)
    except OSError as error:
        raise InvalidInput(f"data.source: {experiment.data.source!r} cannot be read: {error.strerror}") from None
    data = experiment.data.model_copy(update={"sha256": sha256})
    return experiment.model_copy(update={"data": data})


def assemble(preset: str, seed: int | None, assignments: Sequence[str]) -> Experiment:
    """As `build`, but an `.npz` file is not read and has no digest."""
    if preset in PRESETS:
        fields = PRESETS[preset][0].model_dump(mode="json")
    elif preset.endswith(".npz"):
        fields = _own_images(preset).model_dump(mode="json")
    elif preset.endswith(".json"):
        fields = _read_json(preset)
    else:
        raise InvalidInput(f"preset: {preset!r} is none of {', '.join(PRESETS)}, nor the path of an .npz or .json file")
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise InvalidInput(f"--set: {assignment!r} is not of the form dotted.field=value")
        _assign(fields, name.strip(), text.strip())
    if seed is not None:
        fields["seed"] = seed
    fields["data"]["sha256"] = None
    return Experiment.from_json(json.dumps(fields))


def invocation(experiment: Experiment) -> tuple[str, dict[str, Any]]:
    """What `--preset` and `--set` are given, beside `--seed`, to get an experiment again.

    Returns:
        The value of `--preset`, and each field that differs from what it stands for, by its dotted name.
    """
    source = experiment.data.source
    if experiment.preset in PRESETS:
        preset, base = experiment.preset, PRESETS[experiment.preset][0]
    elif source.endswith(".npz"):
        preset, base = source, _own_images(source)
    else:  # a .json file of the user's, which may be gone
        preset, base = "cifar10", PRESETS["cifar10"][0]
    known = flat(base.model_dump(mode="json"))
    fields = flat(experiment.model_dump(mode="json"))
    return preset, {n: v for n, v in fields.items() if v != known[n] and n not in ("seed", "data.sha256")}


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _own_images(source: str) -> Experiment:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).stem).strip("-._")[:64] or "images"
    return Experiment(preset=name, data=Data(source=source))


def regular_file(path: str, field: str) -> os.stat_result:
    """What the file system says of a file that can be read to its end: pipes and devices have none.

    Args:
        path: of the file.
        field: that names it, for the message.

    Raises:
        InvalidInput: if there is no such file, or it is not a regular one.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a zero byte, or characters that no path can have
        raise InvalidInput(f"{field}: {path!r} cannot be read: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a directory" if stat.S_ISDIR(status.st_mode) else "a pipe, a socket or a device"
        raise InvalidInput(f"{field}: {path!r} cannot be read: it is {kind}; allowed is a regular file")
    return status


@functools.cache  # a sweep has a thousand experiments of one file
def _sha256(path: str, changed: int, size: int) -> str:
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            sha256.update(block)
    return sha256.hexdigest()


def written(value: Any) -> str:
    """A field's value as an assignment has it."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)


def _read_json(path: str) -> dict[str, Any]:
    size = regular_file(path, "preset").st_size
    if size > MAX_JSON_BYTES:
        raise InvalidInput(f"preset: {path!r} cannot be used: it has {size} bytes, allowed are {MAX_JSON_BYTES}")
    try:
        return Experiment.from_json(Path(path).read_text(encoding="utf-8")).model_dump(mode="json")
    except OSError as error:
        raise InvalidInput(f"preset: {path!r} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InvalidInput(f"preset: {path!r} cannot be used: it is not text in UTF-8") from None


def _assign(fields: dict[str, Any], name: str, text: str) -> None:
    known = {field.name for field in describe()}
    if name not in known:
        close = difflib.get_close_matches(name, sorted(known), n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists them all"
        raise InvalidInput(f"{name[:80]}: no such field; {hint}")
    *parents, leaf = name.split(".")
    for parent in parents:
        fields = fields[parent]
    try:
        fields[leaf] = json.loads(text)
    except (ValueError, RecursionError):  # a bare word, such as a file's name
        fields[leaf] = text


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"]) or "experiment"
    if first["type"] == "extra_forbidden":
        return f"{place}: no such field; --help lists them all"
    allowed = first["msg"].removeprefix("Value error, ").replace("\n", " ")
    if isinstance(first["input"], dict):
        return f"{place}: {allowed}"
    value = repr(first["input"])
    return f"{place}: {value if len(value) <= 80 else value[:77] + '...'} cannot be used: {allowed}"


# ---------------------------------------------------------------------------------------------- --help


@dataclass(frozen=True)
class FieldDescription:
    """One settable field: its dotted name, its type in words, its default (the paper's), its meaning."""

    name: str
    type: str
    default: str
    meaning: str


def describe() -> list[FieldDescription]:
    """Every field that `--set` takes, in order."""
    return list(_describe(Experiment, ""))


def _describe(part: type[BaseModel], prefix: str) -> Iterator[FieldDescription]:
    for name, info in part.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from _describe(info.annotation, f"{prefix}{name}.")
        else:
            default = info.default
            text = (
                ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in default)
                if isinstance(default, tuple)
                else f"{default:.4g}"
                if isinstance(default, float)
                else json.dumps(default)
            )
            meaning = " ".join((info.description or "").split())
            yield FieldDescription(prefix + name, _type_name(info.annotation), text, meaning)


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join("null" if a is type(None) else _type_name(a) for a in arguments)
    if origin is tuple:
        return f"{_type_name(arguments[0])},..."
    if origin is Literal:
        return "|".join(map(str, arguments))
    return {"int": "integer", "float": "number", "bool": "true|false", "str": "text"}[annotation.__name__]
