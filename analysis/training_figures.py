"""Figures of training: the curves over epochs, and the hours that it took."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from analysis.drawing import FigureData, new_figure, point
from analysis.results import Group
from dwf_cluster.plan.jobs import EVALUATE

_MARKED_EPOCHS = 10
"""The most epochs of a curve with a marker at each."""


def training(data: FigureData) -> Figure | None:
    """Loss, clean accuracy and the PGD probe after each epoch, mean over seeds."""
    columns = ["model", "seed", "epoch", "loss", "clean_accuracy", "probe_pgd_accuracy"]
    metrics = data.group.frame("metrics", columns)
    if metrics.empty:
        return None
    figure, panels = new_figure(2.6, 1, 3)
    titles = {"loss": "Training loss", "clean_accuracy": "Clean accuracy (%)", "probe_pgd_accuracy": "PGD probe (%)"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for model, rows in data.by_model(metrics):
            mean = rows.groupby("epoch")[name].mean() * (1 if name == "loss" else 100)
            style = data.styles[model] | ({} if len(mean) <= _MARKED_EPOCHS else {"marker": None})
            axes.plot(mean.index, mean, label=model if name == "loss" else None, **style)
        axes.set(title=title, xlabel="epoch", ylim=(0, None) if name == "loss" else (-2, 102))
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(loc="outside lower center", ncols=6)
    return figure


def cost(data: FigureData) -> Figure | None:
    """Hours of training of each model, as `hours_of_training` counts them, against accuracy under PGD with restarts."""
    robust = data.by_attack("pgd_restarts")
    hours = hours_of_training(data.group)
    models = [model for model in data.group.models if model in robust and model in hours.index]
    if not models:
        return None
    figure, axes = new_figure(3.4)
    for model in models:
        point(axes, model, (hours[model], math.nan), robust[model], data.styles[model])
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    unit = "GPU-hours" if hours.attrs["gpu"] else "hours of CPU jobs"
    axes.set(
        xlabel=f"{unit} of training, a seed",
        ylabel="accuracy under PGD, restarts (%)",
        title="Cost against robustness",
    )
    figure.legend(loc="outside right center")
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
