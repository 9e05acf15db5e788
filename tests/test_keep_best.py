"""`keep=best`: the weights of the epoch with the best probe on validation images, also after interruptions."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dwf_cluster.api import load as load_model
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import predict
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import load
from dwf_cluster.defences.build import to_train, trained
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.plan.jobs import is_trained
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import Store, checkpoints, prune, tables
from dwf_cluster.training import loop
from dwf_cluster.training.loop import Stopped, train
from dwf_cluster.training.probe import Probe, ProbeResult, run_probe

from .conftest import TINY, task_for
from .gloo import run_workers

ROBUST = (0.25, 0.5, 0.5, 0.375)
"""Robust accuracy of the probe after each epoch: the second is the best, and the third as good."""

BEST = 2
SETTINGS = [
    *TINY,
    "data.validation_examples=30",
    "experts.epochs=4",
    "joint.epochs=4",
    "experts.keep=best",
    "joint.keep=best",
]


@pytest.fixture
def experiment() -> Experiment:
    return build("digits", 0, SETTINGS)


def _script_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the probe after each epoch measure `ROBUST`, so that the best epoch depends on no machine."""
    real = loop._epoch

    def epoch(task: Any, progress: Any, *arguments: Any) -> dict[str, Any] | None:
        row = real(task, progress, *arguments)
        return row and row | {"probe_pgd_accuracy": ROBUST[row["epoch"] - 1]}

    monkeypatch.setattr(loop, "_epoch", epoch)


def _train(experiment: Experiment, store: Store, name: str, **options: Callable[..., Any]) -> nn.Module:
    images = load(experiment.data, Path())
    model = to_train(experiment.models, name, images.format, experiment.seed, store)
    data = DeviceImages(images, experiment.data, torch.device("cpu"))
    return train(task_for(experiment, store, name, **options), model, data)


def _weights_of_every_epoch(experiment: Experiment, store: Store, name: str) -> list[dict[str, torch.Tensor]]:
    """The slow way: train to the end and copy the weights after each epoch."""
    images, copies = load(experiment.data, Path()), list[dict[str, torch.Tensor]]()
    model = to_train(experiment.models, name, images.format, experiment.seed, store)
    options = {"on_epoch": lambda row: copies.append(copy.deepcopy(dict(model.state_dict())))}
    train(
        task_for(experiment, store, name, **options), model, DeviceImages(images, experiment.data, torch.device("cpu"))
    )
    return copies


