"""The recipes of the defences in `registry.DEFENCES`: from settings to ModelSpecs, the defended model last."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dwf_cluster.defences.registry import METHODS, OWN_MODEL, WEIGHTS, ModelSpec, single
from dwf_cluster.defences.settings import DefenceSettings, Given, Training


def dwf(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """Divided We Fall: experts in the order of the gate's outputs, then their mixture (algorithms 1 to 3)."""

    def names(kind: str, count: int) -> list[str]:
        return [kind] if kind == "benign" and count == 1 else [f"{kind}-{i + 1}" for i in range(count)]

    counts, backbones = settings.experts, itertools.cycle(settings.model.backbone)
    kinds = (("benign", "standard", counts.benign), ("fgsm", "fgsm", counts.fgsm), ("pgd", "pgd", counts.pgd))
    experts = [
        single(name, method, settings, next(backbones)) for kind, method, count in kinds for name in names(kind, count)
    ]
    mixture = ModelSpec(
        "mixture",
        experts[0].backbone,
        settings.model.width,
        "dwf",
        settings.joint.of_a_model,
        tuple(sorted({**METHODS["dwf"].options(settings), **_backbones(experts)}.items())),
        tuple(expert.name for expert in experts),
        (("gate", settings.gate.learning_rate, settings.gate.weight_decay),),
    )
    return (*experts, mixture)


def _backbones(experts: Sequence[ModelSpec]) -> dict[str, Any]:
    """The option `backbones` of a model of these experts; nothing if they have one network."""
    backbones = tuple(expert.backbone for expert in experts)
    return {} if len(set(backbones)) == 1 else {"backbones": backbones}


def fgsm_at(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """FGSM-AT: a share of each batch is attacked, half in the paper, at PGD's epsilon. Our assumption: this epsilon."""
    fraction = settings.adversarial_training.fraction
    return (single("fgsm-at", "fgsm", settings, epsilons=(settings.pgd.epsilon,), fraction=fraction),)


def pgd_at(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """PGD-AT: a share of each batch is attacked, half in the paper, by ten iterations."""
    return (single("pgd-at", "pgd", settings, steps=(10,), fraction=settings.adversarial_training.fraction),)


def pgd_at_matched(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """PGD-AT, trained with as much compute as all models of `dwf` together: the rival at equal compute.

    Everything but the number of epochs is that of `pgd-at`, so the two differ in compute alone. By default half of
    each batch stays clean because the mixture is trained on clean images too: a network trained on adversarial images
    only would be more robust and less accurate, and neither difference would be the mixture's. The number of epochs is
    rounded up. A long training may overfit (Rice et al. 2020), which would flatter the mixture: see `experts.keep`.
    """
    (spec,) = pgd_at(settings)
    return (_with_compute_of_dwf(replace(spec, name="pgd-at-matched"), settings),)


def _with_compute_of_dwf(spec: ModelSpec, settings: DefenceSettings) -> ModelSpec:
    """A model with so many epochs, rounded up, that its training costs what all trainings of `dwf` cost."""

    def epoch_flop(model: ModelSpec) -> float:
        # Of images of 32x32: the ratio of two networks' operations hardly depends on the size of the images.
        method = METHODS[model.method]
        return method.passes(model) * method.flops(model, (3, 32, 32)) / model.networks

    budget = sum(model.training.epochs * epoch_flop(model) for model in dwf(settings))
    epochs = math.ceil(budget / epoch_flop(spec) - 1e-9)  # a quotient is rounded
    return replace(spec, training=spec.training.model_copy(update={"epochs": epochs}))


def pgd_ensemble(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """As many PGD-AT networks as the mixture has experts, `pgd-at-1` and so on, and the mean of their logits.

    The mean has the size of the mixture, and neither its gate, its joint stage nor its kinds of experts. The networks
    differ in their initial weights and in all random draws.
    """
    (spec,) = pgd_at(settings)
    *experts, _ = dwf(settings)
    members = tuple(replace(spec, name=f"{spec.name}-{number + 1}") for number in range(len(experts)))
    names = tuple(member.name for member in members)
    return (*members, replace(spec, name="pgd-ensemble", method="uniform", options=(), parents=names))


def resnet18_wide(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """ResNet-18 at three times `model.width`: parameters and operations of a mixture of nine experts, in one network.

    It is trained as `random-at`, on the batches of the joint stage with the same random strengths, for as many epochs
    as the compute of all trainings of `dwf` allows. So neither its size, nor its adversarial examples, nor its compute
    differ from the mixture's, and what is left is the division into experts and the gate. A plain network of this size
    would answer another question: whether size alone, without adversarial training, gives robustness.
    """
    random_at = single("random-at", "random-at", settings)
    wide = replace(random_at, name="resnet18-wide", backbone="resnet18", width=3 * settings.model.width)
    return (_with_compute_of_dwf(wide, settings),)


def free(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """Free adversarial training: epochs are divided by the replays, rounded up, so that it takes as many steps."""
    spec = single("free", "free", settings)
    epochs = math.ceil(spec.training.epochs / settings.free.replays)
    return (replace(spec, training=spec.training.model_copy(update={"epochs": epochs})),)


def controls(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """Controls of the mixture of `dwf`, built from what it trains: no training, only evaluations.

    `joint-<expert>`: each expert as it is in the trained mixture; `joint-uniform`: these experts with equal weights;
    `uniform`: the experts before the joint stage with equal weights.
    """
    *experts, mixture = dwf(settings)

    def control(name: str, method: str, parents: tuple[str, ...], **options: Any) -> ModelSpec:
        return replace(mixture, name=name, method=method, options=tuple(options.items()), parents=parents, own_rates=())

    joint = [
        replace(
            control(f"joint-{expert.name}", "expert", (mixture.name,), number=number),
            backbone=expert.backbone,
        )
        for number, expert in enumerate(experts)
    ]
    return (
        control("uniform", "uniform", mixture.parents, **_backbones(experts)),
        *joint,
        control("joint-uniform", "uniform", tuple(spec.name for spec in joint), **_backbones(experts)),
    )


def advmoe(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """ADVMoE: one network of routed filters; its router has a learning rate of its own."""
    own = settings.advmoe
    rates = ("gate", own.router_learning_rate, own.router_weight_decay)
    return (replace(single("advmoe", "advmoe", settings), own_rates=(rates,)),)


def advmoe_wide(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """ADVMoE whose pathways have the width of the other rows' ResNet-18, whatever `advmoe.ratio` is.

    An image costs as much as in one ResNet-18, so the row shows what the half width of ADVMoE takes away.
    """
    (spec,) = advmoe(settings)
    return (replace(spec, name="advmoe-wide", options=tuple(sorted({**dict(spec.options), "ratio": 1.0}.items()))),)


def weights(entry: Given) -> ModelSpec:
    """A network with the user's weights. Its training is one epoch without steps."""
    options = entry.model_dump(include={"file", "sha256", "mean", "std", "accuracy"})
    training = Training(epochs=1)  # whatever the experts' is: experiments share the model
    return ModelSpec(entry.name, entry.backbone, entry.width, WEIGHTS, training, tuple(sorted(options.items())))


def own_model(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """A network of the user's own, which is measured and not trained."""
    return (single("model", OWN_MODEL, settings),)
