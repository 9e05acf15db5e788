"""The suite of curves: accuracy over epsilon, steps and restarts (Carlini et al. 2019, section 4).

Accuracy that does not fall to 0 % as epsilon grows, or that further steps and restarts still lower, says that the
attack is too weak for the model, not that the model is robust.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from dwf_cluster.attacks.apgd import apgd
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.pgd import Iterate, Remaining, pgd, with_logits
from dwf_cluster.evaluation.registry import Column
from dwf_cluster.evaluation.run import Attacked, Batch
from dwf_cluster.evaluation.suites import start_of, worst_case


def curves(batch: Batch) -> Iterator[Attacked]:
    """The four curves, one after another."""
    by_attack: dict[str, list[Column]] = {}
    for column in batch.columns:
        by_attack.setdefault(column.attack, []).append(column)
    for attack in ("curve_epsilon", "curve_apgd"):
        yield from _over_epsilon(batch, by_attack.get(attack, []))
    yield from _over_steps(batch, by_attack["curve_steps"])
    yield from _over_restarts(batch, by_attack["curve_restarts"])


def _over_epsilon(batch: Batch, columns: Sequence[Column]) -> Iterator[Attacked]:
    """PGD or APGD in balls of rising radius: an image that a smaller ball has fooled is in the larger ones too.

    So each accuracy is a worst case over the iterates in this ball and all smaller ones, and never rises.
    """
    worst, count = worst_case(batch), 0
    for column in columns:
        worst.attack(functools.partial(_in_ball, batch, column))
        yield Attacked(column, worst.x.clone(), worst.logits.clone(), worst.gradient_count - count)
        count = worst.gradient_count


def _in_ball(batch: Batch, column: Column, rest: Remaining) -> Iterator[Iterate]:
    ball, steps = Ball(column.norm or "linf", column.epsilon or 0), column.steps or 0
    if column.step_size is None:
        return apgd(batch.model, rest.x, rest.y, ball, rest.generators, steps=steps)
    start = start_of(batch, ball, rest.x, rest.generators)
    step_size = column.step_size
    return pgd(batch.model, rest.x, rest.y, ball, step_size=step_size, steps=steps, start=start, drop_fooled=True)


def _over_steps(batch: Batch, columns: Sequence[Column]) -> Iterator[Attacked]:
    """One run of PGD: its iterates, as in the PGD columns; accuracy may rise with the steps."""
    ball, count = Ball(batch.threat.norm, batch.threat.epsilon), 0
    by_steps, longest = {column.steps: column for column in columns}, batch.evaluation.curve_steps
    start, step_size = start_of(batch, ball, batch.x, batch.generators), batch.threat.step_size
    for iterate in pgd(batch.model, batch.x, batch.y, ball, step_size=step_size, steps=longest, start=start):
        if iterate.step in by_steps:
            iterate_with_logits = with_logits(batch.model, iterate)
            yield Attacked(by_steps[iterate.step], iterate.x, iterate_with_logits.logits, count)
            count = 0
        count += iterate.gradient_count


def _over_restarts(batch: Batch, columns: Sequence[Column]) -> Iterator[Attacked]:
    """The worst case over the iterates of more and more runs; the first starts as the PGD columns, others at random."""
    ball, step_size = Ball(batch.threat.norm, batch.threat.epsilon), batch.threat.step_size
    run = functools.partial(
        pgd, batch.model, step_size=step_size, steps=batch.evaluation.restart_steps, drop_fooled=True
    )
    worst, count = worst_case(batch), 0
    worst.attack(lambda rest: run(rest.x, rest.y, ball, start=start_of(batch, ball, rest.x, rest.generators)))
    for column in columns:
        if column is not columns[0]:
            worst.attack(lambda rest: run(rest.x, rest.y, ball, start=ball.random_point(rest.x, rest.generators)))
        yield Attacked(column, worst.x.clone(), worst.logits.clone(), worst.gradient_count - count)
        count = worst.gradient_count
