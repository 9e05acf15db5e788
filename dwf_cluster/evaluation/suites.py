"""The runners of the suites: from a batch of images to the attacked images of the columns.

To add a suite: a function here or in a file beside this one, and an entry in `registry.SUITES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace

from dwf_cluster.attacks.apgd import apgd as apgd_attack
from dwf_cluster.attacks.autoattack import autoattack as autoattack_attack
from dwf_cluster.attacks.ball import Ball, uniform
from dwf_cluster.attacks.gradient import Objective, carlini_wagner, cross_entropy, predict
from dwf_cluster.attacks.pgd import Iterate, WorstCase, fgsm, pgd, with_logits
from dwf_cluster.attacks.routing import expert_aimed, gate_aimed, routed
from dwf_cluster.attacks.square import square as square_attack
from dwf_cluster.evaluation.registry import TRANSFER, longest_pgd, transfer_column
from dwf_cluster.evaluation.run import Attacked, Batch

MOMENTUM = 1.0
"""Decay of `pgd_momentum`'s gradients, as in its paper."""


def paper(batch: Batch) -> Iterator[Attacked]:
    """Table 3, from one run of PGD and, for images that are robust after it, its restarts.

    The run's first gradient is FGSM's at every epsilon, its iterates are the PGD columns and, with one EoT
    sample and a deterministic model, the adaptive column; their logits come with the gradients.
    """
    model, evaluation, x, y = batch.model, batch.evaluation, batch.x, batch.y
    *others, restarted, adaptive = batch.columns
    ball, step_size = Ball(batch.threat.norm, batch.threat.epsilon), batch.threat.step_size
    by_steps = {column.steps: column for column in others if column.attack == "pgd"}
    is_one_run = evaluation.eot == 1
    steps = max(longest_pgd(evaluation), evaluation.restart_steps, evaluation.adaptive_steps if is_one_run else 0)

    run = pgd(model, x, y, ball, step_size=step_size, steps=steps)
    first = next(run)
    assert first.logits is not None
    assert first.gradient is not None
    count, worst = first.gradient_count, WorstCase(model, x, y, first.logits, batch.generators)
    for column in others:
        if column.attack == "clean":
            yield Attacked(column, x, first.logits)
        if column.attack == "fgsm":
            assert column.epsilon is not None
            yield Attacked(column, fgsm(x, first.gradient, column.epsilon), None, count)
            count = 0
    for step in run:
        iterate = with_logits(model, step)
        if iterate.step <= evaluation.restart_steps:
            worst.see(iterate)
        if iterate.step in by_steps:
            yield Attacked(by_steps[iterate.step], iterate.x, iterate.logits, count)
            count = 0
        if iterate.step == evaluation.adaptive_steps and is_one_run:
            yield Attacked(adaptive, iterate.x, iterate.logits, count)
            count = 0
        if iterate.step == longest_pgd(evaluation) and TRANSFER in evaluation.beyond:
            column = transfer_column(evaluation, batch.threat, batch.name)
            yield from (Attacked(column, iterate.x, model=other) for other in batch.models if other != batch.name)
        count += iterate.gradient_count

    restart = functools.partial(pgd, step_size=step_size, steps=evaluation.restart_steps, drop_fooled=True)
    for _ in range(1, evaluation.restarts):
        worst.attack(
            lambda rest: restart(model, rest.x, rest.y, ball, start=ball.random_point(rest.x, rest.generators))
        )
    yield Attacked(restarted, worst.x, worst.logits, count + worst.gradient_count)
    if not is_one_run:
        options = {"step_size": step_size, "steps": evaluation.adaptive_steps, "eot": evaluation.eot}
        end = _last(pgd(model, x, y, ball, **options))  # type: ignore[arg-type]
        yield Attacked(adaptive, end.x, None, end.gradient_count)


def noise(batch: Batch) -> Iterator[Attacked]:
    """Random signs: the floor of every attack."""
    (column,) = batch.columns
    assert column.epsilon is not None
    moved = batch.x + column.epsilon * uniform(batch.x, batch.generators).sign()
    yield Attacked(column, Ball("linf", column.epsilon).project(batch.x, moved))


