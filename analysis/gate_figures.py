"""Figures of the defended model's gate: the mean weight of each expert by attack and by class."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.columns import column_key, column_name
from analysis.drawing import PALETTE, FigureData, heat_map, new_figure
from dwf_cluster.evaluation.registry import Column


def gate_by_attack(data: FigureData) -> Figure | None:
    """Mean weight of each expert over images and seeds in each column, and the mean entropy of the weights."""
    columns = _columns(data)
    if not columns:
        return None
    sums = pd.DataFrame([data.predictions.gates[column_key(column)].sum() for column in columns])
    means = sums.div(sums.examples, axis=0)
    experts = list(data.group.experts)
    figure, (weights, entropy) = new_figure(0.22 * len(columns) + 1.2, 1, 2, sharey=True, width_ratios=[3, 1])
    heat_map(weights, 100 * means[experts].to_numpy(), [column_name(column) for column in columns], experts)
    weights.set_title("Mean gate weight (%)")
    entropy.barh(range(len(columns)), means.entropy, color=PALETTE[1], height=0.7)
    entropy.axvline(np.log2(len(experts)), color="black", linestyle="--", linewidth=0.8)
    entropy.set(title="Mean entropy (bits)", xlim=(0, 1.08 * np.log2(max(len(experts), 2))))
    entropy.set_xlabel("dashed: equal weights")
    entropy.tick_params(labelleft=False, left=False)
    entropy.grid(visible=False, axis="y")
    return figure


def gate_by_class(data: FigureData) -> Figure | None:
    """Mean weight of each expert for each true class: on clean images, and under the longest PGD of the columns."""
    columns = _columns(data)
    shown = [column for column in columns if column.attack == "clean"]
    epsilon = data.group.experiment.threat.epsilon
    attacked = (column for column in columns if column.attack == "pgd" and column.epsilon == epsilon)
    shown += sorted(attacked, key=lambda column: column.steps or 0)[-1:]
    if not shown:
        return None
    experts = list(data.group.experts)
    sums = [data.predictions.gates[column_key(column)] for column in shown]
    weights = [100 * frame[experts].div(frame.examples, axis=0) for frame in sums]
    top = max(float(frame.to_numpy().max()) for frame in weights)
    figure, panels = new_figure(0.22 * len(weights[0]) + 1.3, 1, len(shown), squeeze=False, sharey=True)
    for axes, column, frame in zip(panels[0], shown, weights, strict=True):
        heat_map(axes, frame.to_numpy(), [str(label) for label in frame.index], experts, top)
        axes.set_title(f"Mean gate weight (%), {column_name(column)}")
    panels[0][0].set_ylabel("true class")
    return figure


def _columns(data: FigureData) -> list[Column]:
    return [column for column in data.group.columns if column_key(column) in data.predictions.gates]
