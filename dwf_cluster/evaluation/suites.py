"""The runners of the suites: from a batch of images to the attacked images of the columns.

To add a suite: a function here or in a file beside this one, and an entry in `registry.SUITES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from dwf_cluster.attacks.apgd import apgd as apgd_attack
from dwf_cluster.attacks.autoattack import autoattack as autoattack_attack
from dwf_cluster.attacks.ball import Ball, uniform
from dwf_cluster.attacks.gradient import Objective, carlini_wagner, cross_entropy, predict, target_margin
from dwf_cluster.attacks.pgd import Iterate, Remaining, WorstCase, fgsm, pgd, with_logits
from dwf_cluster.attacks.routing import expert_aimed, gate_aimed, routed
from dwf_cluster.attacks.square import square as square_attack
from dwf_cluster.evaluation.column import longest_pgd
from dwf_cluster.evaluation.registry import TRANSFER, transfer_column
from dwf_cluster.evaluation.run import Attacked, Batch

MOMENTUM = 1.0
"""Decay of `pgd_momentum`'s gradients, as in its paper."""


def paper(batch: Batch) -> Iterator[Attacked]:
    """Table 3, from one run of PGD and, for images that are robust after it, its restarts.

    The run's first gradient is FGSM's at every epsilon, its iterates are the PGD columns and, with one EoT
    sample and a deterministic model, the adaptive column; their logits come with the gradients. With a random start,
    FGSM's gradient is one more.
    """
    model, evaluation, x, y = batch.model, batch.evaluation, batch.x, batch.y
    *others, restarted, adaptive = batch.columns
    ball, step_size = Ball(batch.threat.norm, batch.threat.epsilon), batch.threat.step_size
    by_steps = {column.steps: column for column in others if column.attack == "pgd"}
    is_one_run = evaluation.eot == 1
    steps = max(longest_pgd(evaluation), evaluation.restart_steps, evaluation.adaptive_steps if is_one_run else 0)

    start = start_of(batch, ball, x, batch.generators)
    run = pgd(model, x, y, ball, step_size=step_size, steps=steps, start=start)
    clean = next(run) if start is None else next(pgd(model, x, y, ball, step_size=step_size, steps=1))
    assert clean.logits is not None
    assert clean.gradient is not None
    count, worst = clean.gradient_count, WorstCase(model, x, y, clean.logits, batch.generators)
    for column in others:
        if column.attack == "clean":
            yield Attacked(column, x, clean.logits)
        if column.attack == "fgsm":
            assert column.epsilon is not None
            yield Attacked(column, fgsm(x, clean.gradient, column.epsilon), None, count)
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
        end = _last(pgd(model, x, y, ball, start=start, **options))  # type: ignore[arg-type]
        yield Attacked(adaptive, end.x, None, end.gradient_count)


def noise(batch: Batch) -> Iterator[Attacked]:
    """Random signs, in L2 and L1 a random direction at full length: the floor of every attack."""
    (column,) = batch.columns
    ball = Ball(batch.threat.norm, batch.threat.epsilon)
    if ball.norm == "linf":
        moved = ball.project(batch.x, batch.x + ball.epsilon * uniform(batch.x, batch.generators).sign())
    else:
        moved = ball.random_surface_point(batch.x, batch.generators)
    yield Attacked(column, moved)


def pgd_variant(batch: Batch) -> Iterator[Attacked]:
    """PGD with momentum, on Carlini and Wagner's loss, or in a ball of its own: the last iterate."""
    (column,) = batch.columns
    assert column.epsilon is not None
    ball = Ball(column.norm or "linf", column.epsilon)
    assert column.step_size is not None
    assert column.steps is not None
    last = _last(
        pgd(
            batch.model,
            batch.x,
            batch.y,
            ball,
            step_size=column.step_size,
            steps=column.steps,
            start=start_of(batch, ball, batch.x, batch.generators),
            objective=carlini_wagner if column.attack == "pgd_cw" else cross_entropy,
            momentum=MOMENTUM if column.attack == "pgd_momentum" else 0.0,
        )
    )
    yield Attacked(column, last.x, None, last.gradient_count)


