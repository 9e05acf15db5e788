"""FGSM (equation 3) and PGD (equations 4 and 5) in the L-infinity ball."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from dwf_cluster.attacks.gradient import check_logits, input_gradient


def fgsm(x: torch.Tensor, gradient: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Equation (3): x' = x + epsilon * sign(gradient), inside [0, 1] (Goodfellow et al. 2015).

    Args:
        x: float32 in [0, 1], shape (n, channels, height, width).
        gradient: `input_gradient` at x; one gradient serves every epsilon.
        epsilon: radius of the ball, pixels in [0, 1].
    """
    return (x + epsilon * gradient.sign()).clamp(0, 1)


def random_start(x: torch.Tensor, epsilon: float, generator: torch.Generator) -> torch.Tensor:
    """A point drawn uniformly from the ball around each image, inside [0, 1].

    Args:
        x: float32 in [0, 1].
        epsilon: radius of the ball, pixels in [0, 1].
        generator: of x's device.
    """
    noise = torch.empty_like(x).uniform_(-epsilon, epsilon, generator=generator)
    return (x + noise).clamp(0, 1)


def pgd(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: Sequence[int],
    start: torch.Tensor | None = None,
    gradient: torch.Tensor | None = None,
    eot: int = 1,
) -> Iterator[torch.Tensor]:
    """Equations (4) and (5): x_{i+1} = project(x_i + step_size * sign(gradient at x_i)) (Madry et al. 2018).

    Args:
        model: frozen view, pixels in, logits out.
        x: float32 in [0, 1], shape (n, channels, height, width).
        y: int64, shape (n,).
        epsilon: radius of the ball, pixels in [0, 1].
        step_size: pixels in [0, 1].
        steps: iteration counts, rising. One run yields the iterate at each of them: PGD-10 is a snapshot
            of PGD-50.
        start: x_0; x itself by default, as in the paper.
        gradient: `input_gradient` at the start, where the caller has it already.
        eot: gradients averaged in each iteration.

    Yields:
        The iterate after each number of steps, in the ball and in [0, 1].

    Raises:
        NotLogits: if the model returns NaN or probabilities.
    """
    lower, upper = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    iterate, done = (x if start is None else start), 0
    for count in steps:
        for _ in range(count - done):
            if gradient is None:
                gradient = input_gradient(model, iterate, y, samples=eot, check=done == 0)
            iterate = (iterate + step_size * gradient.sign()).clamp(lower, upper)
            gradient = None
            done += 1
        yield iterate


def pgd_restarts(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    epsilon: float,
    step_size: float,
    steps: int,
    generators: Sequence[torch.Generator],
) -> torch.Tensor:
    """PGD from several random starts; each image keeps the first iterate that is misclassified.

    A fooled image is not attacked again: over restarts only the worst case counts.

    Args:
        model, x, y, epsilon, step_size, steps: as for `pgd`.
        generators: one of x's device for each restart.

    Raises:
        NotLogits: if the model returns NaN or probabilities.
    """
    worst, standing = x.clone(), torch.arange(len(x), device=x.device)
    for generator in generators:
        start = random_start(x, epsilon, generator)[standing]
        (found,) = pgd(
            model, x[standing], y[standing], epsilon=epsilon, step_size=step_size, steps=[steps], start=start
        )
        worst[standing] = found
        with torch.no_grad():
            logits = model(found)
        check_logits(logits)
        standing = standing[logits.argmax(1) == y[standing]]
        if len(standing) == 0:
            break
    return worst
