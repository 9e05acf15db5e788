"""The accuracy of every model in every column over all seeds, and what every table makes of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from analysis import paper
from analysis.columns import CELL_FIELDS, ColumnKey, column_key, column_name, each, key_of_row
from analysis.formats import mean_and_std
from analysis.results import Group
from dwf_cluster.evaluation.merge import wilson
from dwf_cluster.evaluation.registry import Column

_NO_CELL = (math.nan, math.nan)


def accuracies(group: Group) -> pd.DataFrame:
    """The accuracy of every model in every column, from the `evaluations` of all seeds.

    Returns:
        One row for each model and column that was measured with any seed, models in the order of `Group.models` and
        columns in that of the result table (curves and `transfer` last): `model`, `attack`, `source`, `epsilon`,
        `steps`, `title` (of the column), `seeds` (number measured), `mean`, `std` (sample, over seeds; NaN for one),
        `low`, `high` (95 % Wilson interval of the mean, for the number of images of one seed), all 0..1, `examples`,
        `paper`, `paper_std` (0..1, NaN where the paper has no such cell), and `fgsm_epsilon`: of PGD, the epsilon at
        which FGSM leaves the same accuracy (NaN if none does, and for other attacks).
    """
    measured: dict[tuple[str, ColumnKey], list[tuple[float, int]]] = {}
    for row in each(group.frame("evaluations", [*CELL_FIELDS, "accuracy", "examples"])):
        measured.setdefault((row.model, key_of_row(row)), []).append((row.accuracy, row.examples))
    titles = {column_key(column): column_name(column) for column in (*group.columns, *group.curve_columns)}
    several = len(group.experiment.threats) > 1
    transfers = {
        key: f"{key.attack} {key.source}{f' @{key.epsilon:.4g}' if several else ''}"
        for _, key in measured
        if key not in titles
    }
    published = paper.published(group)
    rows = []
    for model in group.models:
        for key, title in (titles | transfers).items():
            if cell := measured.get((model, key)):
                values, examples = [accuracy for accuracy, _ in cell], min(count for _, count in cell)
                mean, std = fmean(values), stdev(values) if len(values) > 1 else math.nan
                interval = wilson(round(mean * examples), examples)
                paper_cell = published.get((model, key), _NO_CELL)
                rows.append((model, *key, title, len(values), mean, std, *interval, examples, *paper_cell))
    names = [*CELL_FIELDS, "title", "seeds", "mean", "std", "low", "high", "examples", "paper", "paper_std"]
    frame = pd.DataFrame(rows, columns=names)
    return frame.assign(fgsm_epsilon=_fgsm_epsilons(frame))


def _fgsm_epsilons(frame: pd.DataFrame) -> list[float]:
    """`equivalent_epsilon` of each row of PGD, for the curve of its model under FGSM in the same norm; else NaN."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in each(frame[frame.attack == "fgsm"]):
        curves.setdefault(row.model, {}).setdefault(row.norm, []).append((row.epsilon, row.mean))
    clean = {row.model: row.mean for row in each(frame[frame.attack == "clean"])}
    equivalents = []
    for row in each(frame):
        curve = curves.get(row.model, {}).get(row.norm, []) if is_pgd(row.attack) and row.model in clean else []
        equivalents.append(equivalent_epsilon([(0.0, clean[row.model]), *curve], row.mean) if curve else math.nan)
    return equivalents


def is_pgd(attack: str) -> bool:
    """Whether an attack is PGD in one of the paper's columns."""
    return attack in ("pgd", "pgd_restarts", "pgd_adaptive")


def equivalent_epsilon(curve: Sequence[tuple[float, float]], accuracy: float) -> float:
    """The epsilon at which FGSM first leaves an accuracy: where its curve, linear between its points, falls to it.

    Args:
        curve: epsilon and accuracy under FGSM, with that on clean images at epsilon 0.
        accuracy: under another attack.

    Returns:
        An epsilon within the curve; NaN if the curve is below the accuracy everywhere, or above it.
    """
    for (left, above), (right, below) in itertools.pairwise(sorted(curve)):
        if above >= accuracy >= below:
            return left + (right - left) * ((above - accuracy) / (above - below) if above > below else 0.0)
    return math.nan


def percent(row: Any) -> str:
    """A row of `accuracies` as `97.5 ± 0.4`; blank for None."""
    return "" if row is None else mean_and_std(row.mean, row.std)


def cells_of(measured: pd.DataFrame) -> dict[tuple[str, ColumnKey], Any]:
    """The rows of `accuracies`, by model and column."""
    return {(row.model, key_of_row(row)): row for row in each(measured)}


def head(column: Column) -> tuple[str, str]:
    """The two lines of a column's heading."""
    above, below = column.title.split("\n")
    return above, below