def pgd_targeted(batch: Batch) -> Iterator[Attacked]:
    """PGD towards each of the most likely other labels (Gowal et al. 2019); worst case over labels and iterates."""
    (column,) = batch.columns
    model, ball, steps = batch.model, Ball(batch.threat.norm, batch.threat.epsilon), longest_pgd(batch.evaluation)
    run = functools.partial(
        pgd, step_size=batch.threat.step_size, steps=steps, objective=target_margin, drop_fooled=True
    )
    worst = worst_case(batch)
    targets = worst.logits.scatter(1, batch.y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]

    def towards(rest: Remaining, rank: int) -> Iterator[Iterate]:
        start = start_of(batch, ball, rest.x, rest.generators)
        return run(model, rest.x, rest.y, ball, start=start, target=targets[rest.index, rank])

    for rank in range(min(batch.evaluation.targets, targets.shape[1])):
        worst.attack(functools.partial(towards, rank=rank))
    yield Attacked(column, worst.x, worst.logits, worst.gradient_count)


def auto_pgd(batch: Batch) -> Iterator[Attacked]:
    """APGD on cross-entropy, in the ball of its column."""
    (column,) = batch.columns
    ball, steps, model = Ball(column.norm or "linf", column.epsilon or 0), batch.evaluation.apgd_steps, batch.model
    worst = worst_case(batch)
    worst.attack(lambda rest: apgd_attack(model, rest.x, rest.y, ball, rest.generators, steps=steps))
    yield Attacked(column, worst.x, worst.logits, worst.gradient_count)


def square(batch: Batch) -> Iterator[Attacked]:
    """Square, which uses only the model's outputs."""
    (column,) = batch.columns
    epsilon, queries, model = batch.threat.epsilon, batch.evaluation.square_queries, batch.model
    worst = worst_case(batch)
    worst.attack(lambda rest: square_attack(model, rest.x, rest.y, epsilon, rest.generators, queries=queries))
    yield Attacked(column, worst.x, worst.logits, worst.gradient_count)


def autoattack(batch: Batch) -> Iterator[Attacked]:
    """AutoAttack's standard set."""
    (column,) = batch.columns
    worst = worst_case(batch)
    autoattack_attack(batch.model, batch.threat.epsilon, worst)
    yield Attacked(column, worst.x, worst.logits, worst.gradient_count)


def pgd_gate(batch: Batch) -> Iterator[Attacked]:
    """PGD that aims at the gate of a mixture too."""
    (column,) = batch.columns
    model, ball, steps = batch.model, Ball(batch.threat.norm, batch.threat.epsilon), batch.evaluation.adaptive_steps
    aimed = functools.partial(
        pgd, step_size=batch.threat.step_size, steps=steps, objective=gate_aimed, drop_fooled=True
    )
    worst = worst_case(batch)
    worst.attack(lambda rest: aimed(model, rest.x, rest.y, ball, start=start_of(batch, ball, rest.x, rest.generators)))
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
    worst = worst_case(batch)

    def run(rest: Remaining, number: int) -> Iterator[Iterate]:
        start = start_of(batch, ball, rest.x, rest.generators)
        return pgd(
            batch.model,
            rest.x,
            rest.y,
            ball,
            step_size=batch.threat.step_size,
            steps=steps,
            start=start,
            objective=aimed(number),
            drop_fooled=True,
        )

    for number in range(len(batch.model.experts)):  # type: ignore[arg-type]
        worst.attack(functools.partial(run, number=number))
    return Attacked(column, worst.x, worst.logits, worst.gradient_count)


def start_of(batch: Batch, ball: Ball, x: torch.Tensor, generators: Sequence[torch.Generator]) -> torch.Tensor | None:
    """Where PGD starts: None, the images themselves, or with `evaluation.random_start` a random point of the ball."""
    return ball.random_point(x, generators) if batch.evaluation.random_start else None


def worst_case(batch: Batch) -> WorstCase:
    """The worst case before any attack, from the clean images."""
    return WorstCase(batch.model, batch.x, batch.y, predict(batch.model, batch.x), batch.generators)


def _last(run: Iterator[Iterate]) -> Iterate:
    """The last iterate of a run, with the gradients of the whole run."""
    count = 0
    for iterate in run:
        count += iterate.gradient_count
    return replace(iterate, gradient_count=count)
