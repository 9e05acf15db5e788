"""Figures of a group of experiments, vector and PNG, readable in print and by the colour-blind.

    python -m analysis.figures ./runs --out figures

A folder for each group of experiments that differ only in their seed.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from analysis.command import Parser, run, write_whole
from analysis.predictions import Predictions, read_predictions
from analysis.results import Group, column_key, each, key_of_row, load
from analysis.tables import accuracies
from dwf_cluster.evaluation.registry import Column

MIXTURE = "mixture"
from dwf_cluster.settings import InvalidInput

COLOURS = {
    "benign": "#000000",
    "fgsm": "#0072B2",
    "pgd": "#E69F00",
    "fgsm-at": "#56B4E9",
    "pgd-at": "#CC79A7",
    MIXTURE: "#D55E00",
}
"""Of each kind of model: Okabe and Ito's palette, which the colour-blind tell apart."""

_DASHES = ("-", "--", "-.", ":")
_MARKERS = "os^Dv<>PX*"
_TEXT_WIDTH = 6.5  # inches: a page's; text of 8 points is then printed at that size
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
    """Draw in this package's style; also decorates a function that draws."""
    with rc_context(_STYLE):
        yield


@styled()
def fgsm(group: Group, measured: pd.DataFrame) -> Figure | None:
    """The paper's figure 6: accuracy over FGSM's epsilon, clean images at 0, bands of one std over seeds.

    Args:
        group: whose models.
        measured: of `tables.accuracies`.

    Returns:
        None where nothing of it was measured; so do all others here.
    """
    rows = measured[measured.attack.isin(["clean", "fgsm"])]
    return _curves(
        group, rows.assign(x=rows.epsilon.astype(float).fillna(0)), "FGSM epsilon (pixels in [0, 1])", "FGSM"
    )


@styled()
def pgd(group: Group, measured: pd.DataFrame) -> Figure | None:
    """The paper's figure 7: accuracy over PGD's iterations, bands of one std over seeds; arguments as for `fgsm`."""
    rows = measured[measured.attack == "pgd"]
    epsilon = group.experiment.pgd.epsilon
    return _curves(group, rows.assign(x=rows.steps.astype(float)), f"PGD iterations, epsilon {epsilon:.3g}", "PGD")


def _curves(group: Group, rows: pd.DataFrame, x_label: str, title: str) -> Figure | None:
    if rows.empty:
        return None
    figure, axes = _figure(3.4)
    for model, of in _by_model(group, rows.sort_values("x")):
        axes.plot(of.x, 100 * of["mean"], label=model, **_line(group, model))
        if of["std"].notna().any():
            low, high = of["mean"] - of["std"], of["mean"] + of["std"]
            axes.fill_between(of.x, 100 * low, 100 * high, color=_colour(model), alpha=0.15, linewidth=0)
        if model == MIXTURE and title == "FGSM" and of.paper.notna().any():  # its PGD is of another bound
            axes.plot(of.x, 100 * of.paper, label="paper's DWF", color="#444444", linestyle=":", zorder=4)
    axes.set(
        xlabel=x_label,
        ylabel="accuracy (%)",
        ylim=(-2, 102),
        title=f"Accuracy under {title}",
        xticks=sorted(set(rows.x)),
    )
    figure.legend(loc="outside right center")
    return figure


@styled()
def gate_by_attack(group: Group, found: Predictions) -> Figure | None:
    """What the gate trusts in each column, mean weight of each expert over images and seeds, and its mean entropy."""
    columns = [column for column in group.columns if column_key(column) in found.gates]
    if not columns:
        return None
    sums = pd.DataFrame([found.gates[column_key(column)].sum() for column in columns])
    means = sums.div(sums.examples, axis=0)
    experts = list(group.experts)
    figure, (weights, entropy) = _figure(0.22 * len(columns) + 1.2, 1, 2, sharey=True, width_ratios=[3, 1])
    _matrix(weights, 100 * means[experts].to_numpy(), [_name(c) for c in columns], experts)
    weights.set_title("Mean gate weight (%)")
    entropy.barh(range(len(columns)), means.entropy, color=COLOURS["fgsm"], height=0.7)
    entropy.axvline(np.log2(len(experts)), color="black", linestyle="--", linewidth=0.8)
    entropy.set(title="Mean entropy (bits)", xlim=(0, 1.08 * np.log2(max(len(experts), 2))))
    entropy.set_xlabel("dashed: all experts alike")
    entropy.tick_params(labelleft=False, left=False)
    entropy.grid(visible=False, axis="y")
    return figure


