"""Sections that compare results: resumed and uninterrupted trainings, precisions, the columns and torchattacks'."""

from __future__ import annotations

import functools
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.measure import FEW_ITERATIONS, PRECISIONS, QUICK, Row, Setup, attacked, float32_as
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import predict
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.data import sources
from dwf_cluster.data.device import DeviceImages, to_float
from dwf_cluster.data.registry import DATASETS, Sizes
from dwf_cluster.defences.build import untrained
from dwf_cluster.evaluation.registry import PAPER
from dwf_cluster.evaluation.run import evaluate
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.plan.jobs import EVALUATE, EXPERTS, jobs
from dwf_cluster.plan.speeds import FLOAT32
from dwf_cluster.presets import build
from dwf_cluster.store import Store, checkpoints
from dwf_cluster.training.loop import Stopped, Task, train
from dwf_cluster.training.probe import Probe

MODEL = "pgd-1"
TRAINING_PRECISIONS = (FLOAT32, "bfloat16")


def _trained(
    setup: Setup, experiment: Experiment, images: sources.Images, store: Store, **options: Callable[..., Any]
) -> nn.Module:
    model = untrained(experiment.spec(MODEL), images.format, experiment.seed, {}).to(setup.device)
    probe = Probe(experiment.threat, 1, 2)
    task = Task(experiment.spec(MODEL), EXPERTS, experiment.seed, probe, 60.0, store, **options)
    with float32_as("tf32"):
        return train(task, model, DeviceImages(images, experiment.data, setup.device))


def resume(setup: Setup) -> Iterator[Row]:
    """A training that stops in the middle of an epoch and resumes, against one that does not stop."""
    for precision in TRAINING_PRECISIONS:
        experiment = setup.experiment("experts.epochs=2", f"experts.precision={precision}")
        images, steps = setup.random_images(2 if setup.quick else 4), itertools.count(1)
        with tempfile.TemporaryDirectory() as folder:
            whole, stopped = (Store(folder, name, labels=experiment.labels) for name in ("whole", "stopped"))
            _trained(setup, experiment, images, whole)
            try:
                _trained(setup, experiment, images, stopped, stopping=lambda steps=steps: next(steps) == 3)
            except Stopped:
                _trained(setup, experiment, images, stopped)
            first, second = (checkpoints.load_latest(store, MODEL) for store in (whole, stopped))
        assert first is not None
        assert second is not None
        equal = all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
        yield Row(f"resumed equals uninterrupted, {precision}", equal, "", True)


def fashion_mnist_or_digits(setup: Setup) -> tuple[Experiment, sources.Images] | str:
    """The settings and images that accuracies are measured on; a line that says why there are none."""
    downloads = Path("data")
    if DATASETS["fashion-mnist"].location(downloads) and not setup.quick:
        settings = ("fashion-mnist", ["experts.epochs=3", "pgd.steps=10"])
    elif find_spec("sklearn"):
        small = [*QUICK, "data.train_examples=64", "data.test_examples=16", "experts.epochs=1"]
        settings = ("digits", small if setup.quick else ["model.width=64", "pgd.steps=10"])
    else:
        return "nothing: neither Fashion-MNIST in ./data or Debian's folder, nor scikit-learn with its digits"
    preset, assignments = settings
    experiment = build(preset, 0, assignments)
    return experiment, sources.load(experiment.data, downloads)


def accuracy(setup: Setup) -> Iterator[Row]:
    """Accuracy of experts trained in each precision, clean and under PGD-50 made in each precision.

    The last row is the speed of the evaluation, in planned floating-point operations, for the plan.
    """
    prepared = fashion_mnist_or_digits(setup)
    if isinstance(prepared, str):
        yield Row("accuracy", prepared)
        return
    base, images = prepared
    steps, examples = (2, 16) if setup.quick else (50, 2000)
    x, y = to_float(torch.tensor(images.x_test[:examples])).to(setup.device), torch.tensor(images.y_test[:examples])
    y = y.to(setup.device)
    for precision in TRAINING_PRECISIONS:
        changed = base.experts.model_copy(update={"precision": precision})
        experiment = base.model_copy(update={"experts": changed})
        with tempfile.TemporaryDirectory() as folder:
            clock = time.perf_counter()
            model = _trained(setup, experiment, images, Store(folder, "benchmark", labels=experiment.labels)).eval()
            yield Row(f"{base.preset}, trained in {precision}", time.perf_counter() - clock, "s")
        for made_in in ("clean", *PRECISIONS):
            attack = f"PGD-{steps} made in {made_in}" if made_in != "clean" else made_in
            attacked_x = x if made_in == "clean" else _attacked_images(model, made_in, x, y, experiment, steps)
            with float32_as("ieee"):
                correct = predict(frozen(model), attacked_x).argmax(1) == y
            yield Row(f"trained in {precision}: {attack}", 100 * float(correct.double().mean()), "% correct")
        if precision == FLOAT32:
            yield _evaluation_speed(setup, experiment, model, images)


