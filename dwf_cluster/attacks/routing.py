"""Objectives of attacks on a mixture beside its own loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.attacks.gradient import Objective
from dwf_cluster.models.mixture import mix

ROUTE_WEIGHT = 2.0
"""Weight of the logarithm of the gate's weight in `routed`. Our assumption: 2."""


def gate_aimed(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the mixture, and of an expert that the gate draws: sum_i g_i(x) * CE(f_i(x), y).

    The second part grows when the gate weighs experts that fail, even if the sum of logits is still correct.

    Args:
        model: frozen model with experts and a gate, `models.mixture.Gated`.
        x, y: as for any objective.
    """
    weights, logits = model.gate(x), model.experts(x)  # type: ignore[operator]
    mixed = mix(weights, logits) if getattr(model, "is_weighted_sum", True) else model(x)
    each = F.cross_entropy(logits.transpose(1, 2), y[:, None].expand(-1, logits.shape[1]), reduction="none")
    return F.cross_entropy(mixed, y, reduction="none") + (weights * each).sum(1), mixed


def expert_aimed(number: int) -> Objective:
    """Cross-entropy of one expert, CE(f_j(x), y). Only this expert is differentiated; the logits are the mixture's.

    Args:
        number: of the expert, from 0.
    """

    def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits: torch.Tensor = model.experts[number](x)  # type: ignore[index, operator]
        return F.cross_entropy(logits, y, reduction="none"), _judged(model, x)

    return objective


def routed(number: int) -> Objective:
    """Route and fool: CE(f_j(x), y) + 2 log g_j(x), which grows as expert j fails and as the gate weighs it more.

    `g_j` is the soft weight of expert j. For a hard gate that is the softmax behind its choice: the gradient is exact,
    where that of the straight-through estimator is not the model's. Only expert j and the gate are differentiated; the
    logits are the mixture's.

    Args:
        number: of the expert, from 0.
    """

    def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits: torch.Tensor = model.experts[number](x)  # type: ignore[index, operator]
        routing = _log_weights(model.gate, x)[:, number]  # type: ignore[arg-type]
        return F.cross_entropy(logits, y, reduction="none") + ROUTE_WEIGHT * routing, _judged(model, x)

    return objective


def _log_weights(gate: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logarithms of a gate's soft weights; of a user's own gate without `log_weights`, of the weights it returns."""
    if hasattr(gate, "log_weights"):
        logarithms: torch.Tensor = gate.log_weights(x)  # type: ignore[operator]
        return logarithms
    weights: torch.Tensor = gate(x)
    return weights.clamp(min=torch.finfo(weights.dtype).tiny).log()


def _judged(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The mixture's logits, without a gradient: its answer decides whether an iterate fools it."""
    with torch.no_grad():
        logits: torch.Tensor = model(x)
    return logits