@styled()
def gate_by_class(group: Group, found: Predictions) -> Figure | None:
    """Mean gate weights for each true class: on clean images, and under the longest PGD of the columns."""
    columns = [column for column in group.columns if column_key(column) in found.gates]
    shown = [column for column in columns if column.attack == "clean"]
    shown += sorted((c for c in columns if c.attack == "pgd"), key=lambda c: c.steps or 0)[-1:]
    if not shown:
        return None
    experts = list(group.experts)
    means = [found.gates[column_key(column)] for column in shown]
    weights = [100 * of[experts].div(of.examples, axis=0) for of in means]
    top = max(float(of.to_numpy().max()) for of in weights)
    figure, panels = _figure(0.22 * len(weights[0]) + 1.3, 1, len(shown), squeeze=False, sharey=True)
    for axes, column, of in zip(panels[0], shown, weights, strict=True):
        _matrix(axes, of.to_numpy(), [str(label) for label in of.index], experts, top)
        axes.set_title(f"Mean gate weight (%), {_name(column)}")
    panels[0][0].set_ylabel("true class")
    return figure


@styled()
def transfer(group: Group, measured: pd.DataFrame) -> Figure | None:
    """Accuracy of each model on the PGD images that were made on each other one; its own PGD on the diagonal."""
    rows = measured[measured.attack == "transfer"]
    if rows.empty:
        return None
    models = [m for m in group.models if m in set(rows.model) | set(rows.source)]
    matrix = np.full((len(models), len(models)), np.nan)
    for row in each(rows):
        matrix[models.index(row.model), models.index(row.source)] = 100 * row.mean
    steps = rows.steps.iloc[0]
    for row in each(measured[(measured.attack == "pgd") & (measured.steps == steps)]):
        matrix[models.index(row.model), models.index(row.model)] = 100 * row.mean
    figure, axes = _figure(0.3 * len(models) + 1.5)
    _matrix(axes, matrix, models, models, 100)
    axes.set(
        title=f"Accuracy (%) on PGD-{steps:.0f} images made on another model", xlabel="made on", ylabel="tested on"
    )
    return figure


@styled()
def experts_and_mixture(group: Group, measured: pd.DataFrame) -> Figure | None:
    """Accuracy of each expert beside the mixture's, in each column of the paper's table."""
    rows = measured[measured.model.isin([*group.experts, MIXTURE])]
    columns = [c for c in group.paper_columns if ((rows.attack == c.attack) & (rows.model == MIXTURE)).any()]
    if not columns:
        return None
    at = {column_key(column): i for i, column in enumerate(columns)}
    figure, axes = _figure(3.2)
    for model, of in _by_model(group, rows):
        cells = [(at[where], 100 * row.mean) for row in each(of) if (where := key_of_row(*row[1:5])) in at]
        x, y = zip(*cells, strict=True)
        style = _line(group, model) | {"linestyle": "none"}
        axes.plot(x, y, label=model, alpha=1 if model == MIXTURE else 0.8, **style)
    axes.set(
        xlim=(-0.5, len(columns) - 0.5), ylim=(-2, 102), ylabel="accuracy (%)", title="Each expert and the mixture"
    )
    axes.set_xticks(
        range(len(columns)), [_name(column) for column in columns], rotation=60, ha="right", rotation_mode="anchor"
    )
    figure.legend(loc="outside right center")
    return figure


@styled()
def clean_and_robust(group: Group, measured: pd.DataFrame) -> Figure | None:
    """Accuracy on clean images against that under PGD with restarts, bars of one std over seeds."""
    clean, robust = _of(measured, "clean"), _of(measured, "pgd_restarts")
    models = [model for model in group.models if model in clean and model in robust]
    if not models:
        return None
    figure, axes = _figure(3.4)
    for model in models:
        _point(axes, group, model, 100 * clean[model].mean, robust[model], clean[model].std)
    axes.set(
        xlabel="clean accuracy (%)", ylabel="accuracy under PGD, restarts (%)", title="Clean against robust accuracy"
    )
    figure.legend(loc="outside right center")
    return figure


