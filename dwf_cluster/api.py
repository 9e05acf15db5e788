"""The Python API: measure any classifier by the package's attacks, and load a trained model.

The pipeline's tasks call the same `evaluation.run.evaluate` and `check`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from torch import nn

from dwf_cluster.data.registry import DATASETS, Data, ImageFormat
from dwf_cluster.data.sources import load as load_images
from dwf_cluster.data.subsets import balanced
from dwf_cluster.defences.build import trained
from dwf_cluster.defences.registry import trained_sources
from dwf_cluster.evaluation import run
from dwf_cluster.evaluation.adversarial import AdversarialImages, Collector, Kind, concatenated
from dwf_cluster.evaluation.check_cost import check_cost
from dwf_cluster.evaluation.gate_cost import Parts
from dwf_cluster.evaluation.merge import merged_rows, worst_case_rows
from dwf_cluster.evaluation.registry import CHECKS, PAPER, SUITES
from dwf_cluster.evaluation.settings import Evaluation, Norm, Threat
from dwf_cluster.evaluation.stronger import stronger
from dwf_cluster.evaluation.subject import Subject, isolated, kept, prepare, with_route, without_gradient
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.mixture import Gated
from dwf_cluster.settings import InvalidInput, one_line
from dwf_cluster.store import RowLabels, Store, check_url, checkpoints, tables

MODEL = "model"
"""Name of the user's model in every table; random starts depend on it, so it is the same for every class."""


LINF = Threat(8 / 255, 2 / 255)
"""Default threat model of `evaluate`."""


@dataclass(frozen=True)
class Result:
    """The result of `evaluate`: pandas frames with the columns of docs/results.md, without those of an experiment.

    Attributes:
        evaluations: a row for each column of the suites: accuracy, its 95 % Wilson interval, gradients, seconds. The
            last row is `worst_case`: an image counts as correct if it resists every one of these attacks whose norm is
            `norm` and whose epsilon is at most `epsilon`, and is classified correctly where clean images were tested.
        predictions: a row for each column and image: label, prediction, margin, confidence.
        checks: a row for each check for gradient masking; `fired` marks a sign.
        adversarial: the adversarial images, if they were asked for.
    """

    evaluations: pd.DataFrame
    predictions: pd.DataFrame
    checks: pd.DataFrame
    adversarial: AdversarialImages | None = None


def evaluate(
    model: nn.Module,
    x: torch.Tensor | np.ndarray[Any, Any],
    y: torch.Tensor | np.ndarray[Any, Any],
    norm: Norm = "linf",
    epsilon: float | None = None,
    step_size: float | None = None,
    suites: Sequence[str] = ("paper", "checks"),
    seed: int = 0,
    device: torch.device | str | None = None,
    batch_size: int = 512,
    progress: bool = True,
    adversarial: Kind | None = None,
) -> Result:
    """Attack a classifier; a keyword for each setting, hence more than seven; long because their descriptions are.

    A copy of the model is attacked, in evaluation mode: the model and the global random states stay as they are.
    The model is named `model` in every table.

    A model whose outputs have no gradient with respect to the pixels is a `UserWarning`: attacks that follow the
    gradient cannot fool it.

    Args:
        model: any module, pixels in [0, 1] in, logits out, normalisation inside.
        x: test images: float in [0, 1], shape (n, channels, height, width); or uint8, shape (n, height, width,
            channels) or (n, height, width).
        y: integer labels, shape (n,), from 0.
        norm: `linf`, `l2` or `l1`; only suites of this norm can be asked for.
        epsilon, step_size: radius of the ball and length of a step, in `norm`, pixels in [0, 1]. By default 8/255 and
            2/255 for `linf`, 0.5 and 0.1 for `l2`, 12 and 1 for `l1`: customary ones for 32x32 colour images.
        suites: keys of `evaluation.registry.SUITES`, with its default iterations; FGSM's epsilons are 0.01 to 0.09. A
            `Mixture` whose gate gives each image to one expert is attacked by `pgd_route` too.
        seed: of the random starts.
        device: that computes; the model's own by default.
        batch_size: images attacked at once.
        progress: show a progress bar on stderr.
        adversarial: keep the adversarial images: `float` as they are, `uint8` rounded within the ball; None: do not.

    Raises:
        InvalidInput: before any attack, if an argument cannot be used: one line with name, value and what is allowed.
        NotLogits: before any attack, if the model returns NaN or probabilities.
    """
    names = check_suites(suites, norm)
    threat = _threat(norm, epsilon, step_size)
    batch_size = _integer("batch_size", batch_size, 1, 1_000_000_000)
    own: dict[str, Any] = (
        {} if norm == "linf" else {f"{norm}_epsilon": threat.epsilon, f"{norm}_step_size": threat.step_size}
    )
    beyond = tuple(name for name in names if name not in (PAPER, CHECKS))
    evaluation = Evaluation(**own, beyond=beyond, batch_size=batch_size)
    seed = _integer("seed", seed, 0, 2**31 - 1)
    if adversarial not in (None, *get_args(Kind)):
        raise InvalidInput(
            f"adversarial: {adversarial!r} cannot be used: allowed are None, {', '.join(get_args(Kind))}"
        )
    with isolated(seed), kept(model):
        subject = prepare(model, x, y, device, evaluation.batch_size)
        if warning := without_gradient(subject):
            warnings.warn(warning, stacklevel=2)
        names, added = with_route(subject, names)
        if added:
            warnings.warn(added, stacklevel=2)
        rows = measure(subject, names, evaluation, (threat,), seed, progress, adversarial=adversarial)
    shards, predicted = _table("shards", rows.shards), _table("predictions", rows.predictions)
    worst, worst_predictions = worst_case_rows(shards, predicted, MODEL, (threat,))
    evaluations = _table("evaluations", [*merged_rows(rows.shards), *worst])
    predictions = _table("predictions", [*rows.predictions, *worst_predictions])
    checks = _table("checks", [*rows.checks, *(stronger(predicted, MODEL, threat) if CHECKS in names else ())])
    images = concatenated(list(rows.adversarial.values())) if rows.adversarial else None
    return Result(evaluations.to_pandas(), predictions.to_pandas(), checks.to_pandas(), images)


