"""The attack grid: every column of the result table, for one model and a slice of the test set.

To add an attack: its column in `grid.columns`, its run in `_beyond`; the pipeline, the tables and the printed
result follow.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from dwf_cluster import attacks
from dwf_cluster.checks import masking
from dwf_cluster.data.device import to_float
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment
from dwf_cluster.grid import CHECKS, Column, columns, transfer
from dwf_cluster.models import Mixture

MOMENTUM = 1.0
"""Decay of `pgd_momentum`'s gradients, as its authors have it."""


@dataclass(frozen=True)
class Attacked:
    """A batch of images of one column, of the model under attack or, for `transfer`, of another."""

    column: Column
    x: torch.Tensor
    logits: torch.Tensor | None = None
    gradients: int = 0
    model: str | None = None


@dataclass
class Outcome:
    """What a model did with the images of one column, over batches. Tensors on the CPU, one entry an image."""

    prediction: list[torch.Tensor] = field(default_factory=list)
    margin: list[torch.Tensor] = field(default_factory=list)
    gate: list[torch.Tensor | None] = field(default_factory=list)
    perturbation: float = 0.0
    gradients: int = 0
    seconds: float = 0.0


def evaluate(
    experiment: Experiment,
    models: Mapping[str, nn.Module],
    name: str,
    family: str,
    x_test: np.ndarray[Any, np.dtype[np.uint8]],
    y_test: np.ndarray[Any, np.dtype[np.int64]],
    first: int,
    device: torch.device,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Attack one model on a slice of the test images, which is read a batch at a time.

    Args:
        experiment: decides strengths, iterations and random starts.
        models: on the device: the one to attack and, if there is a `transfer` column, all others.
        name: of the model to attack, for the rows and the random starts.
        family: one of `grid.families`, save for `CHECKS`.
        x_test, y_test: uint8, shape (n, channels, height, width), and labels, of the slice.
        first: place of the slice's first image in the test set.
        device: that computes.

    Returns:
        Rows of `shards` and rows of `predictions`. `gradients` counts gradient evaluations of single images, each
        where it was spent: what a column shares with the one before is counted there.

    Raises:
        NotLogits: if a model returns NaN or probabilities.
    """
    views = {other: attacks.frozen(model) for other, model in models.items()}
    outcomes: dict[tuple[str, Column], Outcome] = {(name, column): Outcome() for column in columns(experiment, family)}
    size = experiment.evaluation.batch_size
    for start in range(0, len(y_test), size):
        x = to_float(torch.tensor(x_test[start : start + size], device=device))
        y = torch.tensor(y_test[start : start + size], device=device)
        examples = range(first + start, first + start + len(y))
        generators = [Draws((experiment.seed, name, family, i)).generator("attack") for i in examples]
        run = _paper if family == "paper" else _beyond
        clock = time.perf_counter()
        for found in run(experiment, views, name, family, x, y, generators):
            model = found.model or name
            outcome = outcomes.setdefault((model, found.column), Outcome())
            _take(outcome, views[model], found, x, y)
            outcome.seconds += time.perf_counter() - clock
            clock = time.perf_counter()
    rows, predictions = [], []
    for (model, column), outcome in outcomes.items():
        prediction = torch.cat(outcome.prediction).numpy()
        of = {"model": model, **column.settings}
        rows.append(
            {
                **of,
                "family": family,
                "first": first,
                "examples": len(y_test),
                "correct": int((prediction == y_test).sum()),
                "perturbation": outcome.perturbation,
                "gradients": outcome.gradients,
                "seconds": outcome.seconds,
            }
        )
        kept = {key: of[key] for key in ("model", "attack", "source", "epsilon", "steps")}
        gates = [
            gate
            for part, batch in zip(outcome.gate, outcome.prediction, strict=True)
            for gate in (part.tolist() if part is not None else [None] * len(batch))
        ]
        predictions += [
            {**kept, "example": first + i, "label": label, "prediction": guess, "margin": margin, "gate": gate}
            for i, (label, guess, margin, gate) in enumerate(
                zip(y_test.tolist(), prediction.tolist(), torch.cat(outcome.margin).tolist(), gates, strict=True)
            )
        ]
    return rows, predictions


def check(
    experiment: Experiment,
    model: nn.Module,
    name: str,
    x_test: np.ndarray[Any, np.dtype[np.uint8]],
    y_test: np.ndarray[Any, np.dtype[np.int64]],
    device: torch.device,
) -> list[dict[str, Any]]:
    """Look for signs of gradient masking in one model.

    Args:
        experiment, model, name, x_test, y_test, device: as for `evaluate`; the slice begins with the first test image.

    Returns:
        Rows of the `checks` table.
    """
    x, y = to_float(torch.tensor(x_test, device=device)), torch.tensor(y_test, device=device)
    generators = [Draws((experiment.seed, name, CHECKS, i)).generator("attack") for i in range(len(y))]
    pgd, steps = experiment.pgd, experiment.evaluation.probe_steps
    found = masking(attacks.frozen(model), x, y, pgd.epsilon, pgd.step_size, steps, generators)
    return [{"model": name, **asdict(sign), "fired": sign.fired, "examples": len(y)} for sign in found]


def _take(outcome: Outcome, view: nn.Module, found: Attacked, x: torch.Tensor, y: torch.Tensor) -> None:
    """Add a batch to a column."""
    logits = attacks.predict(view, found.x) if found.logits is None else found.logits
    with torch.no_grad():
        outcome.gate.append(view.gate(found.x).cpu() if isinstance(view, Mixture) else None)
    outcome.prediction.append(logits.argmax(1).cpu())
    outcome.margin.append(attacks.margin(logits, y).cpu())
    ball = attacks.Ball("l2" if found.column.attack.endswith("_l2") else "linf", found.column.epsilon or 0)
    distance = ball.distance(x, found.x)
    outcome.perturbation = max(outcome.perturbation, float(distance.max()))
    outcome.gradients += found.gradients


def _paper(
    experiment: Experiment,
    views: Mapping[str, nn.Module],
    name: str,
    family: str,
    x: torch.Tensor,
    y: torch.Tensor,
    generators: list[torch.Generator],
) -> Iterator[Attacked]:
    """Table 3, from one run of PGD and, for those that stand after it, its restarts.

    The run's first gradient is FGSM's at every epsilon, its iterates are the PGD columns and, with one EoT
    sample and models that are deterministic, the adaptive one's; their logits come with the gradients.
    """
    view, evaluation, pgd = views[name], experiment.evaluation, experiment.pgd
    clean, *others = columns(experiment, family)
    *_, restarted, adaptive = others
    ball = attacks.Ball("linf", pgd.epsilon)
    read = {column.steps: column for column in others if column.attack == "pgd"}
    most = max(evaluation.pgd_steps)
    last = max(most, evaluation.restart_steps, evaluation.adaptive_steps if evaluation.eot == 1 else 0)

    run = attacks.pgd(view, x, y, ball, step_size=pgd.step_size, steps=last)
    first = next(run)
    assert first.logits is not None
    assert first.gradient is not None
    yield Attacked(clean, x, first.logits)
    spent, worst = first.spent, attacks.WorstCase(view, x, y, first.logits, generators)
    for column in others:
        if column.attack == "fgsm":
            assert column.epsilon is not None
            yield Attacked(column, attacks.fgsm(x, first.gradient, column.epsilon), None, spent)
            spent = 0
    for step in run:
        iterate = attacks.with_logits(view, step)
        if iterate.step <= evaluation.restart_steps:
            worst.see(iterate)
        if iterate.step in read:
            yield Attacked(read[iterate.step], iterate.x, iterate.logits, spent)
            spent = 0
        if iterate.step == evaluation.adaptive_steps and evaluation.eot == 1:
            yield Attacked(adaptive, iterate.x, iterate.logits, spent)
            spent = 0
        if iterate.step == most and "transfer" in evaluation.beyond:
            made = transfer(experiment, name)
            yield from (Attacked(made, iterate.x, model=other) for other in views if other != name)
        spent += iterate.spent

    again = functools.partial(attacks.pgd, step_size=pgd.step_size, steps=evaluation.restart_steps, drop_fooled=True)
    for _ in range(1, evaluation.restarts):
        worst.attack(lambda some: again(view, some.x, some.y, ball, start=ball.random_point(some.x, some.generators)))
    yield Attacked(restarted, worst.x, worst.logits, spent + worst.spent)
    if evaluation.eot > 1:
        steps, eot = evaluation.adaptive_steps, evaluation.eot
        end = _last(attacks.pgd(view, x, y, ball, step_size=pgd.step_size, steps=steps, eot=eot))
        yield Attacked(adaptive, end.x, None, end.spent)


def _beyond(
    experiment: Experiment,
    views: Mapping[str, nn.Module],
    name: str,
    family: str,
    x: torch.Tensor,
    y: torch.Tensor,
    generators: list[torch.Generator],
) -> Iterator[Attacked]:
    """The one column of any other family."""
    view, evaluation, pgd = views[name], experiment.evaluation, experiment.pgd
    (column,) = columns(experiment, family)
    assert column.epsilon is not None
    linf, l2 = attacks.Ball("linf", pgd.epsilon), attacks.Ball("l2", evaluation.l2_epsilon)

    if family == "noise":
        yield Attacked(column, linf.project(x, x + column.epsilon * attacks.uniform(x, generators).sign()))
        return
    if family in ("pgd_momentum", "pgd_cw", "pgd_l2"):  # the last iterate, as in the PGD columns
        assert column.steps is not None
        last = _last(
            attacks.pgd(
                view,
                x,
                y,
                l2 if family == "pgd_l2" else linf,
                step_size=evaluation.l2_step_size if family == "pgd_l2" else pgd.step_size,
                steps=column.steps,
                objective=attacks.carlini_wagner if family == "pgd_cw" else attacks.cross_entropy,
                momentum=MOMENTUM if family == "pgd_momentum" else 0.0,
            )
        )
        yield Attacked(column, last.x, None, last.spent)
        return
    worst = attacks.WorstCase(view, x, y, attacks.predict(view, x), generators)
    adaptive = functools.partial(attacks.pgd, step_size=pgd.step_size, steps=evaluation.adaptive_steps)
    if family == "autoattack":
        attacks.autoattack(view, pgd.epsilon, worst)
    elif family == "square":
        queries = evaluation.square_queries
        worst.attack(lambda some: attacks.square(view, some.x, some.y, pgd.epsilon, some.generators, queries=queries))
    elif family in ("apgd", "apgd_l2"):
        ball = linf if family == "apgd" else l2
        steps = evaluation.apgd_steps
        worst.attack(lambda some: attacks.apgd(view, some.x, some.y, ball, some.generators, steps=steps))
    elif family == "pgd_gate":
        aimed = functools.partial(adaptive, objective=attacks.gate_aimed, drop_fooled=True)
        worst.attack(lambda some: aimed(view, some.x, some.y, linf))
    else:  # pgd_expert: what one expert is attacked with is tried on the mixture
        assert isinstance(view, Mixture)
        for expert in view.experts:
            worst.attack(lambda some, one=expert: iter([_last(adaptive(one, some.x, some.y, linf))]))  # type: ignore[misc]
    yield Attacked(column, worst.x, worst.logits, worst.spent)


def _last(run: Iterator[attacks.Iterate]) -> attacks.Iterate:
    """The last iterate of a run, with the gradients of the whole run."""
    spent = 0
    for iterate in run:
        spent += iterate.spent
    return replace(iterate, spent=spent)
