"""The recipes of the defences in `registry.DEFENCES`: from settings to ModelSpecs, the defended model last."""

from __future__ import annotations

from dwf_cluster.defences.registry import METHODS, DefenceSettings, ModelSpec, single


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
    """FGSM-AT: half of each batch is attacked, at PGD's epsilon (our assumption)."""
    return (single("fgsm-at", "fgsm", settings, epsilons=(settings.pgd.epsilon,), fraction=0.5),)


def pgd_at(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """PGD-AT: half of each batch is attacked, by ten iterations."""
    return (single("pgd-at", "pgd", settings, steps=(10,), fraction=0.5),)


def given(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    """A model of the user's own, which is measured and not trained."""
    return (single("model", "given", settings),)
