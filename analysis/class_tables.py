"""Tables of the defended model's answers: accuracy by class, confusion, calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.columns import ColumnKey
from analysis.formats import Table, mean_and_std
from analysis.predictions import BINS, Answers, Predictions
from analysis.results import Group
from dwf_cluster.evaluation.merge import wilson

MAX_SHOWN = 20
"""Classes up to which a confusion matrix can be read; of more classes, a table has the least robust ones."""


@dataclass(frozen=True)
class AnsweredColumn:
    """A column whose answers are shown.

    Attributes:
        name: `clean`, `worst_case`, or `pgd_restarts` where the worst case was not stored.
        answers: of the defended model.
    """

    name: str
    answers: Answers


def answered(group: Group, predictions: Predictions) -> list[AnsweredColumn]:
    """The clean images, and the worst case under the primary threat model; those that were measured."""
    threat = group.experiment.threat
    clean = [key for key in predictions.answers if key.attack == "clean"]
    attacked = [key for key in predictions.answers if (key.norm, key.epsilon) == (threat.norm, threat.epsilon)]
    order = ("worst_case", "pgd_restarts")
    attacked.sort(key=lambda key: order.index(key.attack))
    keys: list[ColumnKey] = [*clean[:1], *attacked[:1]]
    return [AnsweredColumn(key.attack, predictions.answers[key]) for key in keys]


def class_accuracies(answers: Answers) -> pd.DataFrame:
    """Accuracy by class.

    Returns:
        One row for each label, rising: `label`, `images` (of one seed, the fewest), `mean`, `std` (sample, over seeds;
        NaN for one), `low`, `high` (95 % Wilson interval of the mean, for the images of one seed), 0..1; `other`, the
        wrong class that is answered most often (-1: none), and `share`, 0..1, of the class's images that it is answered
        for.
    """
    counts = answers.confusion
    by_class = counts.groupby(["seed", "label"]).images.sum()
    correct = counts[counts.label == counts.prediction].groupby(["seed", "label"]).images.sum()
    accuracy = (correct.reindex(by_class.index, fill_value=0) / by_class).groupby("label").agg(["mean", "std"])
    totals = counts.groupby("label").images.sum()
    wrong = counts[counts.label != counts.prediction].groupby(["label", "prediction"]).images.sum()
    rows = []
    smallest = by_class.groupby("label").min()
    for label, images in zip(smallest.index.tolist(), smallest.tolist(), strict=True):
        mean, std = accuracy.loc[label]
        low, high = wilson(round(mean * images), images)
        other, share = -1, 0.0
        if label in wrong.index.get_level_values("label"):
            of_class = wrong.loc[label]
            other, share = int(of_class.idxmax()), float(of_class.max() / totals[label])
        rows.append((label, images, mean, std, low, high, other, share))
    return pd.DataFrame(rows, columns=["label", "images", "mean", "std", "low", "high", "other", "share"])


def confusion_matrix(answers: Answers) -> NDArray[np.float64]:
    """Share of a true class's images (down) that is classified as each class (across), over all seeds, in percent."""
    counts = answers.confusion
    size = 1 + int(max(counts.label.max(), counts.prediction.max()))
    matrix = np.zeros((size, size))
    np.add.at(matrix, (counts.label, counts.prediction), counts.images)
    sums = matrix.sum(1, keepdims=True)
    shares: NDArray[np.float64] = np.divide(100 * matrix, sums, out=np.full_like(matrix, math.nan), where=sums > 0)
    return shares


def calibration(answers: Answers) -> pd.DataFrame | None:
    """Calibration of the top probability, one row a seed; None if it was not stored for every image.

    Returns:
        `images`, `accuracy`, `confidence` (mean top probability), `ece` (expected calibration error: the mean over
        images of |accuracy - confidence| of their bin; Guo et al. 2017, equation 3), `mce` (the largest such gap of a
        bin, equation 4), all but the first 0..1.
    """
    bins = answers.bins[answers.bins[:, :, 0].sum(1) > 0]
    if answers.unrated or not len(bins):
        return None
    images, confidence, correct = (bins[:, :, i] for i in range(3))
    gap = np.abs(correct - confidence)
    totals = images.sum(1)
    return pd.DataFrame(
        {
            "images": totals.astype(int),
            "accuracy": correct.sum(1) / totals,
            "confidence": confidence.sum(1) / totals,
            "ece": gap.sum(1) / totals,
            "mce": np.divide(gap, images, out=np.zeros_like(gap), where=images > 0).max(1),
        }
    )


