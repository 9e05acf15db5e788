"""Shared by all figures: the results that they show, the style, and the look of each model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from analysis.columns import each
from analysis.predictions import Predictions
from analysis.results import Group, kind
from dwf_cluster.defences.registry import METHODS

PALETTE = (
    *("#000000", "#0072B2", "#E69F00", "#56B4E9", "#CC79A7", "#009E73"),
    *("#332288", "#882255", "#999933", "#44AA99", "#AA4499", "#117733", "#CC6677", "#DDCC77"),
)
"""Colours of methods, except that of the paper's defence: Okabe and Ito's without the yellow, which is hard to see on
white, then those of Tol's muted scheme; colour-blind readers can distinguish either."""

DEFENDED = "#D55E00"
"""Colour of the paper's defence, `dwf`."""

_PALEST = 0.45
"""Share of white in the colour of the last kind of a method."""

UNDESCRIBED = "#777777"
"""Colour of models that no ModelSpec describes."""

_DASHES = ("-", "--", "-.", ":")
_MARKERS = "os^Dv<>PX*"
_BESIDE = 20  # entries of a legend: more stand below the figure, in columns
_LEGEND_COLUMNS = 3
_MANY_COLUMNS = 20  # of a matrix: more have small labels
_LEGIBLE = 4.5  # points
_TEXT_WIDTH = 6.5  # inches: that of a page's text, so that text of 8 points is printed at that size
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
    "lines.linewidth": 1.2,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "figure.constrained_layout.use": True,
    "image.cmap": "cividis",
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "dwf_cluster",  # the same figure is the same file
}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in this package's style; also a decorator of functions that draw."""
    with rc_context(_STYLE):
        yield


@dataclass(frozen=True)
class FigureData:
    """The data of the figures.

    Attributes:
        group: the experiments.
        measured: result of `tables.accuracies`.
        predictions: result of `read_predictions`.
    """

    group: Group
    measured: pd.DataFrame
    predictions: Predictions

    @cached_property
    def styles(self) -> dict[str, dict[str, Any]]:
        """Style of each model: colours distinguish methods; shades, dashes and markers, models of one method."""
        methods = {spec.name: spec.method for spec in self.group.experiment.models}
        styles = {}
        for model, colour in model_colours(self.group).items():
            i = [other for other in self.group.models if methods.get(other) == methods.get(model)].index(model)
            style: dict[str, Any] = {
                "color": colour,
                "linestyle": _DASHES[i % len(_DASHES)],
                "marker": _MARKERS[i % len(_MARKERS)],
            }
            if model == self.group.defended:
                style |= {"marker": "*", "linewidth": 2.2, "markersize": 5.5, "zorder": 3}
            styles[model] = style
        return styles

    def by_model(self, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
        """Rows of each model that has any, in the order of the result table."""
        models = self.group.models
        return [(model, rows[rows.model == model]) for model in models if (rows.model == model).any()]

    def by_attack(self, attack: str) -> dict[str, Any]:
        """The row of each model in the only column of an attack under the primary threat model."""
        return {row.model: row for row in each(self.primary(self.measured[self.measured.attack == attack]))}

    def primary(self, rows: pd.DataFrame) -> pd.DataFrame:
        """The rows of columns under the primary threat model, and of clean images."""
        threat = self.group.experiment.threat
        return rows[rows.epsilon.isna() | ((rows.epsilon == threat.epsilon) & (rows.norm == threat.norm))]


def method_colour(method: str) -> str:
    """The colour of a method, the same in every experiment."""
    others = [name for name in METHODS if name != "dwf"]
    return DEFENDED if method == "dwf" else PALETTE[others.index(method) % len(PALETTE)]


def model_colours(group: Group) -> dict[str, str]:
    """The colour of each model: its method's, in a shade for each kind.

    Models whose ModelSpecs differ only in their names are one kind. A method's first kind has its full colour.
    """
    specs = {spec.name: spec for spec in group.experiment.models}
    colours = {}
    for model in group.models:
        if model not in specs:
            colours[model] = UNDESCRIBED
            continue
        alike = [specs[name] for name in group.models if name in specs and specs[name].method == specs[model].method]
        kinds = list(dict.fromkeys(map(kind, alike)))
        white = _PALEST * kinds.index(kind(specs[model])) / max(1, len(kinds) - 1)
        full = to_rgb(method_colour(specs[model].method))
        red, green, blue = ((1 - white) * part + white for part in full)
        colours[model] = to_hex((red, green, blue)).upper()
    return colours


def new_figure(height: float, rows: int = 1, columns: int = 1, **panels: Any) -> tuple[Figure, Any]:
    """A figure as wide as a page's text, height in inches, and its axes."""
    figure = Figure(figsize=(_TEXT_WIDTH, height))
    return figure, figure.subplots(rows, columns, **panels)


def with_legend(height: float, entries: int) -> float:
    """Height of a figure in inches with the legend that `add_legend` draws; at least `height`."""
    if entries > _BESIDE:
        return height + 0.145 * -(-entries // _LEGEND_COLUMNS) + 0.1
    return max(height, 0.175 * entries + 0.3)


def add_legend(figure: Figure, axes: Axes) -> None:
    """Explain what axes show: beside them or, if that is much, below them."""
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) > _BESIDE:
        figure.legend(handles, labels, loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize=7)
    else:
        figure.legend(handles, labels, loc="outside right center")


def point(axes: Axes, label: str, x: tuple[float, float], y: Any, style: Mapping[str, Any]) -> None:
    """Draw one model as a point, with bars of one standard deviation where there are several seeds.

    Args:
        axes: where to draw.
        label: the model's name.
        x: value and standard deviation (NaN for one seed).
        y: row of `tables.accuracies`; drawn in percent.
        style: of the model, from `FigureData.styles`.
    """
    x_bar, y_bar = (None if math.isnan(std) else std for std in (x[1], 100 * y.std))
    axes.errorbar(
        x[0],
        100 * y.mean,
        xerr=x_bar,
        yerr=y_bar,
        label=label,
        elinewidth=0.8,
        capsize=2,
        **{**style, "linestyle": "none"},
    )


def heat_map(
    axes: Axes, values: np.ndarray[Any, Any], rows: Sequence[str], columns: Sequence[str], top: float | None = None
) -> None:
    """Draw a matrix as colours, with the numbers in it where they are legible; NaN stays empty.

    Args:
        axes: where to draw.
        values: shape (rows, columns).
        rows, columns: labels.
        top: the value of the brightest colour, the largest value by default.
    """
    axes.imshow(values, vmin=0, vmax=top, aspect="auto")
    is_large = len(columns) > _MANY_COLUMNS
    size = min(7.0, 140 / len(columns))
    half = (top or float(np.nanmax(values))) / 2
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value) and size >= _LEGIBLE:
            colour = "white" if value < half else "black"
            axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=size, color=colour)
    labels = 6 if is_large else 8  # points
    axes.set_yticks(range(len(rows)), rows, fontsize=labels)
    rotation = 90 if is_large else 45
    axes.set_xticks(
        range(len(columns)), columns, rotation=rotation, ha="right", rotation_mode="anchor", fontsize=labels
    )
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
