"""What attacks on the experts and the gate of a model cost, in forward passes of one image. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from dwf_cluster.evaluation.column import longest_pgd
from dwf_cluster.evaluation.settings import Evaluation


@dataclass(frozen=True)
class Parts:
    """What the parts of a model cost, in forward passes of one of its networks.

    The whole model costs `networks` passes, so a pass is the operations of the whole model divided by `networks`.

    Attributes:
        networks: number of experts; 1 for a model without a gate.
        expert: passes of one expert.
        gate: passes of the gate; 0 if it costs little beside an expert.
        has_gradient: whether the gate's weights have a gradient.
        is_weighted_sum: as of `models.mixture.Gated`.
    """

    networks: int
    expert: float = 1.0
    gate: float = 0.0
    has_gradient: bool = True
    is_weighted_sum: bool = True


def gate_cost(e: Evaluation, parts: Parts) -> float:
    """Of `pgd_gate`: each iterate has a gradient of the gate, of all experts and, if need be, of the whole model."""
    gate = (2 if parts.has_gradient else 1) * parts.gate / parts.networks
    model = 0 if parts.is_weighted_sum else 2
    return e.adaptive_steps * (2 * parts.expert + gate + model) + 1


def expert_cost(e: Evaluation, parts: Parts) -> float:
    """Of `pgd_expert`: a run for each expert; each iterate has a gradient of it and a pass of the whole model."""
    return e.adaptive_steps * (2 * parts.expert + parts.networks) + 1


def route_cost(e: Evaluation, parts: Parts) -> float:
    """Of `pgd_route`: that of `pgd_expert`, and a gradient of the gate's soft weights at each iterate."""
    return expert_cost(e, parts) + e.adaptive_steps * 2 * parts.gate


def experts_cost(e: Evaluation, parts: Parts) -> float:
    """Of `experts`: PGD on the mixture, on each expert, and on each mixture of all experts but one.

    A gate that costs more than an MLP is a hard choice, which has no gradient in a mixture without an expert. Its
    weights are recorded in every column.
    """
    gradients = 1 + parts.networks * parts.expert  # of the whole model, divided by its networks
    recorded = (2 + parts.networks * (parts.networks + 2)) * parts.gate / parts.networks
    return longest_pgd(e) * (2 * gradients + parts.gate) + recorded + 2 * parts.networks + 1
