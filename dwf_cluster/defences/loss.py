"""What a method hands to the training loop."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Loss(NamedTuple):
    """The loss of one optimiser step, on one part of a batch.

    Attributes:
        total: summed over rows, shape ().
        rows: the images that it is summed over, every version of an image counted.
    """

    total: torch.Tensor
    rows: int