def load(folder: str | Path, name: str | None = None) -> nn.Module:
    """Load a trained model: pixels in [0, 1] in, logits out, evaluation mode, on the CPU; `.gate(x)` where it has one.

    Args:
        folder: path or fsspec URL of an experiment's folder, such as `runs/digits-seed0-ce2d226613`.
        name: of the model; by default the defended one.

    Raises:
        InvalidInput: if there is no experiment, no such model, or the model is not trained to its last epoch; for
            images of the user's own, if their `.npz` file is gone.
        StorageFailed: if the store does not answer.
    """
    path = str(folder).rstrip("/")
    check_url(path)
    content = Store(path, "").read("experiment.json")
    if content is None:
        raise InvalidInput(
            f"folder: {path!r} cannot be used: it holds no experiment.json, as an experiment's folder does"
        )
    try:
        experiment = Experiment.from_json(content.decode())
    except ValueError as error:  # InvalidInput too
        raise InvalidInput(f"folder: {path!r} cannot be used: experiment.json: {one_line(error)}") from None
    name = experiment.defended.name if name is None else name
    if name not in experiment.names:
        raise InvalidInput(f"name: {name!r} cannot be used: allowed are {', '.join(experiment.names)}")
    root, _, last = path.rpartition("/")
    store = Store(root or ("/" if path.startswith("/") else "."), last)
    for source in trained_sources(experiment.models, name):
        # `trained` would remove checkpoints that it cannot use; reading must not.
        checkpoint, epochs = checkpoints.load_latest(store, source), experiment.spec(source).training.epochs
        if checkpoint is None or checkpoint.epoch < epochs:
            reached, model = (checkpoint.epoch if checkpoint else 0), "it" if source == name else source
            raise InvalidInput(
                f"name: {name!r} cannot be used: {model} is trained for {reached} of {epochs} epochs in {path}"
            )
    return trained(experiment.models, name, _image_format(experiment.data), experiment.seed, store).eval()


def _image_format(data: Data) -> ImageFormat:
    """Shape and classes of an experiment's images; mean and std are placeholders: a checkpoint holds the true ones."""
    if data.source not in DATASETS:
        return load_images(data, Path()).format
    dataset = DATASETS[data.source]
    channels, height, width = dataset.shape
    shape = (channels, height + 2 * data.padding, width + 2 * data.padding)
    return ImageFormat(shape, dataset.classes, (0.0,) * channels, (1.0,) * channels)


# ------------------------------------------------------------------------------------------- measuring a model


@dataclass(frozen=True)
class Rows:
    """Rows of the tables of these names, and the adversarial images of each suite, if they are kept."""

    shards: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    checks: list[dict[str, Any]] = field(default_factory=list)
    adversarial: dict[str, AdversarialImages] = field(default_factory=dict)


