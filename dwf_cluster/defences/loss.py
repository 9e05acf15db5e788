"""Shared by the methods: the loss that they yield to the training loop, and cross-entropy as such a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

Frozen = Callable[[], nn.Module]
"""Returns the model as attacks see it. Built at the first call of a step, so a step without an attack costs nothing."""


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
