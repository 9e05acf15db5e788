"""Figures of training: the curves over epochs, and the hours that it took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from analysis import paper
from analysis.cost import costs
from analysis.drawing import FigureData, add_legend, new_figure, point, with_legend
from analysis.results import Group
from dwf_cluster.evaluation.registry import WORST_CASE
from dwf_cluster.plan.jobs import EVALUATE

_MARKED_EPOCHS = 10
"""The most epochs of a curve with a marker at each."""

_WIDE_LEGEND = 12
"""The most models whose names stand in six columns of a legend."""

_FEW_DECADES = 4
"""Decades of an axis from which on only powers of ten are labelled."""


def training(data: FigureData) -> Figure | None:
    """Loss, clean accuracy and the PGD probe after each epoch, mean over seeds."""
    columns = ["model", "seed", "epoch", "loss", "clean_accuracy", "probe_pgd_accuracy"]
    metrics = data.group.frame("metrics", columns)
    if metrics.empty:
        return None
    models = metrics.model.nunique()
    columns_of_legend = 6 if models <= _WIDE_LEGEND else 4
    figure, panels = new_figure(2.3 + 0.15 * -(-models // columns_of_legend), 1, 3)
    titles = {"loss": "Training loss", "clean_accuracy": "Clean accuracy (%)", "probe_pgd_accuracy": "PGD probe (%)"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for model, rows in data.by_model(metrics):
            mean = rows.groupby("epoch")[name].mean() * (1 if name == "loss" else 100)
            style = data.styles[model] | ({} if len(mean) <= _MARKED_EPOCHS else {"marker": None})
            axes.plot(mean.index, mean, label=model if name == "loss" else None, **style)
        axes.set(title=title, xlabel="epoch", ylim=(0, None) if name == "loss" else (-2, 102))
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=columns_of_legend)
    return figure


def cost(data: FigureData) -> Figure | None:
    """Hours of training of each model, as `hours_of_training` counts them, against accuracy under PGD with restarts."""
    robust = data.by_attack("pgd_restarts")
    hours = hours_of_training(data.group)
    models = [model for model in data.group.models if model in robust and model in hours.index]
    if not models:
        return None
    unit = "GPU-hours" if hours.attrs["gpu"] else "hours of CPU jobs"
    x = {model: hours[model] for model in models}
    return _against_cost(data, x, robust, f"{unit} of training, a seed", "accuracy under PGD, restarts (%)")


def compute(data: FigureData) -> Figure | None:
    """Compute of training of each model and of all it starts from, against accuracy in the worst case."""
    worst = data.by_attack(WORST_CASE)
    robust = worst or data.by_attack("pgd_restarts")
    x = {m: cost.flops / 1e12 for m, cost in costs(data.group.experiment).items() if m in robust and cost.flops}
    x = {model: x[model] for model in data.group.models if model in x}
    label = "accuracy in the worst case (%)" if worst else "accuracy under PGD, restarts (%)"
    return _against_cost(data, x, robust, "TFLOP of training, with all that a model starts from", label) if x else None


def _against_cost(
    data: FigureData, x: Mapping[str, float], robust: Mapping[str, Any], x_label: str, y_label: str
) -> Figure:
    """A point for each model: its cost, on a logarithmic axis, and its row of `tables.accuracies`."""
    figure, axes = new_figure(with_legend(3.4, len(x)))
    names = paper.names(data.group.experiment)
    for model, cost in x.items():
        label = paper.legend(names, model)
        point(axes, label, (cost, math.nan), robust[model], data.styles[model])
    axes.set_xscale("log")
    few = math.log10(max(x.values()) / min(x.values())) < _FEW_DECADES if min(x.values()) > 0 else False
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3) if few else (1,)))
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=x_label, ylabel=y_label, title="Cost against robustness")
    add_legend(figure, axes)
    return figure


def hours_of_training(group: Group) -> pd.Series[float]:
    """Hours of each model's training steps times its GPUs, mean over seeds; with those of the model's parents.

    `attrs["gpu"]` says whether these are GPU-hours, or hours of CPU jobs because no job had a GPU.
    """
    metrics = group.frame("metrics", ["model", "seed", "seconds"])
    jobs = group.frame("jobs", ["stage", "model", "seed", "gpus"])
    gpus = jobs[jobs.stage != EVALUATE].groupby(["model", "seed"], observed=True).gpus.max()
    on_gpu = bool((gpus > 0).any())
    seconds = metrics.groupby(["model", "seed"], observed=True).seconds.sum()
    if on_gpu:
        seconds = (seconds * gpus).dropna()
    hours = (seconds / 3600).groupby("model", observed=True).mean()
    for spec in group.experiment.models:  # parents come before the models that start from them
        if spec.name in hours.index:
            hours[spec.name] += hours[hours.index.isin(spec.parents)].sum()
    hours.attrs["gpu"] = on_gpu
    return hours
