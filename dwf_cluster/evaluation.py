"""The attack grid: every column of the result table, for one model.

To add an attack: a family in `columns` and in `_attacked`; the pipeline, the tables and the printed result follow.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from scipy.stats import binomtest
from torch import nn

from dwf_cluster import attacks
from dwf_cluster.data.device import DeviceImages, to_float
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment
from dwf_cluster.grid import Column, columns
from dwf_cluster.models import Mixture


@dataclass(frozen=True)
class Outcome:
    """What a model did with one batch of one column. Tensors on the CPU, one entry an image."""

    prediction: torch.Tensor
    margin: torch.Tensor
    gate: torch.Tensor | None
    gradients: int
    seconds: float


def evaluate(
    experiment: Experiment, model: nn.Module, name: str, family: str, images: DeviceImages
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Attack one model on the test images.

    Args:
        experiment: decides strengths, iterations and random starts.
        model: on the device of `images`.
        name: of the model, for the rows and the random starts.
        family: one of `grid.FAMILIES`.
        images: the data set.

    Returns:
        Rows of `evaluations` and rows of `predictions`. `gradients` counts gradient evaluations of single
        images, each where it was spent: what a column shares with the one before is counted there.

    Raises:
        NotLogits: if the model returns NaN or probabilities.
    """
    view = _Counted(attacks.frozen(model))
    size, labels = experiment.evaluation.batch_size, images.y_test.cpu()
    outcomes: dict[Column, list[Outcome]] = {column: [] for column in columns(experiment, family)}
    for start in range(0, len(labels), size):
        x, y = to_float(images.x_test[start : start + size]), images.y_test[start : start + size]
        draws = Draws((experiment.seed, name, family, start))
        clock = time.perf_counter()
        for column, attacked in _attacked(experiment, view, x, y, family, draws):
            outcome = _outcome(view, attacked, y, time.perf_counter() - clock)
            outcomes[column].append(outcome)
            clock = time.perf_counter()
    rows, predictions = [], []
    for column, parts in outcomes.items():
        settings = column.settings
        prediction = torch.cat([part.prediction for part in parts])
        correct = int((prediction == labels).sum())
        interval = binomtest(correct, len(labels)).proportion_ci(confidence_level=0.95, method="wilson")
        rows.append(
            {
                "model": name,
                **settings,
                "examples": len(labels),
                "correct": correct,
                "accuracy": correct / len(labels),
                "accuracy_low": float(interval.low),
                "accuracy_high": float(interval.high),
                "gradients": sum(part.gradients for part in parts),
                "seconds": sum(part.seconds for part in parts),
            }
        )
        margin = torch.cat([part.margin for part in parts]).tolist()
        gates = [
            gate
            for part in parts
            for gate in (part.gate.tolist() if part.gate is not None else [None] * len(part.prediction))
        ]
        of = {"model": name, **{key: settings[key] for key in ("attack", "epsilon", "steps")}}
        predictions += [
            {**of, "example": i, "label": label, "prediction": guess, "margin": m, "gate": gate}
            for i, (label, guess, m, gate) in enumerate(
                zip(labels.tolist(), prediction.tolist(), margin, gates, strict=True)
            )
        ]
    return rows, predictions


def _attacked(
    experiment: Experiment, view: nn.Module, x: torch.Tensor, y: torch.Tensor, family: str, draws: Draws
) -> Iterator[tuple[Column, torch.Tensor]]:
    """The adversarial images of each column of a family, in the order of `columns`."""
    grid, evaluation, pgd = columns(experiment, family), experiment.evaluation, experiment.pgd
    attack = functools.partial(attacks.pgd, view, x, y, epsilon=pgd.epsilon, step_size=pgd.step_size)
    if family == "fgsm":
        yield grid[0], x
        gradient = attacks.input_gradient(view, x, y)
        for column in grid[1:]:
            assert column.epsilon is not None
            yield column, attacks.fgsm(x, gradient, column.epsilon)
    elif family == "pgd":
        iterates = attack(steps=[column.steps or 0 for column in grid])
        yield from zip(grid, iterates, strict=True)
    elif family == "pgd_restarts":
        generators = [draws.generator(f"start {i}", x.device) for i in range(evaluation.restarts)]
        attacked = attacks.pgd_restarts(
            view,
            x,
            y,
            epsilon=pgd.epsilon,
            step_size=pgd.step_size,
            steps=evaluation.restart_steps,
            generators=generators,
        )
        yield grid[0], attacked
    else:  # through experts, gate and routing weights at once: the view is the whole mixture
        start = attacks.random_start(x, pgd.epsilon, draws.generator("start", x.device))
        iterates = attack(steps=[evaluation.adaptive_steps], start=start, eot=evaluation.eot)
        yield from zip(grid, iterates, strict=True)


def _outcome(view: _Counted, attacked: torch.Tensor, y: torch.Tensor, seconds: float) -> Outcome:
    with torch.no_grad():
        logits = view(attacked)
        gate = view.model.gate(attacked).cpu() if isinstance(view.model, Mixture) else None
    attacks.check_logits(logits)
    true = logits.gather(1, y[:, None]).squeeze(1)
    others = logits.scatter(1, y[:, None], -torch.inf).amax(1)
    return Outcome(logits.argmax(1).cpu(), (true - others).cpu(), gate, view.take_count(), seconds)


class _Counted(nn.Module):
    """A view that counts the images it was differentiated for."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.gradients = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            self.gradients += len(x)
        logits: torch.Tensor = self.model(x)
        return logits

    def take_count(self) -> int:
        count, self.gradients = self.gradients, 0
        return count
