"""Targeted Fast Adaptive Boundary attack (Croce and Hein 2019): the smallest L-infinity change to a given class."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dwf_cluster.attacks.gradient import differentiate, predict
from dwf_cluster.attacks.pgd import Iterate

_LARGEST_BIAS, _OVERSHOOT, _BACKWARD = 0.1, 1.05, 0.9
"""alpha_max, eta and beta of the paper's algorithm 1."""


def fab_targeted(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float, target: torch.Tensor, *, steps: int = 100
) -> Iterator[Iterate]:
    """Walk to the boundary between the true and the target class, and stay near the image while doing so.

    Args:
        model, x, y: as for `pgd`; all images classified correctly.
        epsilon: an image is done once it is misclassified this near, L-infinity, pixels in [0, 1].
        target: class for each image, shape (n,).
        steps: number of iterations.

    Yields:
        After each step the images that it fooled inside the ball, possibly none.

    Raises:
        NotLogits: if the model returns NaN or probabilities.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    point, index, labels = x, torch.arange(len(x), device=x.device), torch.stack([y, target], 1)
    for step in range(1, steps + 1):
        gradient, ahead, _ = differentiate(model, point, labels, _target_less_true, check=False)
        # The boundary, linearised at `point`, is where <gradient, z - point> = -ahead.
        from_point = project_to_hyperplane(point, gradient, ahead)
        from_image = project_to_hyperplane(x, gradient, ahead + (gradient * (x - point)).flatten(1).sum(1))
        near, far = (d.flatten(1).abs().amax(1).clamp(min=1e-8) for d in (from_point, from_image))
        bias = (near / (near + far)).clamp(max=_LARGEST_BIAS)[:, None, None, None]
        point = (point + _OVERSHOOT * from_point) * (1 - bias) + (x + _OVERSHOOT * from_image) * bias
        point = point.clamp(0, 1)
        logits = predict(model, point)
        fooled = logits.argmax(1) != labels[:, 0]
        done = fooled & ((point - x).flatten(1).abs().amax(1) <= epsilon)
        yield Iterate(step, index[done], point[done], logits[done], gradient_count=len(index))
        if bool(done.all()):
            return
        point = torch.where(fooled[:, None, None, None], x + _BACKWARD * (point - x), point)
        x, labels, index, point = (t[~done] for t in (x, labels, index, point))


def project_to_hyperplane(x: torch.Tensor, normal: torch.Tensor, height: torch.Tensor) -> torch.Tensor:
    """The change d of least L-infinity norm with <normal, d> = -height and x + d in [0, 1].

    Every value moves by the same amount, or by the room it has: the amount at which the moves add up to
    `height` is found from the sorted rooms. Where no allowed change reaches the hyperplane, all go as far as they can.

    Args:
        x: shape (n, channels, height, width).
        normal: shape of x.
        height: shape (n,).
    """
    flat, weight = x.flatten(1), normal.flatten(1)
    towards = -(weight * height.sign()[:, None]).sign()
    room = torch.where(towards > 0, 1 - flat, flat).clamp(min=0)
    sorted_room, order = room.sort(1)
    sorted_weight = weight.abs().gather(1, order)
    moved = torch.cumsum(sorted_weight * sorted_room, 1)
    free = (sorted_weight.sum(1, keepdim=True) - torch.cumsum(sorted_weight, 1)).clamp(min=0)
    reached = moved + sorted_room * free  # what a move by each room adds up to; rises along the row
    target = height.abs()[:, None]
    first = torch.searchsorted(reached, target).clamp(max=room.shape[1] - 1)
    before = (first - 1).clamp(min=0)
    has_before = first > 0
    gained = torch.where(has_before, moved.gather(1, before), torch.zeros_like(target))
    slope = torch.where(has_before, free.gather(1, before), sorted_weight.sum(1, keepdim=True))
    amount = ((target - gained) / slope.clamp(min=1e-12)).clamp(min=0)
    return (towards * torch.minimum(room, amount)).view_as(x)


def _target_less_true(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits: torch.Tensor = model(x)
    true, target = logits.gather(1, labels).unbind(1)
    return target - true, logits
