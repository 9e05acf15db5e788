"""Figures of what the experts of the defended mixture do, from the suite `experts`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.columns import each
from analysis.drawing import DEFENDED, PALETTE, FigureData, heat_map, new_figure
from analysis.expert_tables import error_correlation, summary, transfer_matrix
from dwf_cluster.evaluation.column import EXPERT_PGD, longest_pgd

_CONDITIONS = (("clean", "clean", PALETTE[1], "o"), ("pgd", "PGD", DEFENDED, "s"))


def expert_transfer(data: FigureData) -> Figure | None:
    """Accuracy of each expert on the PGD images made on each expert, and the correlation of their errors."""
    if summary(data.group, data.measured, data.predictions) is None:
        return None
    experts = data.group.experts
    figure, (left, right) = new_figure(0.22 * len(experts) + 2.2, 1, 2, sharey=True)
    heat_map(left, 100 * transfer_matrix(data.group, data.measured), experts, experts, 100)
    left.set(title="Accuracy (%) on an expert's PGD", xlabel="made on", ylabel="tested on")
    correlation = 100 * error_correlation(data.group, data.measured, data.predictions, EXPERT_PGD)
    heat_map(right, correlation, experts, experts, 100)
    right.set(title="Correlation of errors (%)", xlabel="under PGD on the whole model")
    return figure


def gate_and_accuracy(data: FigureData) -> Figure | None:
    """Mean gate weight of each expert against its own accuracy, on clean images and under the mixture's PGD."""
    frame = summary(data.group, data.measured, data.predictions)
    if frame is None or frame[["weight_clean", "weight_pgd"]].isna().any(axis=None):
        return None
    figure, axes = new_figure(3.0)
    for name, label, colour, marker in _CONDITIONS:
        x, y = 100 * frame[name], 100 * frame[f"weight_{name}"]
        axes.plot(x, y, label=label, color=colour, marker=marker, linestyle="none")
        for expert in frame.index:
            axes.annotate(expert, (x[expert], y[expert]), (3, 3), textcoords="offset points", fontsize=6)
    axes.axhline(100 / len(frame), color="black", linestyle="--", linewidth=0.8, label="equal weights")
    axes.set(
        xlabel="expert's own accuracy (%)",
        ylabel="mean gate weight (%)",
        xlim=(-2, 102),
        title="Does the gate trust the experts that are right?",
    )
    figure.legend(loc="outside right center")
    return figure


def dropped_expert(data: FigureData) -> Figure | None:
    """Accuracy of the mixture without each expert, beside that of the whole mixture."""
    frame = summary(data.group, data.measured, data.predictions)
    if frame is None or frame.dropped_clean.isna().all():
        return None
    steps = longest_pgd(data.group.experiment.evaluation)
    own = data.measured[(data.measured.model == data.group.defended) & data.measured.attack.isin(["clean", "pgd"])]
    whole = {row.attack: row for row in each(data.primary(own)) if row.attack == "clean" or row.steps == steps}
    figure, axes = new_figure(0.2 * len(frame) + 1.4)
    positions = np.arange(len(frame))
    for name, label, colour, marker in _CONDITIONS:
        bars = (100 * frame[f"dropped_{name}_std"]).fillna(0)
        style = {"color": colour, "marker": marker, "linestyle": "none"}
        axes.errorbar(100 * frame[f"dropped_{name}"], positions, xerr=bars, label=f"without it, {label}", **style)
        if name in whole:
            axes.axvline(100 * whole[name].mean, color=colour, linewidth=0.8, label=f"whole model, {label}")
    axes.set_yticks(positions, frame.index)
    axes.invert_yaxis()
    title = f"Mixture without an expert (PGD-{steps})"
    axes.set(xlabel="accuracy (%)", ylabel="without expert", xlim=(-2, 102), title=title)
    figure.legend(loc="outside right center")
    return figure
