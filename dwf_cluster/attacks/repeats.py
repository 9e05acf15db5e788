"""Gradients of a run of PGD whose iterates repeat: those that are known are not computed again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dwf_cluster.attacks.gradient import Objective, differentiate

_DEVICES = ("cpu",)
"""Where known gradients are used. A GPU's host would wait for each comparison, and its large images rarely repeat."""

_COMPARED = 4
"""Known images in each pass that does not have all images. Where sums are rounded in another way, all images differ."""

_MULTIPLE = 16
"""Of which such a pass has a multiple of images: for each number of images, libraries choose and build kernels anew."""


@dataclass(frozen=True)
class _Known:
    """Images x, shape (n, channels, height, width), with their gradients and logits."""

    x: torch.Tensor
    gradient: torch.Tensor
    logits: torch.Tensor

    def of(self, images: torch.Tensor) -> _Known:
        """The same of some of the images: their numbers, or bool of shape (n,)."""
        return _Known(self.x[images], self.gradient[images], self.logits[images])


class Gradients:
    """The gradients that one run of PGD follows.

    A run with a constant step soon alternates between two iterates, for most images: its next iterate depends on the
    last one alone. So where an image's iterate equals one of the last two, gradient and logits are taken from there,
    and only the other images pass through the model.

    That holds for models that treat each image by itself and draw nothing at random, and libraries may round sums in
    another way in small batches. Therefore each such pass has known images too, whose gradients and logits must come
    out equal, bit for bit. If they do not, all images pass, and later passes are larger. The smallest size that agrees
    is found by bisection; larger ones are taken to agree with it.

    Args:
        model: frozen model, pixels in, logits out.
        objective, samples: as of `differentiate`.
    """

    def __init__(self, model: nn.Module, objective: Objective, samples: int) -> None:
        self._model, self._objective, self._samples = model, objective, samples
        self._known: list[_Known] = []  # of the last two iterates, the last one first
        self._agreed = self._differed = 0  # images of the smallest pass that agreed, of the largest that did not

    def at(self, x: torch.Tensor, labels: torch.Tensor, *, check: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient, shape of x, and logits, shape (n, classes), at the next iterate.

        Args:
            x, labels, check: as of `differentiate`; the images of the last call that were kept.

        Raises:
            NotLogits: as `differentiate`.
        """
        now = self._with_known(x, labels) if len(self._known) == 2 else self._computed(x, labels, check)
        if x.device.type in _DEVICES:
            self._known = [now, *self._known[:1]]
        return now.gradient, now.logits

    def keep(self, images: torch.Tensor) -> None:
        """Go on with some images of the last call: bool, shape (n,)."""
        if not self._known or bool(images.all()):
            return
        if int(images.sum()) >= self._agreed > 0:
            self._known = [known.of(images) for known in self._known]
        else:  # so few may have other values
            self._known, self._agreed, self._differed = [], 0, 0

    def _computed(self, x: torch.Tensor, labels: torch.Tensor, check: bool = False) -> _Known:
        gradient, _, logits = differentiate(self._model, x, labels, self._objective, samples=self._samples, check=check)
        return _Known(x, gradient, logits)

    def _with_known(self, x: torch.Tensor, labels: torch.Tensor) -> _Known:
        """Take what is known; only the other images, and known ones to compare, pass through the model."""
        last, before = self._known
        is_last, is_before = ((x == known.x).flatten(1).all(1) for known in self._known)
        is_new = ~(is_last | is_before)
        new = int(is_new.sum())
        gradient = torch.where(is_last[:, None, None, None], last.gradient, before.gradient)
        logits = torch.where(is_last[:, None], last.logits, before.logits)
        if new == 0 and self._agreed:
            return _Known(x, gradient, logits)
        wanted = max(new + _COMPARED, (self._differed + (self._agreed or len(x))) // 2)
        size = -(-wanted // _MULTIPLE) * _MULTIPLE
        if size >= len(x):
            return self._computed(x, labels)
        rows = is_new.argsort(descending=True, stable=True)[:size]
        passed, known = self._computed(x[rows], labels[rows]), rows[new:]
        is_equal = torch.equal(passed.gradient[new:], gradient[known])
        if not (is_equal and torch.equal(passed.logits[new:], logits[known])):
            self._differed = max(self._differed, size)
            return self._computed(x, labels)
        self._agreed = min(self._agreed or size, size)
        gradient[rows], logits[rows] = passed.gradient, passed.logits
        return _Known(x, gradient, logits)
