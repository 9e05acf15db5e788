"""The paper's own table 3, and which of its cells are comparable with ours."""

from __future__ import annotations

import functools
from importlib.resources import files

import pandas as pd

from analysis.columns import ColumnKey, column_key, each
from analysis.results import Group, kind
from dwf_cluster.defences.registry import recipe
from dwf_cluster.experiment import Experiment
from dwf_cluster.settings import printable

DATASETS = {"cifar10": "CIFAR-10", "svhn": "SVHN"}
"""Our data sets that the paper has too, and its names for them."""

DWF = "DWF"
"""The paper's name for its defence."""

RECIPES = {"standard": "ResNet-18", "fgsm-at": "ResNet-18 (FGSM-AT)", "pgd-at": "ResNet-18 (PGD-AT)", "dwf": DWF}
"""Methods and defences that the paper has measured, and its names for the models that they make."""

_DEFENDED = r"-AT\)|SoE|ADVMoE|DWF"
_BACKBONE, _RESTARTS, _EOT = "resnet18", 3, 1


@functools.cache
def cells() -> pd.DataFrame:
    """Every cell: dataset, model, attack, parameter, value, accuracy_percent, std_percent."""
    with files("analysis").joinpath("paper_table3.csv").open() as file:
        return pd.read_csv(file)


def names(experiment: Experiment) -> dict[str, str]:
    """The models of an experiment that the paper has too, found by how they are trained, and its names for them."""
    paper_names = {kind(recipe(name, experiment)[-1]): paper_name for name, paper_name in RECIPES.items()}
    specs = [spec for spec in experiment.models if spec.backbone == _BACKBONE]
    return {spec.name: paper_names[kind(spec)] for spec in specs if kind(spec) in paper_names}


def published(group: Group) -> dict[tuple[str, ColumnKey], tuple[float, float]]:
    """Mean and standard deviation (0..1) of the paper's cells with a data set, model, attack and strength of ours."""
    rows = cells()[cells().dataset == DATASETS.get(group.experiment.data.source)]
    by_cell = {(row.model, row.attack, row.value): row for row in each(rows.fillna({"value": 0}))}
    comparable = {}
    for model, name in names(group.experiment).items():
        for column in group.paper_columns:
            if (column.restarts or _RESTARTS) != _RESTARTS or (column.eot or _EOT) != _EOT:
                continue
            value = {"clean": 0, "fgsm": column.epsilon}.get(column.attack, column.steps)
            if row := by_cell.get((name, column.attack, value)):
                comparable[model, column_key(column)] = (row.accuracy_percent / 100, row.std_percent / 100)
    return comparable


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
