"""The sets of allowed perturbations: L-infinity, L2 and L1 balls around each image, cut with [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

_SLIDE_PART = 100
"""One value in this many is changed by a step in L1: the authors' sparsity of 99 %."""

_SMALLEST = 1e-30
"""Of a random number in (0, 1] whose logarithm is taken."""


@dataclass(frozen=True)
class Ball:
    """All images within `epsilon` of an image and in [0, 1].

    Attributes:
        norm: `linf`: the largest change of a value; `l2`: the Euclidean length over all values of an image; `l1`: the
            sum of the changes of all values.
        epsilon: radius, pixels in [0, 1].
    """

    norm: Literal["linf", "l2", "l1"]
    epsilon: float

    def project(self, x: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """The nearest allowed point to each of `moved` (for L2 and L1: to the ball first, then to [0, 1])."""
        if self.norm == "linf":
            return moved.clamp(*self.bounds(x))
        change = moved - x
        if self.norm == "l1":
            return (x + project_to_l1(change, self.epsilon)).clamp(0, 1)
        return (x + change * (self.epsilon / _length(change)).clamp(max=1)).clamp(0, 1)

    def bounds(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In L-infinity: smallest and largest allowed values, each of x's shape."""
        return (x - self.epsilon).clamp(min=0), (x + self.epsilon).clamp(max=1)

    def direction(self, gradient: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """Steepest ascent by one unit of the norm: the sign, or the gradient at length one.

        In L1 the step of SLIDE (Tramer and Boneh 2019, algorithm 1): equal changes, by the gradient's signs, of the 1 %
        of values with the largest gradients; steepest ascent itself would change one value only.

        Args:
            gradient: shape (n, channels, height, width).
            at: the images that it was computed at. In L1, a value at the end of [0, 1] that would leave it is not
                changed, as in the authors' code: dark images would hardly move.
        """
        if self.norm == "linf":
            return gradient.sign()
        if self.norm == "l2":
            return gradient / _length(gradient)
        if at is not None:
            gradient = gradient.masked_fill(((at <= 0) & (gradient < 0)) | ((at >= 1) & (gradient > 0)), 0)
        size = gradient.flatten(1).abs()
        changed = 1 + (size.shape[1] - 1) // _SLIDE_PART
        least = size.topk(changed, dim=1).values[:, -1][:, None, None, None]
        signs = gradient.sign() * (gradient.abs() >= least)
        return signs / _sum(signs)

    def random_point(self, x: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """A point drawn uniformly from the ball around each image, then clipped to [0, 1].

        Args:
            x: shape (n, channels, height, width), in [0, 1].
            generators: n of the CPU, one an image: no draw depends on the batch.
        """
        if self.norm == "linf":
            noise = uniform(x, generators) * self.epsilon
        elif self.norm == "l1":  # Barthe et al. 2005: Laplace numbers over their sum and one exponential number
            laplace = _laplace(x, generators)
            beyond = -draw(x[:, :1, :1, :1], generators, torch.rand).clamp(min=_SMALLEST).log()
            noise = self.epsilon * laplace / (_sum(laplace) + beyond)
        else:
            gaussian = draw(x, generators, torch.randn)
            radius = draw(x[:, :1, :1, :1], generators, torch.rand) ** (1 / x[0].numel())
            noise = gaussian / _length(gaussian) * radius * self.epsilon
        return (x + noise).clamp(0, 1)

    def random_surface_point(self, x: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """As `random_point`, in a random direction at full length: where APGD's authors start."""
        if self.norm == "linf":
            noise = uniform(x, generators)
            noise = noise / noise.flatten(1).abs().amax(1)[:, None, None, None]
        elif self.norm == "l1":
            laplace = _laplace(x, generators)
            noise = laplace / _sum(laplace)
        else:
            noise = self.direction(draw(x, generators, torch.randn))
        return (x + self.epsilon * noise).clamp(0, 1)

    def distance(self, x: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """How far each image was moved, shape (n,)."""
        change = (moved - x).flatten(1)
        length: torch.Tensor = change.norm(p={"linf": torch.inf, "l2": 2, "l1": 1}[self.norm], dim=1)
        return length


def project_to_l1(change: torch.Tensor, radius: float) -> torch.Tensor:
    """The nearest point to each change whose sum of absolute values is at most `radius` (Duchi et al. 2008, figure 1).

    Exact, by sorting: every absolute value is lowered by one threshold, to zero at least.

    Args:
        change: shape (n, ...).
        radius: above 0.
    """
    size = change.flatten(1).abs()
    falling = size.sort(dim=1, descending=True).values
    excess = falling.cumsum(1) - radius
    rank = torch.arange(1, size.shape[1] + 1, device=size.device)
    kept = (falling * rank > excess).sum(1, keepdim=True).clamp(min=1)
    threshold = (excess.gather(1, kept - 1) / kept).clamp(min=0)
    return (change.flatten(1).sign() * (size - threshold).clamp(min=0)).view_as(change)


def uniform(x: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Numbers in [-1, 1), of x's shape, device and type; each image's from its own generator."""
    return 2 * draw(x, generators, torch.rand) - 1


def draw(x: torch.Tensor, generators: Sequence[torch.Generator], kind: object) -> torch.Tensor:
    """Draws of `torch.rand` or `torch.randn` for each image from its own generator, in x's shape."""
    draws = [kind(x.shape[1:], generator=generator) for generator in generators]  # type: ignore[operator]
    return torch.stack(draws).to(x.device, x.dtype)


def _length(change: torch.Tensor) -> torch.Tensor:
    """Euclidean length of each image's change, never zero, shape (n, 1, 1, 1)."""
    length: torch.Tensor = change.flatten(1).norm(dim=1).clamp(min=1e-12)
    return length[:, None, None, None]


def _sum(change: torch.Tensor) -> torch.Tensor:
    """Sum of each image's absolute changes, never zero, shape (n, 1, 1, 1)."""
    total: torch.Tensor = change.flatten(1).abs().sum(1).clamp(min=1e-12)
    return total[:, None, None, None]


def _laplace(x: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Laplace numbers in x's shape: the logarithm of a uniform number, with the sign of another one."""
    sign = uniform(x, generators).sign()
    return -sign * draw(x, generators, torch.rand).clamp(min=_SMALLEST).log()
