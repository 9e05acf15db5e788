"""Auto-PGD (Croce and Hein 2020, algorithm 1): PGD with momentum whose step size follows its own progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import Objective, cross_entropy, differentiate
from dwf_cluster.attacks.pgd import Iterate

_PROGRESS = 0.75
"""rho: share of steps since the last checkpoint that must have raised the loss, or the step size is halved."""

_INERTIA = 0.75
"""alpha: weight of the new step against the one before."""


def apgd(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    ball: Ball,
    generators: Sequence[torch.Generator],
    *,
    steps: int = 100,
    objective: Objective = cross_entropy,
    target: torch.Tensor | None = None,
    authors_code: bool = False,
) -> Iterator[Iterate]:
    """Attack each image until an iterate is misclassified; long because it is the authors' algorithm in one loop.

    It has more than seven parameters because AutoAttack varies three of them.

    Args:
        model, x, y, ball: as for `pgd`.
        generators: one an image, for the random start.
        steps: number of iterations.
        objective: what to make large. With a target, its labels have shape (n, 2): true and target.
        target: the class that each image is to be classified as, shape (n,).
        authors_code: count the first step as a rise if its loss is above zero, as the authors' code does; else if it
            is above the start's loss, as the paper's condition 1 says.

    Yields:
        x_0 to x_steps, for the images not yet fooled.

    Raises:
        NotLogits: if the model returns NaN or probabilities.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    index, labels = torch.arange(len(x), device=x.device), y if target is None else torch.stack([y, target], 1)
    point = previous = ball.random_surface_point(x, generators)
    gradient, loss, logits = differentiate(model, point, labels, objective)
    yield Iterate(0, index, point, logits, gradient, len(index))
    best, best_gradient, best_loss, last_best = point, gradient, loss, loss
    step_size = torch.full_like(x[:, :1, :1, :1], 2 * ball.epsilon)
    rises, halved = torch.zeros_like(loss), torch.ones_like(loss, dtype=torch.bool)
    period, shortest, shrink = (max(1, int(share * steps)) for share in (0.22, 0.06, 0.03))
    since = 0
    for step in range(1, steps + 1):
        keep = logits.argmax(1) == labels.view(len(x), -1)[:, 0]
        if not bool(keep.all()):
            if not bool(keep.any()):
                return
            x, labels, index, point, previous, gradient, loss = (
                t[keep] for t in (x, labels, index, point, previous, gradient, loss)
            )
            best, best_gradient, best_loss, last_best, step_size, rises, halved = (
                t[keep] for t in (best, best_gradient, best_loss, last_best, step_size, rises, halved)
            )
        inertia = _INERTIA if step > 1 else 1.0
        ahead = ball.project(x, point + step_size * ball.direction(gradient))
        moved = ball.project(x, point + inertia * (ahead - point) + (1 - inertia) * (point - previous))
        previous, point = point, moved
        before = torch.zeros_like(loss) if authors_code and step == 1 else loss
        gradient, loss, logits = differentiate(model, point, labels, objective, check=False)
        yield Iterate(step, index, point, logits, gradient, len(index))
        rises = rises + (loss > before)
        better = loss > best_loss
        best, best_gradient = (
            torch.where(better[:, None, None, None], new, old)
            for new, old in ((point, best), (gradient, best_gradient))
        )
        best_loss = torch.maximum(loss, best_loss)
        since += 1
        if since == period:
            stuck = (rises <= _PROGRESS * period) | (~halved & (last_best >= best_loss))
            back = stuck[:, None, None, None]
            step_size = torch.where(back, step_size / 2, step_size)
            point, gradient = torch.where(back, best, point), torch.where(back, best_gradient, gradient)
            halved, last_best, rises = stuck, best_loss, torch.zeros_like(rises)
            since, period = 0, max(period - shrink, shortest)


def targeted_dlr(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Targeted difference of logits ratio (Croce and Hein 2020, equation 7); needs four classes.

    Args:
        model, x: as for any objective.
        labels: true and target class, shape (n, 2).
    """
    logits: torch.Tensor = model(x)
    ranked = logits.sort(1, descending=True).values
    true, target = logits.gather(1, labels).unbind(1)
    return (target - true) / (ranked[:, 0] - (ranked[:, 2] + ranked[:, 3]) / 2 + 1e-12), logits
