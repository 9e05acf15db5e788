"""The rows of the result table: their groups and their order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dwf_cluster.defences.registry import METHODS, Group, ModelSpec

HEADINGS: Mapping[Group, str] = {
    "plain": "plain networks",
    "adversarial training": "adversarially trained",
    "mixture": "mixtures",
    "control": "controls",
    "given": "given weights",
}
"""Headings of the groups in their order in the table; those of experts come after them."""

PAPER_ORDER = (
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


def rows(specs: Sequence[ModelSpec], baselines: Collection[str] = ()) -> dict[str, tuple[ModelSpec, ...]]:
    """The rows of the result table, in groups.

    A model that another one starts from is an expert, and experts have groups of their own at the end of the table.
    There are two exceptions. One that is a baseline by itself stays among its like. A plain expert whose backbone no
    other plain row has stands for that row: the benign expert of a mixture is the paper's ResNet-18.

    Args:
        specs: every model, the defended one last (`Experiment.models`).
        baselines: names of the baselines of the experiment.

    Returns:
        Heading of each group that has rows, and its rows: plain networks in the paper's order, other models in the
        order of `METHODS`, the defended model last in its group.
    """
    defended = specs[-1]
    owners: dict[str, str] = {}
    for owner in sorted(specs, key=lambda spec: (spec is not defended, METHODS[spec.method].group == "control")):
        owners = dict.fromkeys(owner.parents, owner.name) | owners
    groups: dict[str, list[ModelSpec]] = {heading: [] for heading in HEADINGS.values()}
    experts: list[ModelSpec] = []
    for spec in specs:
        group = _group(spec, defended)
        if spec.name in owners and group in ("plain", "adversarial training") and spec.name not in baselines:
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
    if not spec.parents and spec.backbone == defended.backbone and spec.width != defended.width:
        return "control"
    return METHODS[spec.method].group


def _position(spec: ModelSpec) -> tuple[int, int]:
    is_known = spec.backbone in PAPER_ORDER
    return list(METHODS).index(spec.method), PAPER_ORDER.index(spec.backbone) if is_known else len(PAPER_ORDER)
