"""Models, methods and defences by name.

A *model* is a row of the result table; its ModelSpec says how it is built. A *method* is how a model is trained: two
functions in a file of this folder. A *defence* is a paper's recipe: from settings to ModelSpecs, the last of which is
the defended model. To add a method or a defence: a file beside this one, and an entry in `METHODS` or `DEFENCES`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from dwf_cluster.data.registry import Shape
from dwf_cluster.defences import options, size
from dwf_cluster.defences.settings import DefenceSettings, Training
from dwf_cluster.evaluation.gate_cost import Parts
from dwf_cluster.models import advmoe_size
from dwf_cluster.models.registry import BACKBONES


@dataclass(frozen=True)
class ModelSpec:
    """One model, and how it is built and trained.

    Attributes:
        name: as in every table: `benign`, `fgsm-2`, `mixture`.
        backbone, width: its network, a key of `models.registry.BACKBONES`, and the network's width. A mixture of
            different networks has the first here, and all in its option `backbones`.
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
        """How many experts it has: its option `experts`, or its parents; 1 without."""
        return int(self.option("experts") or max(1, len(self.parents)))

    @property
    def parallelism(self) -> str:
        """What several processes that train it divide: `ddp` each batch, `experts` its experts."""
        return str(self.option("parallelism", "ddp"))

    @property
    def backbones(self) -> tuple[str, ...]:
        """The network of each expert; of a model without experts, its network."""
        mixed: tuple[str, ...] = self.option("backbones", ())
        return mixed or (self.backbone,) * self.networks

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of its experts, in the order of the gate's outputs: its parents, else `1` and so on; () without a gate.

        A user's own model has no ModelSpec that knows its experts.
        """
        if not METHODS[self.method].has_gate:
            return ()
        return self.parents or tuple(str(number) for number in range(1, 1 + self.networks))


Group = Literal["plain", "adversarial training", "mixture", "control", "user"]
"""The group of a model's row in the result table."""


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
            this method is not trained; it is what `build` makes of its trained parents, and has no checkpoint. That
            of `own-model` and `weights` is never called: their weights come from elsewhere.
        keeps_perturbation: whether `losses` takes one more argument: a perturbation of shape of `x`, which it changes
            in place. There is one for each position of a batch, zero before the first batch; the training loop passes
            it from batch to batch and saves it in checkpoints.
        passes: of a spec, forward passes through one of its networks, of `flops` / `spec.networks` operations, for one
            training image: an input gradient counts as 2 and a training step as 3.
        options: of the settings, what a model of this method takes where its recipe does not say otherwise.
        has_gate: whether its models have `experts` and a `gate`, which attacks can aim at.
        needs_parents: whether its models start from others, or from a file, so that no name alone describes one.
        selects: of a spec, whether the model has a gate that gives each image to one expert. The gradient that passes
            such a choice (straight-through) or stops at it is not the model's, so the attacks that follow it leave an
            upper bound.
        flops: floating-point operations of the convolutions in one forward pass of one image through the whole model,
            of (spec, shape of the image), those of a gate included; by default, of all its networks. Those of linear
            layers are not counted: neither last layers nor the gate of `dwf`.
        parameters: weights and biases of the whole model for ten classes, of (spec, shape of the image), trained or
            frozen, those of gate and heads included; by default, of all its networks.
        parts: what its experts and its gate cost an attack, of (spec, shape of the image).
        group: of its models' rows in the result table.
        backbones: the only ones that its models can be built on; none: on all.
    """

    build: str
    losses: str | None
    passes: Callable[[ModelSpec], float]
    options: Callable[[DefenceSettings], Mapping[str, Any]] = lambda settings: {}
    keeps_perturbation: bool = False
    has_gate: bool = False
    needs_parents: bool = False
    selects: Callable[[ModelSpec], bool] = lambda spec: False
    flops: Callable[[ModelSpec, Shape], float] = size.networks_flops
    parameters: Callable[[ModelSpec, Shape], int] = size.networks_parameters
    parts: Callable[[ModelSpec, Shape], Parts] = size.networks_parts
    group: Group = "adversarial training"
    backbones: tuple[str, ...] = ()


def _attacked_step(gradients: float, spec: ModelSpec) -> float:
    return 3 + 2 * gradients * float(spec.option("fraction", 1.0))


def _advmoe_passes(spec: ModelSpec) -> float:
    """Two attacks on pathway and router, a step of the pathway's weights and one of the router's, on 2n images each."""
    both = advmoe_size.flops(spec.width, spec.option("ratio"), (3, 32, 32))
    pathway, router = (part / sum(both) for part in both)  # of a pass; hardly different for other shapes
    attack = 1.0 + 2 * int(spec.option("steps"))
    experts_step = 2 * (3 * pathway + router)
    through_pathway = 2 * pathway if spec.option("router_objective") == "trades" else 0
    return spec.networks * (2 * attack + experts_step + 2 * (3 * router + through_pathway))


def _joint_passes(spec: ModelSpec) -> float:
    """Of a step on clean, FGSM and PGD images: PGD's first gradient is FGSM's too, unless PGD starts elsewhere."""
    gradients = fmean(spec.option("steps")) + float(spec.option("random_start"))
    return spec.networks * (2 * gradients + 9)


def _no_passes(spec: ModelSpec) -> float:
    return 0.0


def _soe_passes(spec: ModelSpec) -> float:
    """PGD through all sub-models, then a step on clean and adversarial images: `one_by_one` has a set of each."""
    sets = spec.networks if spec.option("attack") == "one_by_one" else 1
    return float(spec.networks * (2 * spec.option("steps") + 3 * (1 + sets)))


_ADVERSARIAL = "dwf_cluster.defences.adversarial"
_DWF = "dwf_cluster.defences.dwf"
_CONTROLS = "dwf_cluster.defences.controls"
_OWN_MODEL = "dwf_cluster.defences.own_model"

OWN_MODEL = "own-model"
"""The method, and the defence, of a user's own network, which `dwf evaluate` measures and nothing here trains."""