@styled()
def training(group: Group) -> Figure | None:
    """Loss, clean accuracy and the PGD probe after each epoch, mean over seeds; a probe that falls while the loss falls
    is catastrophic overfitting."""
    metrics = group.frame("metrics", ["model", "seed", "epoch", "loss", "clean_accuracy", "probe_pgd_accuracy"])
    if metrics.empty:
        return None
    figure, panels = _figure(2.6, 1, 3)
    titles = {"loss": "Training loss", "clean_accuracy": "Clean accuracy (%)", "probe_pgd_accuracy": "PGD probe (%)"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for model, of in _by_model(group, metrics):
            mean = of.groupby("epoch")[name].mean() * (1 if name == "loss" else 100)
            style = _line(group, model) | ({} if len(mean) <= 10 else {"marker": None})
            axes.plot(mean.index, mean, label=model if name == "loss" else None, **style)
        axes.set(title=title, xlabel="epoch", ylim=(0, None) if name == "loss" else (-2, 102))
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=6)
    return figure


@styled()
def cost(group: Group, measured: pd.DataFrame) -> Figure | None:
    """GPU-hours of a model's training, mean over seeds, against accuracy under PGD with restarts.

    Hours are those of the training steps in `metrics`, times the job's GPUs; the mixture's include its experts'.
    Where no job had a GPU they are hours of CPU jobs.
    """
    robust = _of(measured, "pgd_restarts")
    hours = hours_of_training(group)
    models = [model for model in group.models if model in robust and model in hours.index]
    if not models:
        return None
    figure, axes = _figure(3.4)
    for model in models:
        _point(axes, group, model, hours[model], robust[model])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    on = "GPU-hours" if hours.attrs["gpu"] else "hours of CPU jobs"
    axes.set(
        xlabel=f"{on} of training, a seed",
        ylabel="accuracy under PGD, restarts (%)",
        title="Cost against robustness",
    )
    figure.legend(loc="outside right center")
    return figure


def hours_of_training(group: Group) -> pd.Series[float]:
    """Hours that each model took to train, mean over seeds, times its GPUs; the mixture's include its experts'.

    `attrs["gpu"]` says whether they are GPU-hours, or those of CPU jobs because no job had a GPU.
    """
    metrics = group.frame("metrics", ["model", "seed", "seconds"])
    jobs = group.frame("jobs", ["stage", "model", "seed", "gpus"])
    gpus = jobs[jobs.stage.isin(["experts", "joint"])].groupby(["model", "seed"], observed=True).gpus.max()
    on_gpu = bool((gpus > 0).any())
    seconds = metrics.groupby(["model", "seed"], observed=True).seconds.sum()
    if on_gpu:
        seconds = (seconds * gpus).dropna()
    hours = (seconds / 3600).groupby("model", observed=True).mean()
    if MIXTURE in hours.index:
        hours[MIXTURE] += hours[hours.index.isin(group.experts)].sum()
    hours.attrs["gpu"] = on_gpu
    return hours


CAPTIONS = {
    "fgsm": "Accuracy over FGSM's epsilon, clean images at 0 (the paper's figure 6). Bands: one standard deviation "
    "over seeds.",
    "pgd": "Accuracy over PGD's iterations (the paper's figure 7). Bands: one standard deviation over seeds.",
    "experts_and_mixture": "Each expert and the mixture, in every column of the paper's table.",
    "clean_and_robust": "Clean accuracy against accuracy under PGD with restarts. Bars: one standard deviation over "
    "seeds.",
    "training": "Loss, clean accuracy and the PGD probe over epochs, mean over seeds. A probe that falls while the "
    "loss falls is catastrophic overfitting.",
    "cost": "What training took (steps only; the mixture with its experts) against accuracy under PGD with restarts.",
    "gate_by_attack": "What the gate trusts under each attack: mean weight of each expert on the attacked images, and "
    "the mean entropy of the weights.",
    "transfer": "Accuracy on PGD images that were made on another model; on the diagonal, on the model itself.",
    "gate_by_class": "What the gate trusts for each true class, on clean images and under the longest PGD.",
}
"""What each figure shows, by its name."""


def of_group(group: Group, measured: pd.DataFrame, found: Predictions) -> dict[str, Figure]:
    """Every figure that there are results for, by its name in `CAPTIONS`; arguments as for `fgsm`, `gate_by_attack`."""
    made = {
        "fgsm": fgsm(group, measured),
        "pgd": pgd(group, measured),
        "experts_and_mixture": experts_and_mixture(group, measured),
        "clean_and_robust": clean_and_robust(group, measured),
        "training": training(group),
        "cost": cost(group, measured),
        "gate_by_attack": gate_by_attack(group, found),
        "transfer": transfer(group, measured),
        "gate_by_class": gate_by_class(group, found),
    }
    return {name: figure for name, figure in made.items() if figure}


