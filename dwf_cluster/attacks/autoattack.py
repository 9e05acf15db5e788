"""AutoAttack's standard set (Croce and Hein 2020), L-infinity."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from torch import nn

from dwf_cluster.attacks.apgd import apgd, targeted_dlr
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.fab import fab_targeted
from dwf_cluster.attacks.pgd import Iterate, Remaining, WorstCase
from dwf_cluster.attacks.square import square

TARGETS = 9
"""Classes that the targeted attacks try: the most likely ones beside the true class."""

SQUARE_PLANNED = 10_000
"""Queries that its authors have Square's schedule go by, though they give it 5,000."""


def autoattack(model: nn.Module, epsilon: float, worst: WorstCase, *, steps: int = 100, queries: int = 5000) -> None:
    """APGD on cross-entropy, APGD on the targeted DLR, targeted FAB, Square; each on the images that are still robust.

    Where the authors' code differs from their papers, this follows the code.

    Args:
        model: frozen model, pixels in, logits of at least four classes out.
        epsilon: radius of the L-infinity ball, pixels in [0, 1].
        worst: of the clean images, with generators; it records every adversarial image.
        steps, queries: the authors' standard by default.

    Raises:
        NotLogits: if the model returns NaN or probabilities.
    """
    ball = Ball("linf", epsilon)
    targets = worst.logits.argsort(1, descending=True)[
        :, 1 : TARGETS + 1
    ]  # of images that are still robust, the first is true

    def apgd_targeted(rest: Remaining, rank: int) -> Iterator[Iterate]:
        goal = targets[rest.index, rank]
        arguments = (model, rest.x, rest.y, ball, rest.generators)
        return apgd(*arguments, steps=steps, objective=targeted_dlr, target=goal, authors_code=True)

    worst.attack(lambda rest: apgd(model, rest.x, rest.y, ball, rest.generators, steps=steps, authors_code=True))
    for rank in range(targets.shape[1]):
        worst.attack(functools.partial(apgd_targeted, rank=rank))
    for rank in range(targets.shape[1]):
        worst.attack(
            lambda rest, rank=rank: fab_targeted(  # type: ignore[misc]
                model, rest.x, rest.y, epsilon, targets[rest.index, rank], steps=steps
            )
        )
    in_all = queries + 1  # the authors do not count the first
    last = functools.partial(square, queries=in_all, planned=SQUARE_PLANNED, authors_code=True)
    worst.attack(lambda rest: last(model, rest.x, rest.y, epsilon, rest.generators))