def measure(
    subject: Subject,
    suites: Sequence[str],
    evaluation: Evaluation,
    threats: Sequence[Threat],
    seed: int,
    progress: bool,
    checked: np.ndarray[Any, Any] | None = None,
    adversarial: Kind | None = None,
) -> Rows:
    """Run suites on a model; it has more than seven parameters, and is long because `evaluate` has so many.

    Args:
        subject, suites, evaluation, threats, seed, progress: as of `evaluate`.
        checked: indices of the images that are checked for gradient masking; by default a class-balanced draw.
        adversarial: keep the adversarial images, in this form; None: do not keep them.

    Raises:
        InvalidInput: before any attack, if the model lacks the gate or the classes that a suite needs.
    """
    _refuse_unfit(subject, suites)
    rows, name = Rows(), MODEL
    options: dict[str, Any] = {"seed": seed, "device": subject.device}
    networks = len(subject.model.experts) if isinstance(subject.model, Gated) else 1
    checked = balanced(subject.y, evaluation.check_examples, "checks") if checked is None else checked
    costs = {suite: SUITES[suite].cost(evaluation, Parts(networks)) for suite in suites}
    if CHECKS in costs:
        costs[CHECKS] = check_cost(evaluation, subject.x[0].size)
    examples = {suite: min(len(subject.y), SUITES[suite].examples(evaluation) or len(subject.y)) for suite in suites}
    examples |= {suite: len(checked) for suite in suites if suite == CHECKS}
    total = sum(cost * examples[suite] for suite, cost in costs.items())
    with _bar(progress, total) as advance:
        for suite in suites:
            advance(suite, 0)
            x, y = subject.x[: examples[suite]], subject.y[: examples[suite]]
            if suite == CHECKS:
                x, y = subject.x[checked], subject.y[checked]
                rows.checks.extend(run.check(subject.model, name, x, y, evaluation, threats[0], **options))
                advance(suite, costs[suite] * len(y))
                continue
            collector = Collector(name, adversarial) if adversarial else None
            shards, predictions = run.evaluate(
                {name: subject.model},
                name,
                suite,
                x,
                y,
                evaluation,
                threats,
                **options,
                collector=collector,
                on_batch=lambda images, suite=suite: advance(suite, costs[suite] * images),  # type: ignore[misc]
            )
            rows.shards.extend(shards)
            rows.predictions.extend(predictions)
            if collector:
                rows.adversarial[suite] = collector.images()
    return rows


def _refuse_unfit(subject: Subject, suites: Sequence[str]) -> None:
    """Refuse suites that need a gate, or more classes than the model has."""
    for suite in suites:
        if SUITES[suite].needs_gate and not isinstance(subject.model, Gated):
            raise InvalidInput(
                f"suites: {suite!r} cannot be used: the model has no experts and gate; allowed is a Mixture"
            )
        if SUITES[suite].classes > subject.classes:
            raise InvalidInput(
                f"suites: {suite!r} cannot be used: the model has {subject.classes} classes, "
                f"allowed are {SUITES[suite].classes} or more"
            )


def check_suites(suites: Sequence[str], norm: str) -> tuple[str, ...]:
    """Names of suites, each once.

    Raises:
        InvalidInput: if there is no such norm or suite, or a suite is of another norm.
    """
    if norm not in get_args(Norm):
        raise InvalidInput(f"norm: {norm!r} cannot be used: allowed are {', '.join(get_args(Norm))}")
    names = (suites,) if isinstance(suites, str) else tuple(suites)
    allowed = ", ".join(name for name, suite in SUITES.items() if norm in suite.norms)
    if not names:
        raise InvalidInput(f"suites: none were given: allowed with norm {norm} are {allowed}")
    for name in names:
        if name not in SUITES or norm not in SUITES[name].norms:
            raise InvalidInput(f"suites: {name!r} cannot be used: allowed with norm {norm} are {allowed}")
    return tuple(dict.fromkeys(names))


def _threat(norm: Norm, epsilon: float | None, step_size: float | None) -> Threat:
    """The threat model of `evaluate`'s arguments."""
    defaults = Evaluation()
    default = {
        "linf": LINF,
        "l2": Threat(defaults.l2_epsilon, defaults.l2_step_size, "l2"),
        "l1": Threat(defaults.l1_epsilon, defaults.l1_step_size, "l1"),
    }[norm]
    radius = default.epsilon if epsilon is None else _number("epsilon", epsilon, norm)
    return Threat(radius, default.step_size if step_size is None else _number("step_size", step_size, norm), norm)


def _number(name: str, value: float, norm: str) -> float:
    largest = 1 if norm == "linf" else 1000
    if (
        isinstance(value, bool)
        or not isinstance(value, float | int | np.floating | np.integer)
        or not 0 < value <= largest
    ):
        raise InvalidInput(
            f"{name}: {value!r} cannot be used: allowed with norm {norm} are numbers above 0, up to {largest}"
        )
    return float(value)


def _integer(name: str, value: int, smallest: int, largest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not smallest <= value <= largest:
        raise InvalidInput(f"{name}: {value!r} cannot be used: allowed is an integer from {smallest} to {largest}")
    return int(value)


def _table(table: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Rows of a table, without the columns that say which experiment they belong to."""
    labels = {label.name for label in fields(RowLabels)}
    schema = pa.schema([column for column in tables.SCHEMAS[table] if column.name not in labels])
    return pa.Table.from_pylist(list(rows), schema=schema)


@contextmanager
def _bar(shown: bool, total: float) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr; yields a function of (suite, forward passes of one image)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("", total=total)
        yield lambda suite, passes: bar.update(task, description=suite, advance=passes)
