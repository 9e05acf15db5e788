"""Figures of accuracies: over the strength of an attack, between models, and from one model to another."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import paper
from analysis.columns import column_key, column_name, each, key_of_row
from analysis.drawing import FigureData, add_legend, heat_map, new_figure, point, with_legend

_IN_ONE_PANEL = 9
"""The most curves of a panel that holds those of all models."""

_LABELLED = 6
"""The most values of a panel's axis that are all labelled."""

_LARGE_MATRIX = 20
"""The most models of a matrix whose cells are large."""


def fgsm(data: FigureData) -> Figure | None:
    """Accuracy over FGSM's epsilon, with clean images at 0; the paper's figure 6."""
    rows = data.measured[data.measured.attack.isin(["clean", "fgsm"])]
    rows = rows.assign(x=rows.epsilon.astype(float).fillna(0))
    return _curves(data, rows, "FGSM epsilon (pixels in [0, 1])", "FGSM", with_paper=True)


def pgd(data: FigureData) -> Figure | None:
    """Accuracy over PGD's iterations; the paper's figure 7, without its values: its PGD has another bound."""
    rows = data.primary(data.measured[data.measured.attack == "pgd"])
    epsilon = data.group.experiment.threat.epsilon
    rows = rows.assign(x=rows.steps.astype(float))
    return _curves(data, rows, f"PGD iterations, epsilon {epsilon:.3g}", "PGD", with_paper=False)


def _curves(data: FigureData, rows: pd.DataFrame, x_label: str, attack: str, with_paper: bool) -> Figure | None:
    """A curve for each model: in one panel if there are few, else in one for each group of rows of the table."""
    if rows.empty:
        return None
    curves, defended = dict(data.by_model(rows.sort_values("x"))), data.group.defended
    sections = {heading: [m for m in models if m in curves] for heading, models in data.group.sections.items()}
    if len(curves) <= _IN_ONE_PANEL:
        figure, axes = new_figure(3.4)
        _draw_curves(axes, data, curves, with_paper)
        axes.set(xlabel=x_label, ylabel="accuracy (%)", title=f"Accuracy under {attack}", xticks=sorted(set(rows.x)))
        figure.legend(loc="outside right center")
        return figure
    shown = {heading: models for heading, models in sections.items() if models}
    lines = -(-len(shown) // 2)
    figure, panels = new_figure(3.3 * lines, lines, 2, squeeze=False)
    for axes, (heading, models) in zip(panels.flat, shown.items(), strict=False):
        members = [*models, *([defended] if defended in curves and defended not in models else [])]
        _draw_curves(axes, data, {model: curves[model] for model in members}, with_paper)
        every_other = sorted(set(rows.x))[:: 2 if rows.x.nunique() > _LABELLED else 1]
        axes.set(xlabel=x_label, ylabel="accuracy (%)", title=f"{attack}: {heading}", xticks=every_other)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=6.5)
    for axes in panels.flat[len(shown) :]:
        axes.remove()
    return figure


def _draw_curves(axes: Axes, data: FigureData, curves: Mapping[str, pd.DataFrame], with_paper: bool) -> None:
    """Curves of accuracy over column `x`, with the paper's of the defended model."""
    names = paper.names(data.group.experiment)
    for model, cells in curves.items():
        style = data.styles[model]
        axes.plot(cells.x, 100 * cells["mean"], label=paper.legend(names, model), **style)
        if cells["std"].notna().any():
            low, high = cells["mean"] - cells["std"], cells["mean"] + cells["std"]
            axes.fill_between(cells.x, 100 * low, 100 * high, color=style["color"], alpha=0.15, linewidth=0)
        if with_paper and model == data.group.defended and cells.paper.notna().any():
            label = f"paper's {names[model]}"
            axes.plot(cells.x, 100 * cells.paper, label=label, color="#444444", linestyle=":", zorder=4)
    axes.set_ylim(-2, 102)


def experts_and_mixture(data: FigureData) -> Figure | None:
    """Accuracy of the defended model and of each of its experts, in each column of the paper's table."""
    group = data.group
    rows = data.measured[data.measured.model.isin([*group.experts, group.defended])]
    if not rows.model.isin(group.experts).any():  # none, or none that is a model of its own
        return None
    measured = set(rows.attack[rows.model == group.defended])
    columns = [column for column in group.paper_columns if column.attack in measured]
    if not columns:
        return None
    positions = {column_key(column): i for i, column in enumerate(columns)}
    figure, axes = new_figure(3.2)
    for model, cells in data.by_model(rows):
        points = [(positions[key], 100 * row.mean) for row in each(cells) if (key := key_of_row(row)) in positions]
        if points:
            x, y = zip(*points, strict=True)
            style = data.styles[model] | {"linestyle": "none"}
            axes.plot(x, y, label=model, alpha=1 if model == group.defended else 0.8, **style)
    title = f"Each expert and the {group.defended}"
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-2, 102), ylabel="accuracy (%)", title=title)
    names = [column_name(column) for column in columns]
    axes.set_xticks(range(len(columns)), names, rotation=60, ha="right", rotation_mode="anchor")
    figure.legend(loc="outside right center")
    return figure


def clean_and_robust(data: FigureData) -> Figure | None:
    """Accuracy on clean images against accuracy under PGD with restarts."""
    clean, robust = data.by_attack("clean"), data.by_attack("pgd_restarts")
    models = [model for model in data.group.models if model in clean and model in robust]
    if not models:
        return None
    figure, axes = new_figure(with_legend(3.4, len(models)))
    for model in models:
        x = (100 * clean[model].mean, 100 * clean[model].std)
        point(axes, model, x, robust[model], data.styles[model])
    axes.set(
        xlabel="clean accuracy (%)", ylabel="accuracy under PGD, restarts (%)", title="Clean against robust accuracy"
    )
    add_legend(figure, axes)
    return figure


def transfer(data: FigureData) -> Figure | None:
    """Accuracy of each model on PGD images made on each other model; on its own ones on the diagonal."""
    rows = data.primary(data.measured[data.measured.attack == "transfer"])
    if rows.empty:
        return None
    models = [model for model in data.group.models if model in {*rows.model, *rows.source}]
    matrix = np.full((len(models), len(models)), np.nan)
    steps = rows.steps.iloc[0]
    own = data.primary(data.measured[(data.measured.attack == "pgd") & (data.measured.steps == steps)])
    for cells, sources in ((rows, rows.source), (own, own.model)):
        for row, source in zip(each(cells), sources, strict=True):
            if row.model in models and source in models:
                matrix[models.index(row.model), models.index(source)] = 100 * row.mean
    figure, axes = new_figure((0.3 if len(models) <= _LARGE_MATRIX else 0.18) * len(models) + 1.5)
    heat_map(axes, matrix, models, models, 100)
    title = f"Accuracy (%) on PGD-{steps:.0f} images made on another model"
    axes.set(title=title, xlabel="made on", ylabel="tested on")
    return figure