WEIGHTS = "weights"
"""The method of models whose weights come from a file of the user's."""

METHODS: Mapping[str, Method] = {
    "standard": Method(f"{_ADVERSARIAL}:build", f"{_ADVERSARIAL}:standard", lambda spec: 3.0, group="plain"),
    "fgsm": Method(
        f"{_ADVERSARIAL}:build",
        f"{_ADVERSARIAL}:fgsm",
        lambda spec: _attacked_step(1, spec),
        options.fgsm,
    ),
    "pgd": Method(
        f"{_ADVERSARIAL}:build",
        f"{_ADVERSARIAL}:pgd",
        lambda spec: _attacked_step(fmean(spec.option("steps")), spec),
        options.pgd,
    ),
    "trades": Method(
        f"{_ADVERSARIAL}:build",
        f"{_ADVERSARIAL}:trades",
        # The attack's target costs a forward pass; clean and adversarial images a training step each.
        lambda spec: 1 + 2 * float(spec.option("steps")) + 6,
        options.trades,
    ),
    "free": Method(
        f"{_ADVERSARIAL}:build",
        f"{_ADVERSARIAL}:free",
        lambda spec: 3 * float(spec.option("replays")),  # the gradient of the pixels comes with the weights'
        options.free,
        keeps_perturbation=True,
    ),
    "fgsm-rs": Method(
        f"{_ADVERSARIAL}:build",
        f"{_ADVERSARIAL}:fgsm_rs",
        lambda spec: 5.0,
        options.fgsm_rs,
    ),
    "n-fgsm": Method(
        f"{_ADVERSARIAL}:build",
        f"{_ADVERSARIAL}:n_fgsm",
        lambda spec: 5.0,
        options.n_fgsm,
    ),
    "random-at": Method(
        f"{_ADVERSARIAL}:build",
        f"{_DWF}:losses",
        _joint_passes,
        options.random_at,
    ),
    "dwf": Method(
        f"{_DWF}:build",
        f"{_DWF}:losses",
        _joint_passes,
        options.dwf,
        has_gate=True,
        needs_parents=True,
        selects=lambda spec: spec.option("gate_kind") == "hard",
        parameters=size.dwf_parameters,
        group="mixture",
    ),
    "soe": Method(
        "dwf_cluster.defences.soe:build",
        "dwf_cluster.defences.soe:losses",
        _soe_passes,
        options.soe,
        has_gate=True,
        selects=lambda spec: True,
        parameters=size.soe_parameters,
        parts=size.soe_parts,
        group="mixture",
    ),
    "advmoe": Method(
        "dwf_cluster.defences.advmoe:build",
        "dwf_cluster.defences.advmoe:losses",
        _advmoe_passes,
        options.advmoe,
        has_gate=True,
        selects=lambda spec: True,
        flops=size.advmoe_flops,
        parameters=size.advmoe_parameters,
        parts=size.advmoe_parts,
        group="mixture",
        backbones=("resnet18",),
    ),
    "uniform": Method(f"{_CONTROLS}:uniform", None, _no_passes, has_gate=True, needs_parents=True, group="control"),
    "expert": Method(f"{_CONTROLS}:expert", None, _no_passes, needs_parents=True, group="control"),
    OWN_MODEL: Method(f"{_OWN_MODEL}:build", f"{_OWN_MODEL}:losses", _no_passes, group="user"),
    WEIGHTS: Method(
        "dwf_cluster.defences.weights:build", f"{_OWN_MODEL}:losses", _no_passes, needs_parents=True, group="user"
    ),
}
"""Methods by name. The weights of a model of `weights` are a user's own: `training.given` loads and tests them in the
place of a training."""