def _attacked_images(
    model: nn.Module, made_in: str, x: torch.Tensor, y: torch.Tensor, experiment: Experiment, steps: int
) -> torch.Tensor:
    ball, view, parts = Ball("linf", experiment.threat.epsilon), attacked(model, made_in), list[torch.Tensor]()
    with float32_as(made_in):
        for images, labels in zip(torch.split(x, 512), torch.split(y, 512), strict=True):
            *_, last = pgd(view, images, labels, ball, step_size=experiment.threat.step_size, steps=steps)
            parts.append(last.x)
    return torch.cat(parts)


EVALUATION_SPEED = "evaluation, planned operations"


def _evaluation_speed(setup: Setup, experiment: Experiment, model: nn.Module, images: sources.Images) -> Row:
    """Of the 17 columns on a trained expert, as an evaluation computes them.

    Images that are fooled early count in full, as in the plan.
    """
    examples = len(images.x_test) if setup.quick else min(2048, len(images.x_test))
    sizes = Sizes(1, examples, images.shape)
    planned = [job for job in jobs(experiment, EVALUATE, sizes) if (job.model, job.suite) == (MODEL, PAPER)]
    clock = time.perf_counter()
    _columns(setup, experiment, model, images, examples)
    return Row(EVALUATION_SPEED, 1e-12 * sum(job.flop for job in planned) / (time.perf_counter() - clock), "TFLOP/s")


def _columns(setup: Setup, experiment: Experiment, model: nn.Module, images: sources.Images, examples: int) -> None:
    x, y = images.x_test[:examples], images.y_test[:examples]
    settings = (experiment.evaluation, experiment.threats)
    evaluate({MODEL: model}, MODEL, PAPER, x, y, *settings, seed=0, device=setup.device)


ROBUSTBENCH_BATCH = 32
"""Images that RobustBench attacks at once, by default."""


def columns(setup: Setup) -> Iterator[Row]:
    """The paper's columns, and those of them that torchattacks has: clean, nine FGSM, five PGD."""
    experiment, examples = setup.experiment("evaluation.beyond="), 8 if setup.quick else 512
    model = setup.model(experiment, experiment.spec("benign")).eval().requires_grad_(False)
    images = setup.random_images(-(-examples // setup.batch))
    images = sources.Images(images.x_train, images.y_train, images.x_train, images.y_train, 10, images.mean, images.std)
    fifteen = setup.experiment(*FEW_ITERATIONS)
    seconds = {
        name: _seconds(functools.partial(_columns, setup, settings, model, images, examples))
        for name, settings in (("17 columns", experiment), ("15 columns", fifteen))
    }
    for name, value in seconds.items():
        yield Row(f"{name}, {examples} images", value, "s")
    if find_spec("torchattacks") is None:
        yield Row("torchattacks", "nothing: it is not installed")
        return
    x, y = to_float(torch.tensor(images.x_test[:examples])).to(setup.device), torch.tensor(images.y_test[:examples])
    y = y.to(setup.device)
    for batch in dict.fromkeys((min(ROBUSTBENCH_BATCH, examples), examples)):
        peer = _seconds(functools.partial(_torchattacks, fifteen, model, x, y, batch))
        yield Row(f"15 columns by torchattacks, {batch} at once", peer, "s")
        yield Row(f"15 columns: ours are so many times faster, {batch}", peer / seconds["15 columns"])


def _torchattacks(experiment: Experiment, model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int) -> None:
    import torchattacks

    epsilon, step_size = experiment.threat.epsilon, experiment.threat.step_size
    attacks = [torchattacks.FGSM(model, eps=value) for value in experiment.evaluation.fgsm_epsilons]
    attacks += [
        torchattacks.PGD(model, eps=epsilon, alpha=step_size, steps=steps, random_start=False)
        for steps in experiment.evaluation.pgd_steps
    ]
    for images, labels in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
        for attack in attacks:
            predict(model, attack(images, labels)).argmax(1).eq(labels).sum().item()


def _seconds(work: Callable[[], None]) -> float:
    """Of work that ends with results on the host."""
    clock = time.perf_counter()
    work()
    return time.perf_counter() - clock
