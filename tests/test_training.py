"""The epoch loop against a plain PyTorch loop, resumed against uninterrupted, several workers against one."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.attacks.pgd import fgsm, pgd
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images, load
from dwf_cluster.defences.build import to_train
from dwf_cluster.defences.loss import Frozen, Loss, cross_entropy
from dwf_cluster.defences.registry import METHODS, ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment
from dwf_cluster.models import frozen, refresh
from dwf_cluster.models.refresh import FrozenModel
from dwf_cluster.presets import build
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.training.loop import NonFiniteLoss, Stopped, train

from .conftest import TINY, InDouble, task_for
from .gloo import run_workers

CPU = torch.device("cpu")


class NoNorm(nn.Module):
    """A small network without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 16), nn.Tanh(), nn.Linear(16, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(x)
        return logits


def _seeded(model: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model()


def _store(folder: Path, name: str) -> Store:
    return Store(str(folder), name, labels=build("digits", 0, TINY).labels)


def _untrained(experiment: Experiment, images: Images, store: Store, name: str) -> nn.Module:
    return to_train(experiment.models, name, images.format, experiment.seed, store)


def _train(
    experiment: Experiment,
    images: Images,
    store: Store,
    name: str,
    model: nn.Module | None = None,
    stopping: Callable[[], bool] = lambda: False,
) -> nn.Module:
    """Train a model of an experiment, or another network in its place."""
    task = task_for(experiment, store, name, stopping=stopping)
    model = model or _untrained(experiment, images, store, name)
    return train(task, model, DeviceImages(images, experiment.data, CPU))


def _assert_equal_weights(one: nn.Module, other: nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["benign", "fgsm-1", "pgd-1"])
def test_the_loop_equals_a_plain_pytorch_loop(images: Images, store: Store, name: str) -> None:
    """In double precision: rounding must not decide on which side of zero a ReLU's input lies."""
    settings = ["experts.learning_rate=0.01", "experts.epochs=2", "fgsm.epsilons=0.06,0.2"]
    tiny = build("digits", 0, [*TINY, *settings])
    model = InDouble(_untrained(tiny, images, store, name))
    plain = copy.deepcopy(model)
    _train(tiny, images, store, name, model)

    data, experts = DeviceImages(images, tiny.data, CPU), tiny.experts
    optimizer = torch.optim.SGD(
        plain.parameters(), experts.learning_rate, momentum=experts.momentum, weight_decay=experts.weight_decay
    )
    steps = experts.epochs * math.ceil(96 / experts.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(experts.epochs):
        for index, indices in enumerate(data.epoch(experts.batch_size, Draws((0, name, epoch)))):
            draws = Draws((0, name, epoch, index))
            x, y = data.train_batch(indices, draws)
            target = copy.deepcopy(plain).eval()  # BatchNorm unfolded, in evaluation mode
            if name == "fgsm-1":
                gradient, _, _ = differentiate(target, x, y)
                x = fgsm(x, gradient, draws.choice("epsilon", tiny.fgsm.epsilons))
            elif name == "pgd-1":
                iterations, ball = draws.choice("steps", tiny.pgd.steps), Ball("linf", tiny.pgd.epsilon)
                *_, last = pgd(target, x, y, ball, step_size=tiny.pgd.step_size, steps=iterations)
                x = last.x
            plain.train()
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
            schedule.step()
    for key, tensor in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["benign", "pgd-1"])
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    tiny: Experiment, images: Images, tmp_path: Path, name: str
) -> None:
    whole = _train(tiny, images, _store(tmp_path, "whole"), name)

    class Interrupt(Exception):
        pass

    def interrupt(row: dict[str, object]) -> None:
        if row["epoch"] == 2:
            raise Interrupt

    store = _store(tmp_path, "interrupted")
    data = DeviceImages(images, tiny.data, CPU)
    with pytest.raises(Interrupt):
        train(task_for(tiny, store, name, on_epoch=interrupt), _untrained(tiny, images, store, name), data)
    resumed = _train(tiny, images, store, name, _other(_untrained(tiny, images, store, name)))
    _assert_equal_weights(whole, resumed)
    assert [row["epoch"] for row in tables.read(store, "metrics").to_pylist()] == [1, 2, 3]


@pytest.mark.parametrize("steps", [[1], [2, 3, 2], [8]], ids=str)
def test_a_stopped_training_saves_its_step_and_resumes_from_it(
    tiny: Experiment, images: Images, tmp_path: Path, steps: list[int]
) -> None:
    """Three epochs of three steps."""
    whole = _train(tiny, images, _store(tmp_path, "whole"), "pgd-1")
    store = _store(tmp_path, "stopped")
    for last, completed in zip(steps, itertools.accumulate(steps), strict=True):
        calls = itertools.count(1)
        with pytest.raises(Stopped):
            _train(tiny, images, store, "pgd-1", stopping=lambda calls=calls, last=last: next(calls) >= last)
        epoch, step = divmod(completed, 3)
        assert store.names("checkpoints/pgd-1")[-1] == f"epoch-{epoch:05d}-step-{step:06d}"
    _assert_equal_weights(whole, _train(tiny, images, store, "pgd-1"))
    one, other = (tables.read(_store(tmp_path, folder), "metrics") for folder in ("whole", "stopped"))
    timings = ["seconds", "images_per_second"]
    assert one.drop_columns(timings) == other.drop_columns(timings)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_a_training_killed_in_a_long_epoch_resumes_from_the_last_minutes_checkpoint(
    tiny: Experiment, images: Images, tmp_path: Path, steps: int
) -> None:
    """Three epochs of three steps, each of them longer than `checkpoint_minutes`."""
    whole = _train(tiny, images, _store(tmp_path, "whole"), "pgd-1")
    often = build("digits", 0, [*TINY, "checkpoint_minutes=1e-9"])
    store, calls = _store(tmp_path, "killed"), itertools.count(1)

    class Killed(BaseException):
        pass

    def kill() -> bool:
        if next(calls) > steps:
            raise Killed
        return False

    with pytest.raises(Killed):
        _train(often, images, store, "pgd-1", stopping=kill)
    epoch, step = divmod(steps, 3)
    assert store.names("checkpoints/pgd-1")[-1] == f"epoch-{epoch:05d}-step-{step:06d}"
    resumed = _train(often, images, store, "pgd-1", _other(_untrained(often, images, store, "pgd-1")))
    _assert_equal_weights(whole, resumed)


def _other(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.constant_(parameter, 3.0)
    return model


def test_restored_momentum_has_the_strides_of_its_parameter(
    tiny: Experiment, images: Images, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other strides the optimizer would run other kernels than in an uninterrupted run."""
    strides: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    step = torch.optim.SGD.step

    def watched(optimizer: torch.optim.SGD) -> None:
        step(optimizer)
        strides.extend((p.stride(), state["momentum_buffer"].stride()) for p, state in optimizer.state.items())

    calls = itertools.count(1)
    with pytest.raises(Stopped):
        _train(tiny, images, store, "benign", stopping=lambda: next(calls) == 2)
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    model = _train(tiny, images, store, "benign")
    assert len(strides) == 7 * len(list(model.parameters()))  # of nine steps
    assert all(parameter == momentum for parameter, momentum in strides)


def test_training_without_an_attack_builds_no_frozen_model(
    tiny: Experiment, images: Images, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_frozen = mock.Mock(wraps=frozen.build_frozen)
    refreshed = mock.create_autospec(FrozenModel._refreshed, side_effect=FrozenModel._refreshed)
    for module in (frozen, refresh):
        monkeypatch.setattr(module, "build_frozen", build_frozen)
    monkeypatch.setattr(FrozenModel, "_refreshed", refreshed)
    _train(tiny, images, store, "benign")
    epochs, steps = 3, 9
    assert (build_frozen.call_count, refreshed.call_count) == (epochs, 0)  # for the probe after each epoch
    _train(build("digits", 0, [*TINY, "experts.accumulation=2"]), images, store, "pgd-1")
    assert build_frozen.call_count == epochs + epochs + 1  # built once, and for the probes
    assert refreshed.call_count == steps  # once a step, however many parts the batch has


@pytest.mark.parametrize("parts", [2, 5])
def test_accumulated_gradients_are_the_batchs_without_batchnorm(
    tiny: Experiment, images: Images, tmp_path: Path, parts: int
) -> None:
    whole = _train(tiny, images, _store(tmp_path, "1"), "pgd-1", _seeded(NoNorm))
    cut = build("digits", 0, [*TINY, f"experts.accumulation={parts}"])
    accumulated = _train(cut, images, _store(tmp_path, "n"), "pgd-1", _seeded(NoNorm))
    for one, other in zip(whole.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_each_epoch_writes_a_row_and_a_checkpoint(tiny: Experiment, images: Images, store: Store) -> None:
    _train(tiny, images, store, "fgsm-1")
    rows = tables.read(store, "metrics").to_pylist()
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6), (3, 9)]
    assert all(0 <= row["probe_pgd_accuracy"] <= row["clean_accuracy"] <= 1 for row in rows)
    assert rows[-1]["learning_rate"] == pytest.approx(0.1 * (1 + math.cos(math.pi * 8 / 9)) / 2)
    assert checkpoints.latest_epoch(store, "fgsm-1") == 3


def nan_in_the_fifth_step(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """A method whose second loss is NaN in the second step of the second epoch."""
    yield cross_entropy(model, x, y)
    total, rows, _ = cross_entropy(model, x, y)
    yield Loss(total * float("nan") if draws.key[-2:] == (1, 1) else total, rows)


def test_a_loss_that_is_not_finite_names_step_model_and_last_good_checkpoint(
    tiny: Experiment, images: Images, store: Store
) -> None:
    method = replace(METHODS["standard"], losses=f"{__name__}:nan_in_the_fifth_step")
    with mock.patch.dict(METHODS, standard=method), pytest.raises(NonFiniteLoss) as error:
        _train(tiny, images, store, "benign")
    path = store.path("checkpoints/benign/epoch-00001")
    assert str(error.value) == f"the loss became nan in epoch 2, step 5 of benign; last good checkpoint: {path}"
    assert checkpoints.latest_epoch(store, "benign") == 1


class OverflowsUnderAttack(NoNorm):
    """Its logits are infinite in evaluation mode, which attacks use, from its fifth training step on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            return super().forward(x)
        return super().forward(x) * (torch.inf if self.steps >= 4 else 1)


def test_infinite_logits_under_attack_name_step_model_and_last_good_checkpoint(
    tiny: Experiment, images: Images, store: Store
) -> None:
    """The model decides in which step: with exploding weights, rounding would decide whether the loss is first."""
    with pytest.raises(NonFiniteLoss) as error:
        _train(tiny, images, store, "pgd-1", _seeded(OverflowsUnderAttack))
    path = store.path("checkpoints/pgd-1/epoch-00001")
    assert str(error.value) == (
        f"the model's outputs contain NaN or infinity in epoch 2, step 5 of pgd-1; last good checkpoint: {path}"
    )


def test_strengths_are_drawn_for_each_batch_from_the_whole_set() -> None:
    drawn = {Draws((0, "fgsm-1", 0, step)).choice("epsilon", (0.1, 0.2, 0.3)) for step in range(40)}
    assert drawn == {0.1, 0.2, 0.3}
    assert len({Draws((0, name, 0, 0)).generator("order").initial_seed() for name in ("fgsm-1", "fgsm-2")}) == 2


# ------------------------------------------------------------------------------------ two gloo workers


def _two_workers(folder: Path, norm: bool) -> None:
    """Train to the end, with an interruption that only the second worker requests."""
    experiment = build("digits", 0, TINY)
    calls = itertools.count(1)
    with pytest.raises(Stopped):  # on both
        _run(experiment, folder, "two", norm, lambda: dist.get_rank() == 1 and next(calls) == 2)
    dist.barrier()  # the first worker has saved
    assert _store(folder, "two").names(f"checkpoints/{'benign' if norm else 'pgd-1'}") == ["epoch-00000-step-000002"]
    _run(experiment, folder, "two", norm)


def _run(
    experiment: Experiment, folder: Path, name: str, norm: bool, stopping: Callable[[], bool] = lambda: False
) -> None:
    images = load(experiment.data, folder)
    store, model = _store(folder, name), None if norm else _seeded(NoNorm)
    _train(experiment, images, store, "benign" if norm else "pgd-1", model, stopping)


@pytest.mark.parametrize("norm", [False, True], ids=["without BatchNorm", "with BatchNorm"])
def test_two_workers_with_half_the_batch_follow_one_worker_on_the_whole(tmp_path: Path, norm: bool) -> None:
    """Without BatchNorm the weights agree up to rounding. With it, they agree with those of one worker that
    accumulates two halves, because BatchNorm normalises each half by its own statistics."""
    run_workers(2, _two_workers, tmp_path, norm)
    one = build("digits", 0, [*TINY, f"experts.accumulation={2 if norm else 1}"])
    _run(one, tmp_path, "one", norm)
    weights = {}
    for name in ("one", "two"):
        checkpoint = checkpoints.load_latest(_store(tmp_path, name), "benign" if norm else "pgd-1")
        assert checkpoint is not None
        weights[name] = checkpoint.weights
    for name, tensor in weights["one"].items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(weights["two"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