def trained_sources(specs: Sequence[ModelSpec], name: str) -> tuple[str, ...]:
    """The models whose checkpoints a model is loaded from: its own or, if it is not trained, those of its parents."""
    spec = next(spec for spec in specs if spec.name == name)
    if METHODS[spec.method].losses is not None:
        return (name,)
    return tuple(dict.fromkeys(source for parent in spec.parents for source in trained_sources(specs, parent)))


# ------------------------------------------------------------------------------------------------ defences


def single(
    name: str, method: str, settings: DefenceSettings, backbone: str | None = None, /, **options: Any
) -> ModelSpec:
    """A model without parents, with the experts' width and training.

    Args:
        name: of the model.
        method: a key of `METHODS`.
        settings: give width, training, and the method's options.
        backbone: a key of `BACKBONES`; None: the first of the settings.
        options: of the method, where they differ from the settings.
    """
    all_options = {**METHODS[method].options(settings), **options}
    model = settings.model
    return ModelSpec(
        name,
        backbone or model.backbone[0],
        model.width,
        method,
        settings.experts.of_a_model,
        tuple(sorted(all_options.items())),
    )


_RECIPES = "dwf_cluster.defences.recipes"

DEFENCES: Mapping[str, str] = {
    "dwf": f"{_RECIPES}:dwf",
    "fgsm-at": f"{_RECIPES}:fgsm_at",
    "pgd-at": f"{_RECIPES}:pgd_at",
    "pgd-at-matched": f"{_RECIPES}:pgd_at_matched",
    "advmoe": f"{_RECIPES}:advmoe",
    "advmoe-wide": f"{_RECIPES}:advmoe_wide",
    "free": f"{_RECIPES}:free",
    "controls": f"{_RECIPES}:controls",
    "pgd-ensemble": f"{_RECIPES}:pgd_ensemble",
    "resnet18-wide": f"{_RECIPES}:resnet18_wide",
    OWN_MODEL: f"{_RECIPES}:own_model",
}
"""`module:function` of each defence's recipe: from `DefenceSettings` to ModelSpecs, the defended model last. The module
imports no torch, because a run is planned without it."""


def recipe(name: str, settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """The models of a defence, the defended model last; of a method or a backbone, one model of the same name.

    The model of a backbone is trained on clean images.
    """
    if name not in DEFENCES:
        return (single(name, name, settings) if name in METHODS else single(name, "standard", settings, name),)
    specs: tuple[ModelSpec, ...] = pkgutil.resolve_name(DEFENCES[name])(settings)
    return specs


def recipe_names() -> tuple[str, ...]:
    """What a user can train: every defence, method that can train a model without parents, and backbone.

    `recipe` takes these names and `OWN_MODEL`.
    """
    methods = (name for name, method in METHODS.items() if not method.needs_parents)
    return tuple(name for name in dict.fromkeys((*DEFENCES, *methods, *BACKBONES)) if name != OWN_MODEL)
