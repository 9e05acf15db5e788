"""Figures of the defended model's answers by class: accuracy, and confusion."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.class_tables import MAX_SHOWN, answered, class_accuracies, confusion_matrix
from analysis.drawing import DEFENDED, PALETTE, FigureData, heat_map, new_figure

_COLOURS = (PALETTE[1], DEFENDED)


def class_accuracy(data: FigureData) -> Figure | None:
    """Accuracy of the defended model for each true class, on clean images and in the worst case."""
    columns = answered(data.group, data.predictions)
    if not columns:
        return None
    figure, axes = new_figure(3.0)
    for column, colour, marker in zip(columns, _COLOURS, "os", strict=False):
        rows = class_accuracies(column.answers)
        bars = (100 * rows["std"]).fillna(0)
        axes.errorbar(
            rows.label, 100 * rows["mean"], yerr=bars, label=column.name, color=colour, marker=marker, linestyle="none"
        )
    axes.set(xlabel="true class", ylabel="accuracy (%)", ylim=(-2, 102), title="Accuracy by class")
    if len(rows) <= MAX_SHOWN:
        axes.set_xticks(rows.label)
    figure.legend(loc="outside right center")
    return figure


def confusion(data: FigureData) -> Figure | None:
    """Which class is answered for the images of each class; None if there are too many classes to be read."""
    columns = [(column.name, confusion_matrix(column.answers)) for column in answered(data.group, data.predictions)]
    if not columns or max(len(matrix) for _, matrix in columns) > MAX_SHOWN:
        return None
    figure, panels = new_figure(3.4, 1, len(columns), squeeze=False)
    for axes, (name, matrix) in zip(panels[0], columns, strict=True):
        names = [str(label) for label in range(len(matrix))]
        heat_map(axes, np.round(matrix), names, names, 100)
        axes.set(title=f"Answers (%), {name}", xlabel="predicted class")
    panels[0][0].set_ylabel("true class")
    return figure
