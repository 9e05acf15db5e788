"""Objectives of attacks on a mixture beside its own loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.models.mixture import mix


def gate_aimed(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the mixture, and of an expert that the gate draws: sum_i g_i(x) * CE(f_i(x), y).

    The second part grows when the gate weighs experts that fail, even if the sum of logits is still correct.

    Args:
        model: frozen model of a `Mixture`.
        x, y: as for any objective.
    """
    weights, logits = model.gate(x), model.experts(x)  # type: ignore[operator]
    mixed = mix(weights, logits)
    each = F.cross_entropy(logits.transpose(1, 2), y[:, None].expand(-1, logits.shape[1]), reduction="none")
    return F.cross_entropy(mixed, y, reduction="none") + (weights * each).sum(1), mixed