def _assert_weights(model: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    assert {n for n, tensor in model.state_dict().items() if not torch.equal(tensor, expected[n])} == set()


@pytest.fixture(autouse=True)
def _scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    _script_the_probe(monkeypatch)


@pytest.fixture(scope="module")
def every_epoch(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    torch.set_num_threads(1)
    last = build("digits", 0, [*SETTINGS, "experts.keep=last", "joint.keep=last"])
    copies = _weights_of_every_epoch(last, last.store(str(tmp_path_factory.mktemp("slow"))), "pgd-1")
    assert len(copies) == len(ROBUST)
    return copies


def test_the_kept_weights_are_those_of_the_best_epoch_and_the_first_of_equal_ones(
    experiment: Experiment, every_epoch: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    store = experiment.store(str(tmp_path))
    returned = _train(experiment, store, "pgd-1")
    images = load(experiment.data, Path()).format
    loaded = trained(experiment.models, "pgd-1", images, experiment.seed, store)
    for model in (returned, loaded):
        _assert_weights(model, every_epoch[BEST - 1])
    rows = tables.read(store, "metrics").to_pylist()
    assert [row["kept"] for row in rows] == [epoch == BEST for epoch in range(1, 5)]
    assert {row["probe_split"] for row in rows} == {"validation"}
    spec = experiment.spec("pgd-1")
    assert is_trained(spec, store)

    store.write("experiment.json", experiment.to_json().encode())
    _assert_weights(load_model(store.root, "pgd-1"), every_epoch[BEST - 1])
    other = replace(store, folder="other-seed0-0123456789")
    checkpoints.refer(store, other, "pgd-1")
    _assert_weights(trained(experiment.models, "pgd-1", images, experiment.seed, other), every_epoch[BEST - 1])
    last = checkpoints.load_latest(store, "pgd-1")
    assert last is not None
    assert {name.partition(".")[0] for name in last.tensors} == {"model"}
    removable, _ = prune.find(str(tmp_path))
    prune.remove(removable)
    assert [path.rpartition("/")[2] for path in checkpoints.folders(store, "pgd-1")] == ["epoch-00004"]
    _assert_weights(trained(experiment.models, "pgd-1", images, experiment.seed, store), every_epoch[BEST - 1])


def test_the_mixture_starts_from_the_best_experts(
    experiment: Experiment, every_epoch: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    store = experiment.store(str(tmp_path))
    for name in ("benign", "fgsm-1", "pgd-1"):
        _train(experiment, store, name)
    images = load(experiment.data, Path()).format
    mixture = to_train(experiment.models, "mixture", images, experiment.seed, store)
    _assert_weights(mixture.experts[2], every_epoch[BEST - 1])  # type: ignore[index]


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_training_killed_after_an_epoch_or_within_the_next_keeps_the_same_weights(
    experiment: Experiment, every_epoch: list[dict[str, torch.Tensor]], tmp_path: Path, epoch: int
) -> None:
    store = experiment.store(str(tmp_path))

    def kill(row: dict[str, Any]) -> None:
        if row["epoch"] == epoch:
            raise Interrupt

    with pytest.raises(Interrupt):
        _train(experiment, store, "pgd-1", on_epoch=kill)
    steps = itertools.count(1)
    with pytest.raises(Stopped):  # three steps an epoch
        _train(experiment, store, "pgd-1", stopping=lambda: next(steps) == 2)
    (*_, newest) = store.names("checkpoints/pgd-1")
    assert newest == f"epoch-{epoch:05d}-step-000002"
    _assert_weights(_train(experiment, store, "pgd-1"), every_epoch[BEST - 1])
    assert checkpoints.latest_epoch(store, "pgd-1") == 4
    assert [row["kept"] for row in tables.read(store, "metrics").to_pylist()] == [False, True, False, False]


def test_a_damaged_last_checkpoint_is_made_again_with_the_same_weights(
    experiment: Experiment, every_epoch: list[dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    store = experiment.store(str(tmp_path))
    _train(experiment, store, "pgd-1")
    store.write("checkpoints/pgd-1/epoch-00004/tensors.safetensors", b"damaged")
    checkpoints.discard_damaged(store, "pgd-1")
    assert checkpoints.latest_epoch(store, "pgd-1") == 3
    _assert_weights(_train(experiment, store, "pgd-1"), every_epoch[BEST - 1])


def _is_at(step: int, steps: Iterator[int]) -> bool:
    """Whether this is that step of the training, on the second worker."""
    return next(steps) == step and dist.get_rank() == 1


def _train_on_two_workers(folder: Path) -> None:
    """Train without an interruption, and stopped in the fourth epoch; and the slow way."""
    experiment = build("digits", 0, SETTINGS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _script_the_probe(monkeypatch)
        last = build("digits", 0, [*SETTINGS, "experts.keep=last"])
        copies = _weights_of_every_epoch(last, last.store(str(folder / "slow")), "pgd-1")
        for name, step in (("whole", None), ("stopped", 11)):
            store, steps = experiment.store(str(folder / name)), itertools.count(1)
            if step:
                with pytest.raises(Stopped):
                    _train(experiment, store, "pgd-1", stopping=functools.partial(_is_at, step, steps))
            dist.barrier()  # the first worker has saved
            _assert_weights(_train(experiment, store, "pgd-1"), copies[BEST - 1])
            dist.barrier()
            checkpoint = checkpoints.load_latest(store, "pgd-1")
            assert checkpoint is not None
            assert all(torch.equal(tensor, copies[BEST - 1][n]) for n, tensor in checkpoint.weights.items())


def test_two_workers_keep_the_best_epoch_stopped_or_not(tmp_path: Path) -> None:
    run_workers(2, _train_on_two_workers, tmp_path)


@pytest.mark.parametrize("name", ["experts", "joint"])
def test_keeping_the_best_epoch_without_validation_images_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(InvalidInput) as error:
        build("digits", 0, [f"{name}.keep=best"])
    assert str(error.value) == (
        f"experiment: {name}.keep: 'best' cannot be used: it needs data.validation_examples; allowed is last"
    )


def test_a_probe_with_a_random_start_draws_each_images_start_of_its_own() -> None:
    experiment = build("digits", 0, SETTINGS)
    images = load(experiment.data, Path())
    device_images = DeviceImages(images, experiment.data, torch.device("cpu"))
    threat = experiment.threat
    ball = Ball("linf", threat.epsilon)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    result = run_probe(model, device_images, Probe(threat, 2, 20, random_start=True), (3, "pgd-1"))
    x, y, _ = device_images.probed(20)
    correct = list[bool]()
    for number in range(20):
        one = slice(number, number + 1)
        generator = Draws((3, "pgd-1", "probe", number)).generator("start")
        start = ball.random_point(x[one], [generator])
        *_, last = pgd(frozen(model), x[one], y[one], ball, step_size=threat.step_size, steps=2, start=start)
        correct.append(bool(predict(model, last.x).argmax() == y[number]))
    assert result == ProbeResult(float((model(x).argmax(1) == y).double().mean()), sum(correct) / 20, "validation")
