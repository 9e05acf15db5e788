"""The recipes of the defences in `registry.DEFENCES`: from settings to ModelSpecs, the defended model last."""

from __future__ import annotations

import math
from dataclasses import replace

from dwf_cluster.defences.registry import METHODS, ModelSpec, single
from dwf_cluster.defences.settings import DefenceSettings, Given, Training


def dwf(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """Divided We Fall: experts in the order of the gate's outputs, then their mixture (algorithms 1 to 3)."""

    def names(kind: str, count: int) -> list[str]:
        return [kind] if kind == "benign" and count == 1 else [f"{kind}-{i + 1}" for i in range(count)]

    counts = settings.experts
    experts = (
        *(single(name, "standard", settings) for name in names("benign", counts.benign)),
        *(single(name, "fgsm", settings) for name in names("fgsm", counts.fgsm)),
        *(single(name, "pgd", settings) for name in names("pgd", counts.pgd)),
    )
    mixture = ModelSpec(
        "mixture",
        settings.model.backbone,
        settings.model.width,
        "dwf",
        settings.joint.of_a_model,
        tuple(sorted(METHODS["dwf"].options(settings).items())),
        tuple(expert.name for expert in experts),
        (("gate", settings.gate.learning_rate, settings.gate.weight_decay),),
    )
    return (*experts, mixture)


def fgsm_at(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """FGSM-AT: half of each batch is attacked, at PGD's epsilon. Our assumption: this epsilon."""
    return (single("fgsm-at", "fgsm", settings, epsilons=(settings.pgd.epsilon,), fraction=0.5),)


def pgd_at(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """PGD-AT: half of each batch is attacked, by ten iterations."""
    return (single("pgd-at", "pgd", settings, steps=(10,), fraction=0.5),)


def pgd_at_matched(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """PGD-AT, trained for as many forward passes as all models of `dwf` together: the rival at equal compute.

    Everything but the number of epochs is that of `pgd-at`, so the two differ in compute alone. Half of each batch
    stays clean because the mixture is trained on clean images too: a network trained on adversarial images only would
    be more robust and less accurate, and neither difference would be the mixture's. The number of epochs is rounded
    up. A long training may overfit (Rice et al. 2020), which would flatter the mixture: see `experts.keep`.
    """
    (spec,) = pgd_at(settings)
    budget = sum(model.training.epochs * METHODS[model.method].passes(model) for model in dwf(settings))
    epochs = math.ceil(budget / METHODS[spec.method].passes(spec) - 1e-9)  # a quotient is rounded
    training = spec.training.model_copy(update={"epochs": epochs})
    return (replace(spec, name="pgd-at-matched", training=training),)


def controls(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """Controls of the mixture of `dwf`, built from what it trains: no training, only evaluations.

    `joint-<expert>`: each expert as it is in the trained mixture; `joint-uniform`: these experts with equal weights;
    `uniform`: the experts before the joint stage with equal weights.
    """
    *experts, mixture = dwf(settings)

    def control(name: str, method: str, parents: tuple[str, ...], **options: int) -> ModelSpec:
        return replace(mixture, name=name, method=method, options=tuple(options.items()), parents=parents, own_rates=())

    joint = [
        control(f"joint-{expert.name}", "expert", (mixture.name,), number=number)
        for number, expert in enumerate(experts)
    ]
    return (
        control("uniform", "uniform", mixture.parents),
        *joint,
        control("joint-uniform", "uniform", tuple(spec.name for spec in joint)),
    )


def advmoe(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """ADVMoE: one network of routed filters; its router has a learning rate of its own.

    Raises:
        ValueError: if the backbone is not ResNet-18, the only one whose routed form is known.
    """
    spec = single("advmoe", "advmoe", settings)
    if spec.backbone != "resnet18":
        raise ValueError(f"model.backbone: {spec.backbone!r} cannot be used with advmoe: allowed is resnet18")
    own = settings.advmoe
    return (replace(spec, own_rates=(("gate", own.router_learning_rate, own.router_weight_decay),)),)


def weights(entry: Given) -> ModelSpec:
    """A network with the user's weights. Its training is one epoch without steps."""
    options = entry.model_dump(include={"file", "sha256", "mean", "std", "accuracy"})
    training = Training(epochs=1)  # whatever the experts' is: experiments share the model
    return ModelSpec(entry.name, entry.backbone, entry.width, "weights", training, tuple(sorted(options.items())))


def given(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """A model of the user's own, which is measured and not trained."""
    return (single("model", "given", settings),)
