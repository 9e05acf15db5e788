"""Reliability diagrams: accuracy against confidence, clean and under attack."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.class_tables import answered, calibration
from analysis.drawing import DEFENDED, FigureData, new_figure
from analysis.predictions import BINS


def reliability(data: FigureData) -> Figure | None:
    """Accuracy of the defended model in each bin of its top probability, over all seeds; on the diagonal if calibrated.

    None if the top probability was not stored for every image.
    """
    columns = [(c, calibration(c.answers)) for c in answered(data.group, data.predictions)]
    shown = [(column, values) for column, values in columns if values is not None]
    if not shown:
        return None
    figure, panels = new_figure(3.0, 1, len(shown), squeeze=False, sharey=True)
    left = np.arange(BINS) / BINS
    for axes, (column, values) in zip(panels[0], shown, strict=True):
        images, _, correct = column.answers.bins.sum(0).T
        used = images > 0
        accuracy = 100 * correct[used] / images[used]
        axes.bar(left[used], accuracy, 1 / BINS, align="edge", color=DEFENDED, edgecolor="white", label="accuracy")
        share = 100 * images / images.sum()
        axes.step([*left, 1], [*share, share[-1]], where="post", color="black", linewidth=0.8, label="share of images")
        axes.plot([0, 1], [0, 100], color="black", linestyle="--", linewidth=0.8, label="calibrated")
        axes.set(
            xlim=(0, 1),
            ylim=(0, 102),
            xlabel="probability of the predicted class",
            title=f"{column.name}: ECE {100 * values.ece.mean():.1f} %",
        )
    panels[0][0].set_ylabel("percent")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure
