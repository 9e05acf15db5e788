"""Measure one model by one suite on a shard of the test set."""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import margin, predict
from dwf_cluster.data.device import to_float
from dwf_cluster.determinism import Draws
from dwf_cluster.evaluation.adversarial import Collector
from dwf_cluster.evaluation.inspection import Inspection
from dwf_cluster.evaluation.masking import masking
from dwf_cluster.evaluation.registry import CHECKS, SUITES, Column, columns
from dwf_cluster.evaluation.settings import Evaluation, Threat
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gated


@dataclass(frozen=True)
class Batch:
    """Images to attack, and the settings of the attack.

    Attributes:
        evaluation: iterations, restarts and so on.
        threat: the threat model.
        columns: of the suite under this threat model; without those that do not depend on it, if another came before.
        models: frozen models by name: the one to attack and, if its images are tested on others, those.
        name: of the model to attack.
        x: float in [0, 1], shape (n, channels, height, width).
        y: int64, shape (n,).
        generators: of random draws, one an image.
        experts: names of the experts of the model to attack, in the order of the gate's outputs; empty without a gate.
        corrupted: corrupted images from files, as uint8 in the shape of x, by corruption and severity.
    """

    evaluation: Evaluation
    threat: Threat
    columns: Sequence[Column]
    models: Mapping[str, nn.Module]
    name: str
    x: torch.Tensor
    y: torch.Tensor
    generators: list[torch.Generator]
    experts: Sequence[str] = ()
    corrupted: Mapping[tuple[str, int], np.ndarray[Any, Any]] = field(default_factory=dict)

    @property
    def model(self) -> nn.Module:
        """The model to attack."""
        return self.models[self.name]


@dataclass(frozen=True)
class Attacked:
    """A batch of images of one column.

    Attributes:
        column: which.
        x: the images, shape of the clean ones.
        logits: the model's at x, shape (n, classes), where the attack has computed them; else None.
        gradient_count: gradient evaluations of single images that it cost.
        model: name of the model that is tested; None: the one under attack.
    """

    column: Column
    x: torch.Tensor
    logits: torch.Tensor | None = None
    gradient_count: int = 0
    model: str | None = None


