"""The paper's own table 3, and which of its cells are comparable with ours."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib.resources import files

import pandas as pd

from analysis.columns import ColumnKey, column_key, each
from analysis.results import Group, kind
from dwf_cluster.defences.registry import ModelSpec, recipe, recipe_names
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.registry import BACKBONES
from dwf_cluster.settings import printable

DATASETS = {"cifar10": "CIFAR-10", "svhn": "SVHN"}
"""Our data sets that the paper has too, and its names for them."""

DWF = "DWF"
"""The paper's name for its defence."""

RECIPES = {
    "vgg19": "VGG-19",
    "resnet18": "ResNet-18",
    "standard": "ResNet-18",
    "fgsm-at": "ResNet-18 (FGSM-AT)",
    "pgd-at": "ResNet-18 (PGD-AT)",
    "resnet34": "ResNet-34",
    "resnet50": "ResNet-50",
    "densenet121-k12": "DenseNet-121",
    "densenet121": "DenseNet-121",
    "densenet169": "DenseNet-169",
    "googlenet": "GoogLeNet",
    "inception-v3": "Inception-V3",
    "xception": "Xception",
    "mobilenet-v2": "MobileNet-V2",
    "soe": "SoE",
    "advmoe": "ADVMoE",
    "dwf": DWF,
}
"""Recipes whose models the paper has measured, and its names for them; `defences.rows` has their order in tables. Of
two with one name, the first that the experiment has is the paper's: its DenseNet-121 has growth 12 (inferred from the
checkpoints that it cites, not checked), and a plain ResNet-18 comes before a benign expert."""

_DEFENDED = r"-AT\)|SoE|ADVMoE|DWF"
_BACKBONE, _RESTARTS, _EOT = "resnet18", 3, 1


@functools.cache
def cells() -> pd.DataFrame:
    """Every cell: dataset, model, attack, parameter, value, accuracy_percent, std_percent."""
    with files("analysis").joinpath("paper_table3.csv").open() as file:
        return pd.read_csv(file)


def names(experiment: Experiment) -> dict[str, str]:
    """The models of an experiment that the paper has too, found by how they are trained, and its names for them."""
    parents = {parent for spec in experiment.models for parent in spec.parents}
    specs = sorted(experiment.models, key=lambda spec: spec.name in parents)  # of a kind, experts come last
    found: dict[str, str] = {}  # by the paper's name
    for name, paper_name in RECIPES.items():
        if paper_name in found or name not in recipe_names():
            continue
        wanted = recipe(name, experiment)[-1]
        backbone = name if name in BACKBONES else _BACKBONE
        alike = (spec for spec in specs if kind(spec) == kind(wanted) and _backbones(spec, experiment) == {backbone})
        if model := next((spec.name for spec in alike), None):
            found[paper_name] = model
    return {model: paper_name for paper_name, model in found.items()}


def _backbones(spec: ModelSpec, experiment: Experiment) -> set[str]:
    """The backbones of a model and of those that it starts from."""
    return {spec.backbone, *(experiment.spec(parent).backbone for parent in spec.parents)}


def legend(names: Mapping[str, str], model: str) -> str:
    """A model's name in a legend: the paper's, with ours in brackets where it says something else.

    Args:
        names: of `names(experiment)`.
        model: our name.
    """
    name = names.get(model, model)
    ours, theirs = (re.sub("[^a-z0-9]", "", text.lower()) for text in (model, name))
    return name if ours in theirs else f"{name} ({model})"


def published(group: Group) -> dict[tuple[str, ColumnKey], tuple[float, float]]:
    """Mean and standard deviation (0..1) of the paper's cells with a data set, model, attack and strength of ours."""
    comparable = {}
    for model, by_attack in cells_of_models(group).items():
        for column in group.paper_columns:
            if (column.restarts or _RESTARTS) != _RESTARTS or (column.eot or _EOT) != _EOT:
                continue
            value = {"clean": 0, "fgsm": column.epsilon}.get(column.attack, column.steps)
            if cell := by_attack.get((column.attack, value or 0)):
                comparable[model, column_key(column)] = cell
    return comparable


def cells_of_models(group: Group) -> dict[str, dict[tuple[str, float], tuple[float, float]]]:
    """The paper's cells of each model that it has too: by attack and epsilon (FGSM), iterations (PGD) or 0 (clean)."""
    rows = cells()[cells().dataset == DATASETS.get(group.experiment.data.source)]
    by_name: dict[str, dict[tuple[str, float], tuple[float, float]]] = {}
    for row in each(rows.fillna({"value": 0})):
        cell = row.accuracy_percent / 100, row.std_percent / 100
        by_name.setdefault(row.model, {})[row.attack, row.value] = cell
    return {model: by_name[name] for model, name in names(group.experiment).items() if name in by_name}


def pgd_warning(group: Group) -> str:
    """Why the paper's PGD columns are not comparable with ours."""
    rows = cells()[(cells().dataset == DATASETS[group.experiment.data.source]) & (cells().attack == "pgd")]
    plain = rows[~rows.model.str.contains(_DEFENDED)].accuracy_percent
    threat = group.experiment.threat
    return (
        f"Warning: do not compare the PGD columns (pgd, restarts, adaptive) with the paper's. Its undefended networks "
        f"keep {plain.min():.0f} to {plain.max():.0f} % accuracy under its PGD; in pixel space at 8/255 they keep "
        f"about 0 %, so the paper uses another epsilon, or measures it in another space. No difference is shown. "
        f"Ours is {threat.norm}, epsilon {threat.epsilon:.4g}, step size {threat.step_size:.4g}, in pixels of [0, 1]."
    )


def why_not_compared(group: Group) -> str:
    """Why there is no table of our cells and the paper's."""
    if group.experiment.data.source not in DATASETS:
        return f"The paper has no figures for {printable(group.experiment.data.source)}."
    return "The paper has no cell for these models and strengths."
