"""TRADES, Free, FGSM-RS, N-FGSM and random-at, each against a plain loop with an unfolded model and torch.autograd."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.data.sources import load
from dwf_cluster.defences.build import untrained
from dwf_cluster.defences.registry import METHODS, ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment
from dwf_cluster.presets import build
from dwf_cluster.store import Store, checkpoints
from dwf_cluster.training.loop import Stopped, train

from ..conftest import TINY, InDouble, task_for
from ..gloo import run_workers

CPU = torch.device("cpu")
NAMES = ["trades", "free", "fgsm-rs", "n-fgsm", "random-at"]
# 88 images: batches of 30, 29 and 29, so the perturbation has rows that no batch uses. Epsilon is not small against
# the pixels' distance from 0 and 1, so clipping matters.
SETTINGS = [
    *TINY,
    "data.train_examples=88",
    "pgd.epsilon=0.1",
    "pgd.step_size=0.04",
    "pgd.random_start=true",
    "trades.steps=3",
    "trades.beta=2.5",
    "free.replays=3",
    "experts.epochs=4",
    "n_fgsm.noise=1.5",
]


def convolutions(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> nn.Module:
    """With BatchNorm behind a convolution; in double precision, so that rounding changes no sign of a gradient."""
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
    return InDouble(nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(256, images.classes)))


def without_batchnorm(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> nn.Module:
    """Its weights do not depend on how a batch is cut, up to rounding."""
    return InDouble(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, images.classes)))


def _experiment(name: str) -> Experiment:
    return build("digits", 0, [*SETTINGS, f"defence={name}"])


def _train(
    folder: Path,
    store: str,
    name: str,
    network: str = "convolutions",
    stopping: Callable[[], bool] = lambda: False,
    accumulation: int = 1,
) -> nn.Module:
    experiment = build("digits", 0, [*SETTINGS, f"defence={name}", f"experts.accumulation={accumulation}"])
    images = load(experiment.data, folder)
    task = task_for(experiment, Store(str(folder), store, labels=experiment.labels), name, stopping=stopping)
    with mock.patch.dict(METHODS, {name: replace(METHODS[name], build=f"{__name__}:{network}")}):
        model = untrained(task.spec, images.format, task.seed, {})
        return train(task, model, DeviceImages(images, experiment.data, CPU))


def _weights(folder: Path, store: str, name: str) -> dict[str, torch.Tensor]:
    checkpoint = checkpoints.load_latest(Store(str(folder), store), name)
    assert checkpoint is not None
    return checkpoint.weights


# ------------------------------------------------------------------------------------------ the slow, obvious way


def _draw(kind: Callable[..., torch.Tensor], x: torch.Tensor, draws: Draws) -> torch.Tensor:
    """A draw for each image, by its position in the batch."""
    return torch.stack([kind(x.shape[1:], generator=draws.generator(f"start of image {n}")) for n in range(len(x))])


def _gradient(model: nn.Module, x: torch.Tensor, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Of the loss of the logits at x, in evaluation mode."""
    model.eval()
    leaf = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model(leaf)), leaf)
    model.train()
    return gradient