def save(figures: Mapping[str, Figure | None], folder: str | Path) -> list[Path]:
    """Write each figure as PDF, SVG and PNG (300 dots an inch); the files' paths.

    Raises:
        InvalidInput: if the folder cannot be written.
    """
    paths = []
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            for kind in ("pdf", "svg", "png") if figure else ():
                paths.append(Path(folder) / f"{name}.{kind}")
                content = io.BytesIO()
                write(figure, content, kind)
                write_whole(paths[-1], content.getvalue())
    except OSError as error:
        raise InvalidInput(f"--out: {str(folder)!r} cannot be used: {error.strerror}") from None
    return paths


@styled()
def write(figure: Figure | None, file: Any, kind: str) -> None:
    """Write one figure to an open file, as `pdf`, `svg` or `png`; the same figure gives the same bytes."""
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}.get(kind)
    assert figure is not None
    figure.savefig(file, format=kind, dpi=300, metadata=undated)


# -------------------------------------------------------------------------------------------- drawing


def _figure(height: float, rows: int = 1, columns: int = 1, **panels: Any) -> tuple[Figure, Any]:
    """A figure as wide as a page's text, height in inches, and its axes."""
    figure = Figure(figsize=(_TEXT_WIDTH, height))
    return figure, figure.subplots(rows, columns, **panels)


def _by_model(group: Group, rows: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The mixture last, so that it is drawn on top."""
    return [(model, rows[rows.model == model]) for model in group.models if (rows.model == model).any()]


def _colour(model: str) -> str:
    return COLOURS.get(model) or COLOURS[model.rsplit("-", 1)[0]]


def _line(group: Group, model: str) -> dict[str, Any]:
    """Kinds of models by colour, models of a kind by dashes and markers."""
    alike = [other for other in group.models if _colour(other) == _colour(model)]
    i = alike.index(model)
    thick = {"linewidth": 2.2, "markersize": 5.5, "zorder": 3} if model == MIXTURE else {}
    marker = "*" if model == MIXTURE else _MARKERS[i % len(_MARKERS)]
    return {"color": _colour(model), "linestyle": _DASHES[i % len(_DASHES)], "marker": marker, **thick}


def _name(column: Column) -> str:
    return " ".join(column.title.split())


def _of(measured: pd.DataFrame, attack: str) -> dict[str, Any]:
    """The row of each model in the one column of an attack."""
    return {row.model: row for row in each(measured[measured.attack == attack])}


def _point(axes: Axes, group: Group, model: str, x: float, y: Any, x_std: float = math.nan) -> None:
    """A model at x, accuracy up in percent, with bars of one std where there are several seeds."""
    bars: dict[str, Any] = {
        name: None if math.isnan(std) else 100 * std for name, std in (("xerr", x_std), ("yerr", y.std))
    }
    style = _line(group, model) | {"linestyle": "none"}
    axes.errorbar(x, 100 * y.mean, **bars, label=model, elinewidth=0.8, capsize=2, **style)


def _matrix(
    axes: Axes, values: np.ndarray[Any, Any], rows: Sequence[str], columns: Sequence[str], top: float | None = None
) -> None:
    """A heat map with its numbers written in."""
    axes.imshow(values, vmin=0, vmax=top, aspect="auto")
    half = (top or float(np.nanmax(values))) / 2
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(
                j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value < half else "black"
            )
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def main(arguments: Sequence[str]) -> None:
    """Write the figures of every group, each group's in a folder of its own; print the paths."""
    parser = Parser(prog="python -m analysis.figures", description="Every figure, as PDF, SVG and PNG.")
    parser.add_argument("storage", nargs="+", help="storage or experiment's folder, a path or an fsspec URL")
    parser.add_argument("--out", default="figures", help="folder for them, default: figures")
    options = parser.parse_args(arguments)
    for group in load(*options.storage).groups:
        for path in save(of_group(group, accuracies(group), read_predictions(group)), Path(options.out) / group.name):
            print(path)


if __name__ == "__main__":
    sys.exit(run(main))