def class_tables(group: Group, predictions: Predictions) -> tuple[list[Table], list[str]]:
    """Accuracy by class, confusion and calibration of the defended model, and remarks on what could not be made."""
    columns = answered(group, predictions)
    if not columns:
        return [], []
    rated = [(column.name, calibration(column.answers)) for column in columns]
    tables = [_by_class(group, columns), _confusion(group, columns[-1]), _calibration(group, rated)]
    unrated = [name for name, values in rated if values is None]
    remarks = [
        f"Calibration ({', '.join(unrated)}): not shown, because rows of predictions have no confidence: a version "
        "before 0.3 wrote them."
    ]
    return [table for table in tables if table], remarks if unrated else []


def _by_class(group: Group, columns: list[AnsweredColumn]) -> Table:
    frames = [class_accuracies(column.answers).set_index("label") for column in columns]
    last, worst = columns[-1].name, frames[-1]
    shown = worst.sort_values("mean", kind="stable").index[:MAX_SHOWN].sort_values()
    rows = []
    for label in shown:
        # A class may have no image in a column that was measured on a part of the test set.
        cells = [mean_and_std(f.loc[label, "mean"], f.loc[label, "std"]) if label in f.index else "" for f in frames]
        row = worst.loc[label]
        interval = f"[{100 * row.low:.1f}, {100 * row.high:.1f}]"
        other = f"{int(row.other)} ({100 * row.share:.0f} %)" if row.other >= 0 else ""
        rows.append((str(label), [f"{int(row.images)}", *cells, interval, other]))
    spread = worst["mean"]
    notes = [
        f"From {100 * spread.min():.1f} % (class {spread.idxmin()}) to {100 * spread.max():.1f} % (class "
        f"{spread.idxmax()}) under {last}. Interval: 95 % Wilson, for the images of one seed. Last column: the wrong "
        "class that is answered most often, and the share of the class's images that it is answered for."
    ]
    if len(worst) > len(shown):
        notes.append(f"The {len(shown)} least robust of {len(worst)} classes.")
    heads = [("images", ""), *((column.name, "") for column in columns), (last, "interval"), (last, "taken for")]
    title = f"{group.title}: accuracy of the {group.defended} by class, percent"
    return Table(title, heads, rows, notes=notes, corner="class")


def _confusion(group: Group, column: AnsweredColumn) -> Table | None:
    matrix = confusion_matrix(column.answers)
    if len(matrix) > MAX_SHOWN:
        return None
    names = [str(label) for label in range(len(matrix))]
    cells = [["" if math.isnan(value) else f"{value:.1f}" for value in row] for row in matrix]
    return Table(
        f"{group.title}: confusion of the {group.defended}, {column.name}",
        [(name, "") for name in names],
        list(zip(names, cells, strict=True)),
        notes=["Percent of a true class's images (down) that are classified as each class (across), over all seeds."],
        corner="class",
    )


def _calibration(group: Group, rated: list[tuple[str, pd.DataFrame | None]]) -> Table | None:
    rows = []
    for name, values in rated:
        if values is not None:
            cells = [mean_and_std(values[c].mean(), values[c].std()) for c in ("accuracy", "confidence", "ece", "mce")]
            rows.append((name, [str(values["images"].min()), *cells]))
    heads = [("images", ""), ("accuracy", ""), ("confidence", ""), ("ECE", ""), ("MCE", "")]
    note = (
        f"Confidence: mean probability of the predicted class. ECE: expected calibration error over {BINS} bins of "
        "equal width; MCE: the largest gap of a bin (Guo et al. 2017). With few images both are too large."
    )
    title = f"{group.title}: calibration of the {group.defended}, percent"
    return Table(title, heads, rows, notes=[note], corner="images of") if rows else None
