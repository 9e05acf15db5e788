"""Operations and parameters of a model, from its ModelSpec. Imports no torch: a run is planned with it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dwf_cluster.data.registry import Shape
from dwf_cluster.evaluation.gate_cost import Parts
from dwf_cluster.models import advmoe_size
from dwf_cluster.models.registry import BACKBONES

if TYPE_CHECKING:
    from dwf_cluster.defences.registry import ModelSpec

_CLASSES = 10
"""Of every named data set. The parameters of a model for other images are approximate."""


def networks_flops(spec: ModelSpec, shape: Shape) -> float:
    """Of all networks; a gate of linear layers is not counted."""
    return sum(BACKBONES[backbone].flops(spec.width, shape) for backbone in spec.backbones)


def networks_parameters(spec: ModelSpec, shape: Shape) -> int:
    """Of all networks."""
    return sum(BACKBONES[backbone].parameters(spec.width, shape[0], _CLASSES) for backbone in spec.backbones)


def dwf_parameters(spec: ModelSpec, shape: Shape) -> int:
    """Of all networks and the gate."""
    hidden: int = spec.option("gate_hidden")
    return networks_parameters(spec, shape) + hidden * (math.prod(shape) + 1) + spec.networks * (hidden + 1)


def soe_parameters(spec: ModelSpec, shape: Shape) -> int:
    """Of all networks; a confidence head is one more output of a network's last layer."""
    return sum(BACKBONES[backbone].parameters(spec.width, shape[0], _CLASSES + 1) for backbone in spec.backbones)


def advmoe_flops(spec: ModelSpec, shape: Shape) -> float:
    """Of the router and of one pathway: the others are not computed."""
    return sum(advmoe_size.flops(spec.width, spec.option("ratio"), shape))


def advmoe_parameters(spec: ModelSpec, shape: Shape) -> int:
    """Of all pathways and the router."""
    vectors = advmoe_size.LAYERS if spec.option("router") == "per-layer" else 1
    return advmoe_size.parameters(spec.width, spec.option("ratio"), spec.networks, vectors, shape[0])


def networks_parts(spec: ModelSpec, shape: Shape) -> Parts:
    """Networks that all run, and a gate of linear layers or none."""
    return Parts(spec.networks)


def soe_parts(spec: ModelSpec, shape: Shape) -> Parts:
    """The choice runs all networks, without a gradient."""
    return Parts(spec.networks, gate=spec.networks, has_gradient=False)


def advmoe_parts(spec: ModelSpec, shape: Shape) -> Parts:
    """The router is a network of its own, and only one pathway runs."""
    pathway, router = advmoe_size.flops(spec.width, spec.option("ratio"), shape)
    expert, gate = (part * spec.networks / (pathway + router) for part in (pathway, router))
    return Parts(spec.networks, expert, gate, is_weighted_sum=False)
