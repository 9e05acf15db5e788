"""FGSM (equation 3), PGD (equations 4 and 5), and the worst case over iterates, starts and attacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import Objective, cross_entropy, predict
from dwf_cluster.attacks.gradient_cache import GradientCache


@dataclass(frozen=True)
class Iterate:
    """The state of an attack after some steps, for the n images that it still attacks.

    Attributes:
        step: number of steps done, from 0.
        index: which images of the batch these are, shape (n,).
        x: the adversarial images, shape (n, channels, height, width).
        logits: the model's at x, shape (n, classes), where the attack has computed them; else None.
        gradient: of the attack's loss at x, shape of x, where the attack continues; else None.
        gradient_count: gradient evaluations of single images that `gradient` needs; some are reused (`GradientCache`).
    """

    step: int
    index: torch.Tensor
    x: torch.Tensor
    logits: torch.Tensor | None = None
    gradient: torch.Tensor | None = None
    gradient_count: int = 0


def fgsm(x: torch.Tensor, gradient: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Equation (3): x' = x + epsilon * sign(gradient), inside [0, 1] (Goodfellow et al. 2015).

    Args:
        x: float in [0, 1], shape (n, channels, height, width).
        gradient: of the cross-entropy at x; one gradient serves every epsilon.
        epsilon: radius of the ball, pixels in [0, 1].
    """
    return (x + epsilon * gradient.sign()).clamp(0, 1)


def pgd(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    ball: Ball,
    *,
    step_size: float,
    steps: int,
    start: torch.Tensor | None = None,
    objective: Objective = cross_entropy,
    target: torch.Tensor | None = None,
    momentum: float = 0.0,
    eot: int = 1,
    drop_fooled: bool = False,
) -> Iterator[Iterate]:
    """Equations (4) and (5): x_{i+1} = project(x_i + step_size * direction(gradient at x_i)) (Madry et al. 2018).

    One run serves every shorter one: PGD-10 is its tenth iterate, and FGSM's gradient the one at its first. It has
    more than seven parameters because every variant of PGD is one of its settings.

    Args:
        model: frozen model, pixels in, logits out.
        x: float in [0, 1], shape (n, channels, height, width).
        y: int64, shape (n,).
        ball: the allowed images.
        step_size: in the ball's norm, pixels in [0, 1].
        steps: number of iterations, from 0.
        start: x_0; x itself by default (our assumption: the paper does not say where PGD starts).
        objective: what to make large, by default cross-entropy; with a target, its labels are true and target, (n, 2).
        target: the class that each image is to be classified as, shape (n,).
        momentum: decay of the sum of gradients, each divided by its mean absolute value (Dong et al. 2018).
        eot: gradients averaged in each iteration (expectation over transformation).
        drop_fooled: attack an image no further once an iterate is misclassified: for worst cases only.

    Yields:
        x_0 to x_steps; without logits and gradient at the last, which no step follows.

    Raises:
        NotLogits: if the model returns NaN or probabilities.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    iterate, index = (x if start is None else start), torch.arange(len(x), device=x.device)
    labels = y if target is None else torch.stack([y, target], 1)
    velocity = torch.zeros_like(x) if momentum else None
    cache = GradientCache(model, objective, eot)
    for step in range(steps):
        gradient, logits = cache.compute(iterate, labels, check=step == 0)
        yield Iterate(step, index, iterate, logits, gradient, len(index) * eot)
        if drop_fooled:
            keep = logits.argmax(1) == y
            if not bool(keep.any()):
                return
            x, y, labels, index, iterate, gradient = (t[keep] for t in (x, y, labels, index, iterate, gradient))
            velocity = velocity[keep] if velocity is not None else None
            cache.keep(keep)
        if velocity is not None:
            scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
            gradient = velocity = momentum * velocity + gradient / scale
        iterate = ball.project(x, iterate + step_size * ball.direction(gradient, iterate))
    yield Iterate(steps, index, iterate)


def with_logits(model: nn.Module, iterate: Iterate) -> Iterate:
    """The iterate, with the model's logits in any case."""
    return iterate if iterate.logits is not None else replace(iterate, logits=predict(model, iterate.x))


@dataclass(frozen=True)
class Remaining:
    """The n images of a batch that no attack has fooled yet.

    Attributes:
        index: which of the batch they are, shape (n,).
        x, y: clean images and labels.
        generators: of random draws, one an image; empty if the batch has none.
    """

    index: torch.Tensor
    x: torch.Tensor
    y: torch.Tensor
    generators: list[torch.Generator]


class WorstCase:
    """The worst case over iterates, starts and attacks: each image keeps the first misclassified version of it.

    Attributes:
        x: the adversarial images so far: the first that fooled the model, else the last that was seen.
        logits: the model's at x, shape (n, classes).
        robust: which images were classified correctly in all versions so far, shape (n,).
        gradient_count: gradient evaluations of single images in `attack`.
    """

    def __init__(
        self,
        model: nn.Module,
        x: torch.Tensor,
        y: torch.Tensor,
        logits: torch.Tensor,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        """Begin with clean images, labels, the model's logits and, for random attacks, one generator an image."""
        self._model, self._x, self._y, self._generators = model, x, y, generators
        self.x, self.logits = x.clone(), logits.clone()
        self.robust = logits.argmax(1) == y
        self.gradient_count = 0

    def see(self, iterate: Iterate) -> None:
        """Take one more version of some images."""
        logits = with_logits(self._model, iterate).logits
        assert logits is not None
        is_robust = self.robust[iterate.index]
        index = iterate.index[is_robust]
        self.x[index], self.logits[index] = iterate.x[is_robust], logits[is_robust]
        self.robust[index] = self.logits[index].argmax(1) == self._y[index]

    def attack(self, run: Callable[[Remaining], Iterator[Iterate]]) -> None:
        """Attack the images that are still robust; the run counts them from 0 in its iterates."""
        remaining = self.robust.nonzero().squeeze(1)
        if len(remaining) == 0:
            return
        generators = [self._generators[i] for i in remaining.tolist()] if self._generators else []
        for iterate in run(Remaining(remaining, self._x[remaining], self._y[remaining], generators)):
            self.see(replace(iterate, index=remaining[iterate.index]))
            self.gradient_count += iterate.gradient_count
