"""The sets of allowed perturbations: L-infinity and L2 balls around each image, cut with [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Ball:
    """All images within `epsilon` of an image and in [0, 1].

    Attributes:
        norm: `linf`: the largest change of a value; `l2`: the Euclidean length over all values of an image.
        epsilon: radius, pixels in [0, 1].
    """

    norm: Literal["linf", "l2", "l1"]
    epsilon: float

    def project(self, x: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """The nearest allowed point to each of `moved` (for L2: to the ball first, then to [0, 1])."""
        if self.norm == "linf":
            return moved.clamp((x - self.epsilon).clamp(min=0), (x + self.epsilon).clamp(max=1))
        change = moved - x
        return (x + change * (self.epsilon / _length(change)).clamp(max=1)).clamp(0, 1)

    def direction(self, gradient: torch.Tensor) -> torch.Tensor:
        """Steepest ascent by one unit of the norm: the sign, or the gradient at length one."""
        return gradient.sign() if self.norm == "linf" else gradient / _length(gradient)

    def random_point(self, x: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor:
        """A point drawn uniformly from the ball around each image, then clipped to [0, 1].

        Args:
            x: shape (n, channels, height, width), in [0, 1].
            generators: n of the CPU, one an image: no draw depends on the batch.
        """
        if self.norm == "linf":
            noise = uniform(x, generators) * self.epsilon
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
        else:
            noise = self.direction(draw(x, generators, torch.randn))
        return (x + self.epsilon * noise).clamp(0, 1)

    def distance(self, x: torch.Tensor, moved: torch.Tensor) -> torch.Tensor:
        """How far each image was moved, shape (n,)."""
        change = (moved - x).flatten(1)
        length: torch.Tensor = change.abs().amax(1) if self.norm == "linf" else change.norm(dim=1)
        return length


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
