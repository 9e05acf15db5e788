"""Gradients of a run of PGD: where an image's iterate repeats, its gradient is reused."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import nn

from dwf_cluster.attacks.gradient import Objective, differentiate, is_one_pass
from dwf_cluster.models.deterministic import is_plain

_DEVICES = ("cpu",)
"""Where gradients are reused. A GPU's host would wait for each comparison, and its large images rarely repeat."""

_COMPARED = 4
"""Cached images that each partial pass computes again, for comparison. Where rounding differs, all images differ."""

_MULTIPLE = 16
"""The size of a partial pass is a multiple of this, because libraries build kernels anew for each size."""


@dataclass(frozen=True)
class _Cached:
    """Images x, shape (n, channels, height, width), with their gradients and logits."""

    x: torch.Tensor
    gradient: torch.Tensor
    logits: torch.Tensor

    def select(self, images: torch.Tensor) -> _Cached:
        """Some of the images: their numbers, or bool of shape (n,)."""
        return _Cached(self.x[images], self.gradient[images], self.logits[images])


class GradientCache:
    """The gradients that one run of PGD follows, with those of its last two iterates in a cache.

    A run with a constant step soon alternates between two iterates, for most images: its next iterate depends on the
    last one alone. So where an image's iterate equals one of the last two, gradient and logits are reused, and a
    partial pass computes the other images. No bit of a result changes:

    - Gradients are reused only of plain models (`models.deterministic.is_plain`), and of batches that are one pass.
    - Libraries may round sums in another way in small batches. Therefore a partial pass has cached images too, whose
      gradients and logits must be equal, bit for bit. If they are not, all images are computed, and later partial
      passes are larger. Bisection finds the smallest size that is equal; larger sizes are taken to be equal.

    Args:
        model: frozen model, pixels in, logits out.
        objective, samples: as of `differentiate`.
    """

    def __init__(self, model: nn.Module, objective: Objective, samples: int) -> None:
        self._model, self._objective, self._samples = model, objective, samples
        self._last_two: list[_Cached] = []  # the last iterate first
        self._smallest_equal = self._largest_different = 0  # images of partial passes; 0: of none

    def compute(self, x: torch.Tensor, labels: torch.Tensor, *, check: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient, shape of x, and logits, shape (n, classes), at the next iterate.

        Args:
            x, labels: as of `differentiate`; the images of the last call that were kept.
            check: as of `differentiate`; all images are computed.

        Raises:
            NotLogits: as `differentiate`.
        """
        is_reused = len(self._last_two) == 2 and not check
        now = self._with_reused(x, labels) if is_reused else self._computed(x, labels, check)
        if x.device.type in _DEVICES and is_one_pass(self._model, x):
            self._last_two = [now, *self._last_two[:1]]
        return now.gradient, now.logits

    def keep(self, images: torch.Tensor) -> None:
        """Go on with some images of the last call: bool, shape (n,)."""
        if not self._last_two or bool(images.all()):
            return
        if int(images.sum()) >= self._smallest_equal > 0:
            self._last_two = [cached.select(images) for cached in self._last_two]
        else:  # a smaller batch may be rounded in another way
            self._last_two, self._smallest_equal, self._largest_different = [], 0, 0

    @functools.cached_property
    def _is_plain(self) -> bool:
        return is_plain(self._model)

    def _computed(self, x: torch.Tensor, labels: torch.Tensor, check: bool = False) -> _Cached:
        gradient, _, logits = differentiate(self._model, x, labels, self._objective, samples=self._samples, check=check)
        return _Cached(x, gradient, logits)

    def _with_reused(self, x: torch.Tensor, labels: torch.Tensor) -> _Cached:
        """Reuse what is cached, and compute the other images by a partial pass."""
        last, before = self._last_two
        is_last, is_before = ((x == cached.x).flatten(1).all(1) for cached in self._last_two)
        is_new = ~(is_last | is_before)
        new = int(is_new.sum())
        wanted = max(new + _COMPARED, (self._largest_different + (self._smallest_equal or len(x))) // 2)
        size = -(-wanted // _MULTIPLE) * _MULTIPLE
        if size >= len(x) or not self._is_plain:
            return self._computed(x, labels)
        gradient = torch.where(is_last[:, None, None, None], last.gradient, before.gradient)
        logits = torch.where(is_last[:, None], last.logits, before.logits)
        if new == 0 and self._smallest_equal:
            return _Cached(x, gradient, logits)
        rows = is_new.argsort(descending=True, stable=True)[:size]
        partial, compared = self._computed(x[rows], labels[rows]), rows[new:]
        is_equal = torch.equal(partial.gradient[new:], gradient[compared])
        if not (is_equal and torch.equal(partial.logits[new:], logits[compared])):
            self._largest_different = max(self._largest_different, size)
            if size >= self._smallest_equal:
                self._smallest_equal = 0
            return self._computed(x, labels)
        self._smallest_equal = min(self._smallest_equal or size, size)
        gradient[rows], logits[rows] = partial.gradient, partial.logits
        return _Cached(x, gradient, logits)