@dataclass
class ColumnResult:
    """The results of a model in one column, over batches. Tensors on the CPU, one entry an image."""

    prediction: list[torch.Tensor] = field(default_factory=list)
    margin: list[torch.Tensor] = field(default_factory=list)
    confidence: list[torch.Tensor] = field(default_factory=list)
    gate: list[torch.Tensor | None] = field(default_factory=list)
    perturbation: float = 0.0
    gradient_count: int = 0
    seconds: float = 0.0

    def record(self, model: nn.Module, attacked: Attacked, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add a batch.

        Args:
            model: frozen, the one that is tested.
            attacked: its images.
            x, y: clean images and labels.
        """
        logits = predict(model, attacked.x) if attacked.logits is None else attacked.logits
        with torch.no_grad():
            self.gate.append(model.gate(attacked.x).cpu() if isinstance(model, Gated) else None)
        self.prediction.append(logits.argmax(1).cpu())
        self.margin.append(margin(logits, y).cpu())
        self.confidence.append(logits.softmax(1).amax(1).cpu())
        ball = Ball(attacked.column.norm or "linf", attacked.column.epsilon or 0)
        self.perturbation = max(self.perturbation, float(ball.distance(x, attacked.x).max()))
        self.gradient_count += attacked.gradient_count


def evaluate(
    models: Mapping[str, nn.Module],
    name: str,
    suite: str,
    x_test: np.ndarray[Any, Any],
    y_test: np.ndarray[Any, Any],
    evaluation: Evaluation,
    threats: Sequence[Threat],
    *,
    seed: int,
    device: torch.device,
    first: int = 0,
    experts: Sequence[str] = (),
    corrupted: Mapping[tuple[str, int], np.ndarray[Any, Any]] | None = None,
    collector: Collector | None = None,
    on_batch: Callable[[int], None] = lambda examples: None,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Attack one model on a shard of the test images, which is read a batch at a time.

    It has more than seven parameters because the Python API and the pipeline's tasks both call it; it is long because
    their descriptions are.

    Args:
        models: on the device: the one to attack and, if its images are tested on others, those.
        name: of the model to attack, for the rows and the random starts.
        suite: a key of `SUITES`, except `CHECKS`.
        x_test, y_test: the shard's images, uint8 or float32 in [0, 1], shape (n, channels, height, width), and
            integer labels.
        evaluation: strengths and iterations.
        threats: the threat models; the random starts of each are the same, whether there are others or not.
        seed: of the random starts.
        device: that computes.
        first: index of the shard's first image in the test set.
        experts: names of a mixture's experts, in the order of the gate's outputs; by default `expert-1` and so on.
        corrupted: the shard's corrupted images from files, if there are any, by corruption and severity.
        collector: keeps the adversarial images; None: they are not kept.
        on_batch: called after each batch with its number of images.

    Returns:
        Rows of `shards` and rows of `predictions`. `gradients` counts gradient evaluations of single images, each in
        the first column that uses it.

    Raises:
        NotLogits: if a model returns NaN or probabilities.
    """
    frozen_models = {other: frozen(model) for other, model in models.items()}
    if isinstance(models[name], Gated) and not experts:
        experts = [f"expert-{i}" for i in range(1, 1 + len(frozen_models[name].experts))]  # type: ignore[arg-type]
    listed = columns(evaluation, threats, suite)
    results = {(name, column): ColumnResult() for column in listed}
    run: Callable[[Batch], Iterator[Attacked]] = pkgutil.resolve_name(SUITES[suite].run)
    for start in range(0, len(y_test), evaluation.batch_size):
        part = slice(start, start + evaluation.batch_size)
        x, y = _on_device(x_test, y_test, part, device)
        own_corrupted = {key: images[part] for key, images in (corrupted or {}).items()}
        examples = range(first + start, first + start + len(y))
        pending = listed
        for threat in threats:
            own = [column for column in SUITES[suite].columns(evaluation, threat) if column in pending]
            pending = [column for column in pending if column not in own]
            generators = _generators(seed, name, suite, examples)
            batch = Batch(evaluation, threat, own, frozen_models, name, x, y, generators, experts, own_corrupted)
            clock = time.perf_counter()
            for attacked in run(batch) if own or (not listed and threat == threats[0]) else ():
                model = attacked.model or name
                result = results.setdefault((model, attacked.column), ColumnResult())
                result.record(frozen_models[model], attacked, x, y)
                if collector and model == name:
                    collector.add(attacked.column, x, attacked.x, y, result.prediction[-1], first + start)
                result.seconds += time.perf_counter() - clock
                clock = time.perf_counter()
        on_batch(len(y))
    rows: list[dict[str, Any]] = []
    predictions: list[dict[str, Any]] = []
    for (model, column), result in results.items():
        row = {"model": model, **column.settings}
        rows.append({**row, "family": suite, "first": first, **_counts(result, y_test)})
        predictions += _predictions(row, result, y_test, first)
    return rows, predictions


def check(
    model: nn.Module,
    name: str,
    x_test: np.ndarray[Any, Any],
    y_test: np.ndarray[Any, Any],
    evaluation: Evaluation,
    threat: Threat,
    *,
    seed: int,
    device: torch.device,
    others: Mapping[str, nn.Module] | None = None,
) -> list[dict[str, Any]]:
    """Look for signs of gradient masking in one model; it has more than seven parameters as `evaluate` has.

    Args:
        model: on the device.
        name, x_test, y_test, evaluation, threat, seed, device: as for `evaluate`; the first test images.
        others: models by name, on the device, that images are made on; none: the check `transfer` cannot fire.

    Returns:
        Rows of the `checks` table.
    """
    x, y = _on_device(x_test, y_test, slice(None), device)
    generators = _generators(seed, name, CHECKS, range(len(y)))
    sources = {other: frozen(source) for other, source in (others or {}).items()}
    inspection = Inspection(frozen(model), x, y, threat, evaluation.probe_steps, generators, sources)
    return [result.row(name, len(y)) for result in masking(inspection)]


def _on_device(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], part: slice, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = torch.tensor(x[part], device=device), torch.tensor(y[part], device=device)
    return (to_float(images) if images.dtype == torch.uint8 else images), labels


def _generators(seed: int, name: str, suite: str, examples: range) -> list[torch.Generator]:
    """One generator an image, so that no draw depends on how the test set is cut."""
    return [Draws((seed, name, suite, example)).generator("attack") for example in examples]


def _counts(result: ColumnResult, y_test: np.ndarray[Any, Any]) -> dict[str, Any]:
    prediction = torch.cat(result.prediction).numpy()
    return {
        "examples": len(y_test),
        "correct": int((prediction == y_test).sum()),
        "perturbation": result.perturbation,
        "gradients": result.gradient_count,
        "seconds": result.seconds,
    }


def _predictions(
    row: Mapping[str, Any], result: ColumnResult, y_test: np.ndarray[Any, Any], first: int
) -> Iterator[dict[str, Any]]:
    """A row of `predictions` for each image."""
    keys = {key: row[key] for key in ("model", "attack", "source", "norm", "epsilon", "steps")}
    gates = [
        gate
        for part, batch in zip(result.gate, result.prediction, strict=True)
        for gate in (part.tolist() if part is not None else [None] * len(batch))
    ]
    values = (torch.cat(parts).tolist() for parts in (result.prediction, result.margin, result.confidence))
    names = ("example", "label", "prediction", "margin", "confidence", "gate")
    for entry in zip(range(first, first + len(y_test)), y_test.tolist(), *values, gates, strict=True):
        yield keys | dict(zip(names, entry, strict=True))
