"""Shared by the methods: the loss that they yield to the training loop; cross-entropy and TRADES as such losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

START_NOISE = 0.001
"""Standard deviation of the Gaussian noise that the attacks of TRADES and ADVMoE start from, pixels in [0, 1]; that of
both releases."""

Frozen = Callable[[], nn.Module]
"""Returns the model as attacks see it. Refreshed at the first call of a step, so a step without attack is free."""


class Loss(NamedTuple):
    """The loss of one optimiser step, on one part of a batch.

    Attributes:
        total: summed over rows, shape ().
        rows: number of images that it is summed over; every version of an image counts.
        name: in the line that ends a run whose loss is not finite.
    """

    total: torch.Tensor
    rows: int
    name: str = "the loss"


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Loss:
    """Cross-entropy of the images that the model is trained on."""
    logits = model(x.contiguous(memory_format=torch.channels_last))
    return Loss(F.cross_entropy(logits, y, reduction="sum"), len(y))


def concatenated(*versions: torch.Tensor) -> torch.Tensor:
    """Versions of a batch as one batch, in the memory format of training: BatchNorm sees them together."""
    return torch.cat(versions).contiguous(memory_format=torch.channels_last)


def trades(logits: torch.Tensor, y: torch.Tensor, beta: float, name: str = "the loss") -> Loss:
    """Cross-entropy of clean images plus beta times KL(clean || attacked); no side is detached (Zhang et al. 2019).

    Args:
        logits: of the clean images, then of the attacked ones, shape (2n, classes).
        y: labels, shape (n,).
        beta: weight of the divergence.
        name: of the loss.
    """
    clean, attacked = logits.chunk(2)
    total = F.cross_entropy(clean, y, reduction="sum") + beta * divergence(attacked, clean).sum()
    return Loss(total, len(y), name)


def divergence(moved: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """KL(softmax(clean) || softmax(moved)) over the last dimension of logits, which is left out of the result."""
    log_clean = clean.log_softmax(-1)
    return (log_clean.exp() * (log_clean - moved.log_softmax(-1))).sum(-1)
