"""The result of a check, and the exact tests behind the checks that compare two attacks on the same images.

Each test has the level `ALARM_RATE / TESTS` (Bonferroni), so that at most `ALARM_RATE` of the models whose attacks
differ by no more than the tolerance of each check raise an alarm, whatever the number of images.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

    Images: TypeAlias = torch.Tensor | np.ndarray[Any, np.dtype[np.bool_]]
    """Which of n images: bool, shape (n,)."""

ALARM_RATE = 0.05
"""Largest probability, 0..1, that any of the tests raises an alarm for a model without gradient masking."""

TESTS = 9
"""Tests of one model."""

LEVEL = ALARM_RATE / TESTS
"""Largest p of a test that is no alarm."""

TOLERANCE = 0.02
"""Share of all images, 0..1, that one attack may fool beyond another without being a sign. Our assumption; on honest
models restarts, transfer and black box took less (docs/benchmarks.md)."""

WIDE_TOLERANCE = 0.05
"""As `TOLERANCE`, for more steps, another loss or another kind of attack. Our assumption: on adversarially trained
models of CIFAR-10, AutoAttack takes up to five points off PGD's accuracy (Croce and Hein 2020, table 2)."""


@dataclass(frozen=True)
class Check:
    """The result of one check.

    Attributes:
        check: its name.
        value: what was measured.
        limit: the largest value that is no sign of masking.
        meaning: what a larger value means, with the figures.
        p: of the exact test, 0..1; None where there is no test.
        could_fire: whether it could fire for this model on these images.
    """

    check: str
    value: float
    limit: float
    meaning: str
    p: float | None = None
    could_fire: bool = True

    @property
    def fired(self) -> bool:
        """Whether it is a sign of masking."""
        return not self.value <= self.limit  # NaN is a sign

    def row(self, model: str, examples: int) -> dict[str, Any]:
        """As a row of the table `checks`.

        Args:
            model: that was checked.
            examples: number of images that it was checked on.
        """
        return {"model": model, **asdict(self), "fired": self.fired, "examples": examples}


def beyond(check: str, attacked: Images, fooled: Images, meaning: str, tolerance: float = TOLERANCE) -> Check:
    """Test whether an attack fools images that another attack leaves; exact binomial, one-sided.

    The null hypothesis: an image is left by the one and fooled by the other with a probability of at most `tolerance`.

    Args:
        check: name of the check.
        attacked: bool, shape (n,): images that the other attack leaves; only these can be fooled.
        fooled: bool, shape (n,): those of them that the attack fools.
        meaning: the figures; the smallest gap that is a sign is added.
        tolerance: share of all images, 0..1.

    Returns:
        Its value is the gap: the share of all n images that the attack fools beyond the other.
    """
    images, count, possible = len(attacked), int((attacked & fooled).sum()), int(attacked.sum())
    critical = _smallest(images, tolerance, LEVEL)
    return Check(
        check,
        count / max(1, images),
        min(critical - 1, images) / max(1, images),
        _with_smallest(meaning, critical, images, possible),
        _tail(count, images, tolerance),
        could_fire=possible >= critical,
    )


def reversed_order(check: str, weak: Images, strong: Images, meaning: str) -> Check:
    """Test whether the weaker of two attacks fools more images than the stronger; exact McNemar test, one-sided.

    The null hypothesis: of the images that only one attack fools, the weak one fools at most half.

    Args:
        check: name of the check.
        weak, strong: bool, shape (n,): images that are classified correctly after the attack.
        meaning: the figures; the smallest gap that is a sign is added.

    Returns:
        Its value is the gap: accuracy under the strong attack less accuracy under the weak one.
    """
    images, possible = max(1, len(weak)), int(strong.sum())
    only_weak, only_strong = int((strong & ~weak).sum()), int((weak & ~strong).sum())
    differing = only_weak + only_strong
    critical, alone = _smallest(differing, 0.5, LEVEL), _smallest(images, 0.5, LEVEL, all_of_them=True)
    return Check(
        check,
        (only_weak - only_strong) / images,
        (2 * (critical - 1) - differing) / images,
        _with_smallest(meaning, alone, images, possible),
        _tail(only_weak, differing, 0.5),
        could_fire=possible >= alone,
    )


def _with_smallest(meaning: str, critical: int, images: int, possible: int) -> str:
    """Add the smallest gap that the test can see, or that it can see none."""
    if possible < critical:
        return f"{meaning}; the test needs {critical} images, and {possible} of {images} were left"
    return f"{meaning}; the smallest gap that is a sign is {critical / images:.1%}, {critical} of {images} images"


def _tail(count: int, trials: int, share: float) -> float:
    """Probability of `count` or more successes in `trials`, each of probability `share`."""
    from scipy.special import bdtrc  # lighter than scipy.stats; not needed where no check runs

    return float(bdtrc(count - 1, trials, share)) if count > 0 else 1.0


def _smallest(trials: int, share: float, level: float, all_of_them: bool = False) -> int:
    """The smallest number of successes whose tail probability is at most `level`; `trials` + 1 if there is none.

    Args:
        trials: their number.
        share: probability of a success.
        level: largest tail probability.
        all_of_them: of as many trials as successes, up to `trials`.
    """
    counts = range(trials + 1)
    return next((k for k in counts if _tail(k, k if all_of_them else trials, share) <= level), trials + 1)
