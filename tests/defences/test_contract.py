"""The contract of the training loop with a method: one optimiser step for each loss, however a batch is cut."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.attacks.pgd import fgsm
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.data.sources import load
from dwf_cluster.defences import adversarial
from dwf_cluster.defences.build import untrained
from dwf_cluster.defences.loss import Frozen, Loss, cross_entropy
from dwf_cluster.defences.registry import METHODS, Method, ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.models.frozen import frozen
from dwf_cluster.presets import build
from dwf_cluster.store import Store, checkpoints
from dwf_cluster.training.loop import Stopped, train

from ..conftest import TINY, task_for
from ..gloo import run_workers

CPU = torch.device("cpu")


def small_network(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> nn.Module:
    """Without BatchNorm, so the weights do not depend on how a batch is cut, up to rounding."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, images.classes))


def two_losses(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """FGSM examples of the model for all parameters; then, of the changed model, for the last layer's alone."""
    yield cross_entropy(model, fgsm(x, differentiate(frozen(), x, y)[0], 0.1), y)
    x = fgsm(x, differentiate(frozen(), x, y)[0], 0.1)
    fixed = list(model.parameters())[:2]
    for parameter in fixed:
        parameter.requires_grad_(False)
    loss = cross_entropy(model, x, y)
    for parameter in fixed:
        parameter.requires_grad_(True)
    yield loss


def random_attacks(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """A step on PGD examples from random starts, one on FGSM examples of an epsilon of a range."""
    yield from adversarial.pgd(spec, model, frozen, x, y, draws)
    yield from adversarial.fgsm(spec, model, frozen, x, y, draws)


RANDOM_ATTACKS = ["pgd.random_start=true", "pgd.step_sizes=0.02,0.05", "fgsm.draw=range"]


def no_loss(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    yield from ()


def more_losses_for_the_first_part(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    yield cross_entropy(model, x, y)
    if len(y) > 10:
        yield cross_entropy(model, x, y)


def _train(
    folder: Path,
    name: str,
    losses: str = "two_losses",
    stopping: Callable[[], bool] = lambda: False,
    accumulation: int = 1,
) -> nn.Module:
    """Train the small network by a method of this file: three epochs of three batches of 32 images."""
    experiment = build("digits", 0, [*TINY, *RANDOM_ATTACKS, f"experts.accumulation={accumulation}"])
    images = load(experiment.data, folder)
    task = task_for(experiment, Store(str(folder), name, labels=experiment.labels), "benign", stopping=stopping)
    task = replace(task, spec=replace(task.spec, method="toy", options=experiment.defended.options))
    method = Method(f"{__name__}:small_network", f"{__name__}:{losses}", lambda spec: 3.0)
    with mock.patch.dict(METHODS, toy=method):
        model = untrained(task.spec, images.format, task.seed, {})
        return train(task, model, DeviceImages(images, experiment.data, CPU))


def _weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    checkpoint = checkpoints.load_latest(Store(str(folder), name), "benign")
    assert checkpoint is not None
    assert checkpoint.epoch == 3
    return checkpoint.weights


def _assert_close(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_each_loss_takes_a_step_on_the_changed_model_and_leaves_other_parameters(tmp_path: Path) -> None:
    trained = _train(tmp_path, "toy")
    experiment = build("digits", 0, TINY)
    images = load(experiment.data, tmp_path)
    data, settings = DeviceImages(images, experiment.data, CPU), experiment.experts
    spec = replace(experiment.spec("benign"), method="toy")
    with mock.patch.dict(METHODS, toy=Method(f"{__name__}:small_network", "", lambda spec: 3.0)):
        model = untrained(spec, images.format, 0, {})
    rates = {"momentum": settings.momentum, "weight_decay": settings.weight_decay}
    optimizer = torch.optim.SGD(model.parameters(), settings.learning_rate, **rates)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 9)
    for epoch in range(3):
        for step, indices in enumerate(data.epoch(settings.batch_size, Draws((0, "benign", epoch)))):
            x, y = data.train_batch(indices, Draws((0, "benign", epoch, step)))
            for only_the_last_layer in (False, True):
                optimizer.zero_grad()
                adversarial = fgsm(x, differentiate(frozen(model), x, y)[0], 0.1)
                nn.functional.cross_entropy(model(adversarial), y).backward()
                for parameter in list(model.parameters())[:2] if only_the_last_layer else ():
                    parameter.grad = None  # no step, no momentum, no weight decay
                optimizer.step()
            schedule.step()
    _assert_close(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize(("losses", "parts"), [("two_losses", 2), ("two_losses", 5), ("random_attacks", 3)])
def test_several_losses_are_accumulated_like_one(tmp_path: Path, losses: str, parts: int) -> None:
    whole = _train(tmp_path, "whole", losses)
    _assert_close(whole.state_dict(), _train(tmp_path, "cut", losses, accumulation=parts).state_dict())


@pytest.mark.parametrize("losses", ["two_losses", "random_attacks"])
def test_a_training_with_several_losses_resumes_within_an_epoch_bit_for_bit(tmp_path: Path, losses: str) -> None:
    whole = _train(tmp_path, "whole", losses).state_dict()
    calls = itertools.count(1)
    with pytest.raises(Stopped):
        _train(tmp_path, "stopped", losses, stopping=lambda: next(calls) == 5)  # asked once a batch
    assert Store(str(tmp_path), "stopped").names("checkpoints/benign")[-1] == "epoch-00001-step-000002"
    resumed = _train(tmp_path, "stopped", losses).state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def _two_workers(folder: Path) -> None:
    """Train without an interruption, with one, and with two parts for each worker."""
    _train(folder, "whole")
    calls = itertools.count(1)
    with pytest.raises(Stopped):
        _train(folder, "stopped", stopping=lambda: next(calls) == 5 and dist.get_rank() == 1)
    dist.barrier()  # the first worker has saved
    _train(folder, "stopped")
    _train(folder, "cut", accumulation=2)
    _train(folder, "random", "random_attacks")


def test_two_workers_take_the_steps_of_one_with_several_losses(tmp_path: Path) -> None:
    one = _train(tmp_path, "one").state_dict()
    run_workers(2, _two_workers, tmp_path)
    whole, resumed = _weights(tmp_path, "whole"), _weights(tmp_path, "stopped")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    _assert_close(one, whole)
    _assert_close(one, _weights(tmp_path, "cut"))
    random = _train(tmp_path, "random on one", "random_attacks").state_dict()
    _assert_close(random, _weights(tmp_path, "random"))


def test_a_method_that_yields_no_loss_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^method toy: no loss for a batch; a method yields one at least$"):
        _train(tmp_path, "toy", "no_loss")


def test_a_method_that_yields_more_losses_for_one_part_is_an_error_that_names_it(tmp_path: Path) -> None:
    message = "^method toy: more losses for one part of a batch than for another$"
    with pytest.raises(ValueError, match=message):
        _train(tmp_path, "toy", "more_losses_for_the_first_part", accumulation=3)  # parts of 11, 11 and 10 images
