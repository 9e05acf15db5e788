"""Checks for gradient masking that compare two attacks on the same images, by exact tests (`significance`).

A stronger attack must not leave more images than a weaker one (`one_step`, `more_steps`). What a long run of PGD
leaves must also resist other starts, another loss, images of other models, an attack without gradients, and an
unlimited budget must leave nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.pgd import Iterate, Remaining, pgd
from dwf_cluster.attacks.several import last_iterates
from dwf_cluster.attacks.square import square as square_attack
from dwf_cluster.evaluation.check_cost import check_queries
from dwf_cluster.evaluation.inspection import Inspection
from dwf_cluster.evaluation.significance import WIDE_TOLERANCE, Check, beyond, reversed_order

HUGE = 1.0
"""An L-infinity radius at which an attack can turn any image into any other."""


def one_step(inspection: Inspection) -> Iterator[Check]:
    """One step of the ball's size that is a better attack than `steps` steps."""
    run, steps = inspection.white_box, inspection.steps
    meaning = f"PGD-{steps} leaves {_share(run.after_short)}, one step of the same size {_share(run.after_one)}"
    yield reversed_order("one_step", run.after_one, run.after_short, meaning)


def more_steps(inspection: Inspection) -> Iterator[Check]:
    """A short attack that is better than a long one."""
    run, steps = inspection.white_box, inspection.steps
    meaning = f"PGD-{steps} leaves {_share(run.after_short)}, PGD-{4 * steps} {_share(run.after_long)}"
    yield reversed_order("more_steps", run.after_short, run.after_long, meaning)


def converged(inspection: Inspection) -> Iterator[Check]:
    """Images that only a run of four times as many steps fools: the short run had not converged."""
    run, steps = inspection.white_box, inspection.steps
    left, after = run.left_by_short, run.left_by_long
    meaning = f"no iterate of PGD-{steps} fools {_share(left)}, none of PGD-{4 * steps} {_share(after)}"
    yield beyond("converged", left, ~after, meaning, WIDE_TOLERANCE)


def restarts(inspection: Inspection) -> Iterator[Check]:
    """Images that resist a run from the image itself and fall to a run of the same length from a random point."""
    left, after = inspection.white_box.left_by_long, inspection.restarted.robust
    meaning = f"no iterate of PGD-{4 * inspection.steps} fools {_share(left)}, none of it and a restart {_share(after)}"
    yield beyond("restarts", left, ~after, meaning)


def scale_free(inspection: Inspection) -> Iterator[Check]:
    """Images that resist PGD on cross-entropy and fall to PGD on the margin, which large logits do not saturate."""
    left = inspection.white_box.left_by_long
    after = inspection.on_margin.robust
    name = f"PGD-{4 * inspection.steps}"
    meaning = f"no iterate of {name} on cross-entropy fools {_share(left)}, none of it and of {name} on the margin "
    yield beyond("scale_free", left, ~after, meaning + _share(after), WIDE_TOLERANCE)


def transfer(inspection: Inspection) -> Iterator[Check]:
    """Images that resist the white-box attacks and fall to images that were made on other models."""
    left = inspection.left_by_white_box

    def made_on_others(rest: Remaining) -> Iterator[Iterate]:
        # A model without logits has a fault, which its own checks find.
        options = {"step_size": inspection.threat.step_size, "steps": inspection.steps}
        return last_iterates(inspection.others.values(), rest.x, rest.y, inspection.ball, **options)  # type: ignore[arg-type]

    after = inspection.attack(left, made_on_others).robust
    meaning = f"images made on {len(inspection.others)} other models fool {_share(left & ~after)} that resist "
    result = beyond("transfer", left, ~after, meaning + "the white-box attacks")
    yield replace(result, could_fire=result.could_fire and bool(inspection.others))


def black_box(inspection: Inspection) -> Iterator[Check]:
    """Images that only an attack without gradients fools: Square, which exists in L-infinity alone."""
    if inspection.threat.norm != "linf":
        yield Check("black_box", 0.0, 0.0, "not run: Square attacks in L-infinity alone", could_fire=False)
        return
    left, epsilon = inspection.left_by_white_box, inspection.threat.epsilon
    queries = check_queries(inspection.x[0].numel())
    after = inspection.attack(
        left,
        lambda rest: square_attack(inspection.model, rest.x, rest.y, epsilon, rest.generators, queries=queries),
    ).robust
    meaning = f"a black-box attack of {queries} queries fools {_share(left & ~after)} that resist the white-box attacks"
    yield beyond("black_box", left, ~after, meaning)


def huge_epsilon(inspection: Inspection) -> Iterator[Check]:
    """Images that resist an attack with an unlimited budget."""
    correct = inspection.white_box.logits.argmax(1) == inspection.y
    run = functools.partial(pgd, inspection.model, step_size=HUGE / 10, steps=2 * inspection.steps, drop_fooled=True)
    after = inspection.attack(correct, lambda rest: run(rest.x, rest.y, Ball("linf", HUGE))).robust
    meaning = f"{_share(after)} resist an attack with an epsilon of {HUGE:g}, which allows any image"
    yield beyond("huge_epsilon", correct, after, meaning)


def _share(images: torch.Tensor) -> str:
    return f"{float(images.double().mean()):.1%}"
