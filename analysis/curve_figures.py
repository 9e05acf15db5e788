"""Figures of the suite `curves`: accuracy over epsilon, steps and restarts (Carlini et al. 2019, section 4)."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from analysis.drawing import FigureData, add_legend, new_figure, with_legend

_NORMS = {"linf": "L-infinity", "l2": "L2", "l1": "L1"}


def over_epsilon(data: FigureData) -> Figure | None:
    """Accuracy under PGD and APGD over the radius of the ball; the dotted line is the threat model's."""
    measured = data.measured
    attacks = {"curve_epsilon": "PGD", "curve_apgd": "APGD"}
    shown = {attack: name for attack, name in attacks.items() if (measured.attack == attack).any()}
    if not shown:
        return None
    threat = data.group.experiment.threat
    figure, panels = new_figure(with_legend(3.0, len(data.group.models)), 1, len(shown), sharey=True, squeeze=False)
    for axes, (attack, name) in zip(panels[0], shown.items(), strict=True):
        rows = measured[measured.attack == attack]
        _lines(axes, data, rows.assign(x=rows.epsilon.astype(float)))
        axes.axvline(threat.epsilon, color="#444444", linestyle=":", zorder=1)
        _logarithmic(axes)
        axes.set(xlabel=f"{_NORMS[threat.norm]} epsilon (pixels in [0, 1])", title=f"Accuracy under {name}")
    return _finished(figure, panels[0][0])


def over_steps(data: FigureData) -> Figure | None:
    """Accuracy over the iterations of one long run of PGD."""
    rows = data.measured[data.measured.attack == "curve_steps"]
    if rows.empty:
        return None
    figure, axes = new_figure(with_legend(3.0, len(data.group.models)))
    _lines(axes, data, rows.assign(x=rows.steps.astype(float)))
    _logarithmic(axes)
    epsilon = data.group.experiment.threat.epsilon
    axes.set(xlabel=f"PGD iterations, epsilon {epsilon:.3g}", title="Accuracy over the iterations of one run")
    return _finished(figure, axes)


def over_restarts(data: FigureData) -> Figure | None:
    """Accuracy in the worst case over more and more starts of PGD."""
    rows = data.measured[data.measured.attack == "curve_restarts"]
    if rows.empty:
        return None
    figure, axes = new_figure(with_legend(3.0, len(data.group.models)))
    steps, epsilon = data.group.experiment.evaluation.restart_steps, data.group.experiment.threat.epsilon
    _lines(axes, data, rows.assign(x=rows.steps.astype(float) / steps))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel=f"starts of PGD-{steps}, epsilon {epsilon:.3g}", title="Accuracy over restarts")
    return _finished(figure, axes)


def _lines(axes: Axes, data: FigureData, rows: pd.DataFrame) -> None:
    """A line for each model over column `x`; with several seeds, a band of one standard deviation."""
    for model, cells in data.by_model(rows.sort_values("x")):
        style = data.styles[model]
        axes.plot(cells.x, 100 * cells["mean"], label=model, **style)
        if cells["std"].notna().any():
            low, high = cells["mean"] - cells["std"], cells["mean"] + cells["std"]
            axes.fill_between(cells.x, 100 * low, 100 * high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_ylim(-2, 102)


def _logarithmic(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())


def _finished(figure: Figure, first: Axes) -> Figure:
    first.set_ylabel("accuracy (%)")
    add_legend(figure, first)
    return figure