def pgd_variant(batch: Batch) -> Iterator[Attacked]:
    """PGD with momentum, with Carlini and Wagner's loss, or in the L2 ball; the last iterate, as in the PGD columns."""
    (column,) = batch.columns
    assert column.epsilon is not None
    assert column.step_size is not None
    assert column.steps is not None
    last = _last(
        pgd(
            batch.model,
            batch.x,
            batch.y,
            Ball(column.norm or "linf", column.epsilon),
            step_size=column.step_size,
            steps=column.steps,
            objective=carlini_wagner if column.attack == "pgd_cw" else cross_entropy,
            momentum=MOMENTUM if column.attack == "pgd_momentum" else 0.0,
        )
    )
    yield Attacked(column, last.x, None, last.gradient_count)


def auto_pgd(batch: Batch) -> Iterator[Attacked]:
    """APGD on cross-entropy, in the ball of its column."""
    (column,) = batch.columns
    ball, steps, model = Ball(column.norm or "linf", column.epsilon or 0), batch.evaluation.apgd_steps, batch.model
    worst = _worst_case(batch)
    worst.attack(lambda rest: apgd_attack(model, rest.x, rest.y, ball, rest.generators, steps=steps))
    yield Attacked(column, worst.x, worst.logits, worst.gradient_count)


def square(batch: Batch) -> Iterator[Attacked]:
    """Square, which uses only the model's outputs."""
    (column,) = batch.columns
    epsilon, queries, model = batch.threat.epsilon, batch.evaluation.square_queries, batch.model
    worst = _worst_case(batch)
    worst.attack(lambda rest: square_attack(model, rest.x, rest.y, epsilon, rest.generators, queries=queries))
    yield Attacked(column, worst.x, worst.logits, worst.gradient_count)


def autoattack(batch: Batch) -> Iterator[Attacked]:
    """AutoAttack's standard set."""
    (column,) = batch.columns
    worst = _worst_case(batch)
    autoattack_attack(batch.model, batch.threat.epsilon, worst)
    yield Attacked(column, worst.x, worst.logits, worst.gradient_count)


def pgd_gate(batch: Batch) -> Iterator[Attacked]:
    """PGD that aims at the gate of a mixture too."""
    (column,) = batch.columns
    model, ball, steps = batch.model, Ball(batch.threat.norm, batch.threat.epsilon), batch.evaluation.adaptive_steps
    aimed = functools.partial(
        pgd, step_size=batch.threat.step_size, steps=steps, objective=gate_aimed, drop_fooled=True
    )
    worst = _worst_case(batch)
    worst.attack(lambda rest: aimed(model, rest.x, rest.y, ball))
    yield Attacked(column, worst.x, worst.logits, worst.gradient_count)


def pgd_expert(batch: Batch) -> Iterator[Attacked]:
    """PGD on each expert of a mixture; every iterate is tried on the mixture."""
    yield _over_experts(batch, expert_aimed)


def pgd_route(batch: Batch) -> Iterator[Attacked]:
    """PGD on each expert of a mixture and on the gate's weight for it; every iterate is tried on the mixture."""
    yield _over_experts(batch, routed)


def _over_experts(batch: Batch, aimed: Callable[[int], Objective]) -> Attacked:
    """The worst case over PGD on an objective of each expert, and over the iterates."""
    (column,) = batch.columns
    ball, steps = Ball(batch.threat.norm, batch.threat.epsilon), batch.evaluation.adaptive_steps
    run = functools.partial(pgd, step_size=batch.threat.step_size, steps=steps, drop_fooled=True)
    worst = _worst_case(batch)
    for number in range(len(batch.model.experts)):  # type: ignore[arg-type]
        worst.attack(
            lambda rest, number=number: run(batch.model, rest.x, rest.y, ball, objective=aimed(number))  # type: ignore[misc]
        )
    return Attacked(column, worst.x, worst.logits, worst.gradient_count)


def _worst_case(batch: Batch) -> WorstCase:
    return WorstCase(batch.model, batch.x, batch.y, predict(batch.model, batch.x), batch.generators)


def _last(run: Iterator[Iterate]) -> Iterate:
    """The last iterate of a run, with the gradients of the whole run."""
    count = 0
    for iterate in run:
        count += iterate.gradient_count
    return replace(iterate, gradient_count=count)
