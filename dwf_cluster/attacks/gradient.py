"""The gradient that every attack follows, and the two faults that would make it worthless."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class NotLogits(ValueError):
    """The model returned NaN, infinity or probabilities: an accuracy under attack would mean nothing."""


def input_gradient(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, samples: int = 1, check: bool = True
) -> torch.Tensor:
    """Gradient of the cross-entropy with respect to the pixels.

    Args:
        model: frozen view, pixels in, logits out.
        x: float32 in [0, 1], shape (n, channels, height, width).
        y: int64, shape (n,).
        samples: forward-backward passes to average: expectation over transformation (Athalye et al. 2018) for
            a model that is random in itself; 1 for a deterministic one.
        check: look at the logits first.

    Returns:
        Shape of x: the gradient of the sum over images, so each image's does not depend on the batch.

    Raises:
        NotLogits: if the outputs are not finite, or each row looks like a probability distribution.
    """
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        total = torch.zeros((), device=x.device)
        for _ in range(samples):
            logits = model(x)
            if check:
                check_logits(logits)
            total = total + F.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(total, x)
    return gradient / samples if samples > 1 else gradient


def check_logits(logits: torch.Tensor) -> None:
    """Raise `NotLogits` unless `logits`, shape (n, classes), are finite and no probabilities."""
    logits = logits.detach()
    if not bool(logits.isfinite().all()):
        raise NotLogits("the model's outputs contain NaN or infinity")
    if bool((logits >= 0).all()) and torch.allclose(logits.sum(1), torch.ones_like(logits[:, 0]), atol=1e-4):
        raise NotLogits("the model's outputs are probabilities; attacks need logits")
