"""The rows of the result table: their groups and their order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dwf_cluster.defences.registry import METHODS, Group, ModelSpec
from dwf_cluster.models.registry import BACKBONES

HEADINGS: Mapping[Group, str] = {
    "plain": "plain networks",
    "adversarial training": "adversarially trained",
    "mixture": "mixtures",
    "control": "controls",
    "user": "given weights",
}
"""Headings of the groups in their order in the table; those of experts come after them."""

PAPER_BACKBONES = (
    "vgg19",
    "resnet18",
    "resnet34",
    "resnet50",
    "densenet121",
    "densenet121-k12",
    "densenet169",
    "googlenet",
    "inception-v3",
    "xception",
    "mobilenet-v2",
)
"""Backbones in the order of the paper's table 3."""

PAPER_METHODS = ("standard", "fgsm", "pgd", "soe", "advmoe", "dwf")
"""Methods in the order of the paper's table 3."""


def rows(specs: Sequence[ModelSpec], baselines: Collection[str] = ()) -> dict[str, tuple[ModelSpec, ...]]:
    """The rows of the result table, in groups.

    A model that another one starts from is an expert, and experts have groups of their own at the end of the table.
    There are two exceptions. The defended model, and one that is a baseline by itself, stay among their like. A plain
    expert whose backbone no other plain row has stands for that row: the benign expert of a mixture is the paper's
    ResNet-18.

    Args:
        specs: every model, the defended one last (`Experiment.models`).
        baselines: names of the baselines of the experiment.

    Returns:
        Heading of each group that has rows, and its rows: those of the paper in its order, then others in the order of
        the registries, the defended model last in its group.
    """
    defended = specs[-1]
    owners: dict[str, str] = {}
    for owner in sorted(specs, key=lambda spec: (spec is not defended, METHODS[spec.method].group == "control")):
        owners = dict.fromkeys(owner.parents, owner.name) | owners
    groups: dict[str, list[ModelSpec]] = {heading: [] for heading in HEADINGS.values()}
    experts: list[ModelSpec] = []
    for spec in specs:
        group = _group(spec, defended)
        is_row = spec is defended or spec.name in baselines or group not in ("plain", "adversarial training")
        if spec.name in owners and not is_row:
            experts.append(spec)
        else:
            groups[HEADINGS[group]].append(spec)
    plain = groups[HEADINGS["plain"]]
    for spec in experts:
        if _group(spec, defended) == "plain" and spec.backbone not in {row.backbone for row in plain}:
            plain.append(spec)
        else:
            groups.setdefault(f"experts of {owners[spec.name]}", []).append(spec)
    return {
        heading: tuple(sorted(group, key=lambda spec: (spec is defended, *_position(spec))))
        for heading, group in groups.items()
        if group
    }


def _group(spec: ModelSpec, defended: ModelSpec) -> Group:
    """The group of its method; a control if only its width differs from the networks of the defended model."""
    group = METHODS[spec.method].group
    is_single = group in ("plain", "adversarial training")
    return "control" if is_single and spec.backbone == defended.backbone and spec.width != defended.width else group


def _position(spec: ModelSpec) -> tuple[int, int]:
    """Place of the method and of the backbone: first the paper's in its order, then others in the registry's."""
    methods, backbones = ([*order, *names] for order, names in ((PAPER_METHODS, METHODS), (PAPER_BACKBONES, BACKBONES)))
    return methods.index(spec.method), backbones.index(spec.backbone)
