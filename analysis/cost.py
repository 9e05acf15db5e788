"""Size and cost of models: what a row of the result table is made of, beside its accuracy."""

from __future__ import annotations

from dataclasses import dataclass

from dwf_cluster.data.registry import DATASETS
from dwf_cluster.data.sources import sizes
from dwf_cluster.defences.registry import METHODS, OWN_MODEL
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import forward_flops


@dataclass(frozen=True)
class Cost:
    """Size and cost of a model.

    Attributes:
        parameters: weights and biases of the whole model, those of gate and heads included.
        macs: multiply-accumulate operations of one inference in convolutions; linear layers are not counted.
        passes: of its training and that of everything it starts from: forward passes of one image through one network
            (an input gradient counts as 2, a training step as 3). Those of networks of different sizes count alike.
        flops: floating-point operations of these passes.
    """

    parameters: int
    macs: float
    passes: float
    flops: float


def costs(experiment: Experiment) -> dict[str, Cost]:
    """Size and cost of each model by name.

    None for an `.npz` file, because its images may be elsewhere by now; nor for a model of the method `own-model`,
    whose network is not known.
    """
    if experiment.data.source not in DATASETS:
        return {}
    images = sizes(experiment.data)
    specs = {spec.name: spec for spec in experiment.models}

    def sources(name: str) -> set[str]:
        return {name}.union(*(sources(parent) for parent in specs[name].parents))

    passes = {
        name: spec.training.epochs * images.train * METHODS[spec.method].passes(spec) for name, spec in specs.items()
    }
    return {
        name: Cost(
            METHODS[spec.method].parameters(spec, images.shape),
            METHODS[spec.method].flops(spec, images.shape) / 2,
            sum(passes[source] for source in sources(name)),
            sum(passes[source] * forward_flops(specs[source], images.shape) for source in sources(name)),
        )
        for name, spec in specs.items()
        if spec.method != OWN_MODEL
    }


def size_cells(cost: Cost | None) -> list[str]:
    """Cells of `SIZE_HEADS`; blank for an unknown cost, and the passes of a model that nothing was trained for."""
    if cost is None:
        return ["", "", "", ""]
    trained = [_number(cost.passes / 1e6), _number(cost.flops / 1e12)] if cost.passes else ["", ""]
    return [_number(cost.parameters / 1e6), _number(cost.macs / 1e6), *trained]


SIZE_HEADS = (("parameters", "million"), ("MACs", "million"), ("passes", "million"), ("TFLOP", "training"))
"""Headings of the columns of size and cost."""

SIZE_NOTE = (
    "Parameters: weights and biases of the whole model, those of gate and heads included. MACs: multiply-accumulate "
    "operations of one inference in convolutions, those of a router included; linear layers (last layers, the gate of "
    "DWF) are not counted. Passes: cost of training the model and everything it starts from, in forward passes of one "
    "image through one of its networks (an input gradient counts as 2, a training step as 3). TFLOP: the same in "
    "floating-point operations, which compares networks of different sizes."
)
"""What the columns of `SIZE_HEADS` mean."""


def _number(value: float) -> str:
    """At least three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 1e-4 else f"{value:.6f}"
