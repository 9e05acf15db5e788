"""Tables of what the experts of the defended mixture do, from the suite `experts`."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.columns import ColumnKey, each, key_of_row
from analysis.formats import Table, mean_and_std
from analysis.predictions import Predictions
from analysis.results import Group
from dwf_cluster.evaluation.column import (
    EXPERT_CLEAN,
    EXPERT_DROPPED_CLEAN,
    EXPERT_DROPPED_PGD,
    EXPERT_PGD,
    EXPERT_TRANSFER,
    longest_pgd,
)

_CLEAN = ColumnKey("clean", None, None, None, None)

_ROLES = {
    "clean": EXPERT_CLEAN,
    "pgd": EXPERT_PGD,
    "dropped_clean": EXPERT_DROPPED_CLEAN,
    "dropped_pgd": EXPERT_DROPPED_PGD,
}


def summary(group: Group, measured: pd.DataFrame, predictions: Predictions) -> pd.DataFrame | None:
    """What each expert does; None if the suite `experts` was not run.

    Args:
        group: gives the experts.
        measured: result of `tables.accuracies`.
        predictions: give the gate's weights.

    Returns:
        A row for each expert (the index), 0..1, means over seeds, NaN where nothing was measured: `weight_clean` and
        `weight_pgd`, its mean gate weight on clean images and under the longest PGD; `clean` and `pgd`, its own
        accuracy on clean images and on the images of the mixture's PGD; `dropped_clean` and `dropped_pgd`, accuracy of
        the mixture without it, on clean images and under PGD on what is left. For each of the last four a column
        `<name>_std` (sample, over seeds).
    """
    own = measured[measured.model == group.defended]
    if not (own.attack == EXPERT_CLEAN).any():
        return None
    cells = {(row.attack, row.source): row for row in each(own)}
    frame = pd.DataFrame(index=pd.Index(group.experts))
    for name, key in (("weight_clean", _CLEAN), ("weight_pgd", _pgd_key(group))):
        sums = predictions.gates[key].sum() if key in predictions.gates else None
        frame[name] = [math.nan if sums is None else sums[expert] / sums.examples for expert in group.experts]
    for name, attack in _ROLES.items():
        rows = [cells.get((attack, expert)) for expert in group.experts]
        frame[name] = [math.nan if row is None else row.mean for row in rows]
        frame[f"{name}_std"] = [math.nan if row is None else row.std for row in rows]
    return frame


def transfer_matrix(group: Group, measured: pd.DataFrame) -> NDArray[np.float64]:
    """Accuracy (0..1) of each expert (down) on PGD images made on each expert (across); NaN if not measured."""
    own = measured[measured.model == group.defended]
    cells = {(row.attack, row.source): row.mean for row in each(own)}
    return np.array(
        [[cells.get((EXPERT_TRANSFER + name, source), math.nan) for source in group.experts] for name in group.experts]
    )


def error_correlation(
    group: Group, measured: pd.DataFrame, predictions: Predictions, attack: str
) -> NDArray[np.float64]:
    """Correlation, -1..1, of the experts' errors over images (phi coefficient), the mean over seeds.

    Args:
        group: gives the experts.
        measured: result of `tables.accuracies`.
        predictions: what each expert classifies correctly.
        attack: `EXPERT_CLEAN` or `EXPERT_PGD`.

    Returns:
        Shape (experts, experts); NaN where an expert has no error or only errors, or was not measured.
    """
    own = measured[(measured.model == group.defended) & (measured.attack == attack)]
    keys = {row.source: key_of_row(row) for row in each(own)}
    correct = [
        predictions.correct.get((group.defended, keys[name])) if name in keys else None for name in group.experts
    ]
    count = len(group.experts)
    if any(array is None for array in correct):
        return np.full((count, count), math.nan)
    matrices = []
    for seed in range(len(group.runs)):
        errors = np.stack([array[seed] for array in correct if array is not None])
        errors = errors[:, (errors >= 0).all(0)].astype(np.float64)
        if errors.shape[1] > 1:
            with np.errstate(invalid="ignore", divide="ignore"):
                matrices.append(np.corrcoef(errors).reshape(count, count))
    mean: NDArray[np.float64] = np.mean(matrices, axis=0) if matrices else np.full((count, count), math.nan)
    return mean


def expert_tables(group: Group, measured: pd.DataFrame, predictions: Predictions) -> list[Table]:
    """The experts one by one, transfer between them, and the correlation of their errors; empty if not measured."""
    frame = summary(group, measured, predictions)
    if frame is None:
        return []
    return [
        _summary_table(group, measured, frame),
        _transfer_table(group, measured),
        _correlation_table(group, measured, predictions),
    ]


def _summary_table(group: Group, measured: pd.DataFrame, frame: pd.DataFrame) -> Table:
    own = measured[measured.model == group.defended]
    steps = longest_pgd(group.experiment.evaluation)
    whole = {key_of_row(row): row for row in each(own)}
    rows = [
        (
            str(name),
            [
                mean_and_std(row["weight_clean"]),
                mean_and_std(row["weight_pgd"]),
                *(mean_and_std(row[role], row[f"{role}_std"]) for role in _ROLES),
            ],
        )
        for name, row in frame.iterrows()
    ]
    complete = [whole.get(key) for key in (_CLEAN, _pgd_key(group))]
    cells = ["" if row is None else mean_and_std(row.mean, row.std) for row in complete]
    rows.append((f"whole {group.defended}", ["", "", *cells, *cells]))
    heads = [
        ("gate weight", "clean"),
        ("gate weight", f"pgd {steps}"),
        ("alone", "clean"),
        ("alone", f"pgd {steps}"),
        ("without it", "clean"),
        ("without it", f"pgd {steps}"),
    ]
    note = (
        f"Alone, pgd {steps}: the expert's own accuracy on the images of PGD on the whole {group.defended}. Without "
        "it: the gate's other weights are scaled to a sum of 1, and PGD is made on what is left, so it is no transfer."
    )
    title = f"{group.title}: experts of the {group.defended}, percent"
    return Table(title, heads, rows, notes=[note], lines=frozenset({len(frame)}), corner="expert")


def _transfer_table(group: Group, measured: pd.DataFrame) -> Table:
    matrix = transfer_matrix(group, measured)
    other = matrix[~np.eye(len(matrix), dtype=bool)]
    note = (
        f"PGD-{longest_pgd(group.experiment.evaluation)} on the expert across, tested on the expert down. "
        f"Mean {mean_and_std(np.diag(matrix).mean())} % on an expert's own images, "
        + (f"{mean_and_std(other.mean())} % on those of another." if len(other) else "there is no other.")
    )
    return Table(
        f"{group.title}: transfer between the experts of the {group.defended}, accuracy in percent",
        [("made on", name) for name in group.experts],
        [(name, [mean_and_std(value) for value in row]) for name, row in zip(group.experts, matrix, strict=True)],
        notes=[note],
        corner="tested on",
    )


def _correlation_table(group: Group, measured: pd.DataFrame, predictions: Predictions) -> Table:
    attacked = error_correlation(group, measured, predictions, EXPERT_PGD)
    clean = error_correlation(group, measured, predictions, EXPERT_CLEAN)
    others = ~np.eye(len(attacked), dtype=bool)
    means = [np.nanmean(m[others]) if np.isfinite(m[others]).any() else math.nan for m in (attacked, clean)]
    shown = ["not defined" if math.isnan(mean) else f"{mean:.2f}" for mean in means]
    note = (
        f"Phi coefficient over images, mean over seeds; 1: the experts fail on the same images. Mean over pairs: "
        f"{shown[0]} on these images, {shown[1]} on clean ones. Blank: an expert without errors, or with nothing else."
    )
    return Table(
        f"{group.title}: correlation of the experts' errors on the images of PGD on the {group.defended}",
        [(name, "") for name in group.experts],
        [
            (name, ["" if math.isnan(value) else f"{value:.2f}" for value in row])
            for name, row in zip(group.experts, attacked, strict=True)
        ],
        notes=[note],
        corner="expert",
    )


def _pgd_key(group: Group) -> ColumnKey:
    threat = group.experiment.threat
    return ColumnKey("pgd", None, threat.norm, threat.epsilon, longest_pgd(group.experiment.evaluation))