def _clip(x: torch.Tensor, moved: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.minimum(torch.maximum(moved, x - epsilon), x + epsilon).clamp(0, 1)


def _kl(target: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Mean over images of KL(softmax(target) || softmax(logits))."""
    p, q = target.softmax(1), logits.softmax(1)
    return (p * (p.log() - q.log())).sum() / len(p)


def slow_trades(model: nn.Module, x: torch.Tensor, y: torch.Tensor, draws: Draws, e: Experiment) -> torch.Tensor:
    model.eval()
    target = model(x).detach()
    moved = x + 0.001 * _draw(torch.randn, x, draws)
    for _ in range(3):
        gradient = _gradient(model, moved, lambda logits: _kl(target, logits))
        moved = _clip(x, moved + 0.04 * gradient.sign(), 0.1)
    logits = model(torch.cat([x, moved]))
    clean, attacked = logits[: len(x)], logits[len(x) :]
    return F.cross_entropy(clean, y) + 2.5 * _kl(clean, attacked)


def slow_fgsm_rs(model: nn.Module, x: torch.Tensor, y: torch.Tensor, draws: Draws, e: Experiment) -> torch.Tensor:
    start = (x + 0.1 * (2 * _draw(torch.rand, x, draws) - 1)).clamp(0, 1)
    gradient = _gradient(model, start, lambda logits: F.cross_entropy(logits, y))
    return F.cross_entropy(model(_clip(x, start + 0.125 * gradient.sign(), 0.1)), y)


def slow_n_fgsm(model: nn.Module, x: torch.Tensor, y: torch.Tensor, draws: Draws, e: Experiment) -> torch.Tensor:
    noisy = (x + 0.15 * (2 * _draw(torch.rand, x, draws) - 1)).clamp(0, 1)
    gradient = _gradient(model, noisy, lambda logits: F.cross_entropy(logits, y))
    return F.cross_entropy(model((noisy + 0.1 * gradient.sign()).clamp(0, 1)), y)


def slow_random_at(model: nn.Module, x: torch.Tensor, y: torch.Tensor, draws: Draws, e: Experiment) -> torch.Tensor:
    def loss(logits: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, y)

    fgsm = (x + draws.choice("epsilon", e.fgsm.epsilons) * _gradient(model, x, loss).sign()).clamp(0, 1)
    pgd = (x + 0.1 * (2 * _draw(torch.rand, x, draws) - 1)).clamp(0, 1)
    for _ in range(draws.choice("steps", e.pgd.steps)):
        pgd = _clip(x, pgd + 0.04 * _gradient(model, pgd, loss).sign(), 0.1)
    return F.cross_entropy(model(torch.cat([x, fgsm, pgd])), y.repeat(3))


SLOW = {"trades": slow_trades, "fgsm-rs": slow_fgsm_rs, "n-fgsm": slow_n_fgsm, "random-at": slow_random_at}


def _slow_free(model: nn.Module, x: torch.Tensor, y: torch.Tensor, delta: torch.Tensor) -> Iterator[torch.Tensor]:
    """Losses of the replays; `delta` is changed after each."""
    for _ in range(3):
        attacked = (x + delta[: len(x)]).clamp(0, 1).requires_grad_()
        loss = F.cross_entropy(model(attacked), y)
        (gradient,) = torch.autograd.grad(loss, attacked, retain_graph=True)
        yield loss
        delta[: len(x)] = (delta[: len(x)] + 0.1 * gradient.sign()).clamp(-0.1, 0.1)


def _train_slowly(folder: Path, name: str) -> nn.Module:
    experiment = _experiment(name)
    images = load(experiment.data, folder)
    data, spec = DeviceImages(images, experiment.data, CPU), experiment.defended
    with mock.patch.dict(METHODS, {name: replace(METHODS[name], build=f"{__name__}:convolutions")}):
        model = untrained(spec, images.format, 0, {})
    training = spec.training
    epochs = 2 if name == "free" else 4  # 4 by 3 replays, rounded up
    rates = {"momentum": training.momentum, "weight_decay": training.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), training.learning_rate, **rates)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3 * epochs)
    delta = torch.zeros(32, 1, 8, 8)
    for epoch in range(epochs):
        for step, indices in enumerate(data.epoch(32, Draws((0, name, epoch)))):
            draws = Draws((0, name, epoch, step))
            x, y = data.train_batch(indices, draws)
            losses = (
                _slow_free(model, x, y, delta)
                if name == "free"
                else (loss(model, x, y, draws, experiment) for loss in [SLOW[name]])
            )
            model.train()
            for loss in losses:
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            schedule.step()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains_the_weights_of_a_plain_loop(tmp_path: Path, name: str) -> None:
    expected, trained = _train_slowly(tmp_path, name).state_dict(), _train(tmp_path, "fast", name).state_dict()
    assert expected.keys() == trained.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(trained[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


# ------------------------------------------------------------------------------------------ interruption, workers


@pytest.mark.parametrize("name", ["trades", "free", "n-fgsm"])
def test_an_interrupted_training_resumes_within_an_epoch_bit_for_bit(tmp_path: Path, name: str) -> None:
    whole = _train(tmp_path, "whole", name).state_dict()
    calls = itertools.count(1)
    with pytest.raises(Stopped):
        _train(tmp_path, "stopped", name, stopping=lambda: next(calls) == 5)  # asked once a batch
    assert Store(str(tmp_path), "stopped").names(f"checkpoints/{name}")[-1] == "epoch-00001-step-000002"
    resumed = _train(tmp_path, "stopped", name).state_dict()
    assert all(torch.equal(resumed[key], tensor) for key, tensor in whole.items())


@pytest.mark.parametrize("name", NAMES)
def test_parts_of_a_batch_give_the_weights_of_a_whole_one(tmp_path: Path, name: str) -> None:
    whole = _train(tmp_path, "whole", name, "without_batchnorm").state_dict()
    cut = _train(tmp_path, "cut", name, "without_batchnorm", accumulation=3).state_dict()
    for key, tensor in whole.items():
        torch.testing.assert_close(cut[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


def _two_workers(folder: Path) -> None:
    _train(folder, "two", "free", "without_batchnorm")
    calls = itertools.count(1)
    with pytest.raises(Stopped):
        _train(folder, "stopped", "free", "without_batchnorm", lambda: next(calls) == 2)
    dist.barrier()  # the first worker has saved


def test_two_workers_train_free_as_one_does_and_one_continues_their_training(tmp_path: Path) -> None:
    run_workers(2, _two_workers, tmp_path)
    stopped = checkpoints.load_latest(Store(str(tmp_path), "stopped"), "free")
    assert stopped is not None
    assert bool(stopped.tensors["perturbation"][:29].flatten(1).any(1).all())  # the rows of both workers
    one = _train(tmp_path, "one", "free", "without_batchnorm").state_dict()
    two = _weights(tmp_path, "two", "free")
    continued = _train(tmp_path, "stopped", "free", "without_batchnorm").state_dict()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-5, atol=1e-6, msg=key)
        torch.testing.assert_close(continued[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


def test_a_trained_model_has_no_perturbation_in_its_checkpoint(tmp_path: Path) -> None:
    _train(tmp_path, "free", "free")
    checkpoint = checkpoints.load_latest(Store(str(tmp_path), "free"), "free")
    assert checkpoint is not None
    assert not any(key.startswith("perturbation") for key in checkpoint.tensors)


# ------------------------------------------------------------------------------------------ settings and cost


@pytest.mark.parametrize(
    ("name", "assignments", "passes", "epochs"),
    [
        ("trades", [], 27, 200),  # the target 1, ten gradients 20, two trained versions 6
        ("trades", ["trades.steps=2"], 11, 200),
        ("free", [], 24, 25),
        ("free", ["free.replays=3"], 9, 67),
        ("fgsm-rs", [], 5, 200),
        ("n-fgsm", [], 5, 200),
        ("random-at", ["pgd.steps=10"], 29, 200),
        ("random-at", ["pgd.steps=10", "pgd.random_start=true"], 31, 200),
    ],
)
def test_passes_and_epochs_of_a_method(name: str, assignments: list[str], passes: float, epochs: int) -> None:
    spec = build("cifar10", 0, [f"defence={name}", "baselines=", *assignments]).defended
    assert METHODS[spec.method].passes(spec) == passes
    assert spec.training.epochs == epochs
    assert METHODS[spec.method].group == "adversarial training"


@pytest.mark.parametrize("assignment", ["trades.beta=1", "trades.steps=3", "free.replays=2", "n_fgsm.noise=3"])
def test_a_setting_of_a_method_is_part_of_the_signature_unless_it_is_the_default(assignment: str) -> None:
    assert build("digits", 0, [assignment]).signature != build("digits").signature
