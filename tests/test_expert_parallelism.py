"""Processes that divide the experts of the joint stage compute the bits of one process, however many they are."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images, load
from dwf_cluster.experiment import Experiment
from dwf_cluster.models import exchange
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Mixture
from dwf_cluster.presets import build
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.training.loop import Stopped, train

from .conftest import TINY, task_for, untrained_model
from .gloo import run_workers

NINE_EXPERTS = [*TINY, "experts.fgsm=4", "experts.pgd=4", "joint.parallelism=experts"]
RUNS = ("one", "two", "three", "nine", "nine, then three")
"""By the number of their processes."""


def _mixture(experiment: Experiment, images: Images) -> Mixture:
    mixture = untrained_model(experiment, images, "mixture")
    assert isinstance(mixture, Mixture)
    return mixture


def _train(folder: Path, name: str, **options: Callable[..., Any]) -> Mixture:
    experiment = build("digits", 0, NINE_EXPERTS)
    images = load(experiment.data, folder)
    mixture, store = _mixture(experiment, images), Store(str(folder), name, labels=experiment.labels)
    train(
        task_for(experiment, store, "mixture", **options),
        mixture,
        DeviceImages(images, experiment.data, torch.device("cpu")),
    )
    return mixture


@contextmanager
def _group(folder: Path, name: str, rank: int, count: int) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/{name}.rendezvous", rank=rank, world_size=count)
    yield
    dist.destroy_process_group()


def _train_in_groups(folder: Path) -> None:
    """Nine processes train together, and one of them interrupts a run; then in groups of three, three, two and one."""
    rank, steps = dist.get_rank(), itertools.count(1)
    _train(folder, "nine")
    with pytest.raises(Stopped):  # three steps an epoch
        _train(folder, "nine, then three", stopping=lambda: next(steps) == 5 and rank == 7)
    dist.barrier()
    dist.destroy_process_group()
    groups = {"nine, then three": range(3), "three": range(3, 6), "two": range(6, 8)}
    for name, ranks in groups.items():
        if rank in ranks:
            with _group(folder, name, ranks.index(rank), len(ranks)):
                trained = _train(folder, name)
                dist.barrier()  # the first process has saved
                checkpoint = checkpoints.load_latest(Store(str(folder), name), "mixture")
                assert checkpoint is not None
                # Also the processes that save nothing end with the whole model.
                assert all(torch.equal(tensor, checkpoint.weights[n]) for n, tensor in trained.state_dict().items())
    if rank == 8:
        _train(folder, "one")


def test_any_number_of_processes_that_divide_the_experts_trains_the_same_bits(tmp_path: Path) -> None:
    """Weights and every column of `metrics` but times; a run may go on with another number of processes."""
    run_workers(9, _train_in_groups, tmp_path)
    one, rows = _results(tmp_path, "one")
    assert len(one) > 9 * 20
    for name in RUNS:
        tensors, other_rows = _results(tmp_path, name)
        assert [key for key, tensor in one.items() if not torch.equal(tensor, tensors[key])] == [], name
        assert other_rows == rows, name


def _results(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    store = Store(str(folder), name)
    checkpoint = checkpoints.load_latest(store, "mixture")
    assert checkpoint is not None
    assert checkpoint.epoch == 2
    return checkpoint.tensors, tables.read(store, "metrics").drop_columns(["seconds", "images_per_second"]).to_pylist()


@pytest.mark.parametrize("number", [1, 2, 4, 9])
@pytest.mark.parametrize("experts", [1, 5, 9])
def test_every_expert_has_one_owner(monkeypatch: pytest.MonkeyPatch, experts: int, number: int) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: number)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    owners = [list(exchange.owned(experts, rank)) for rank in range(number)]
    assert list(itertools.chain(*owners)) == list(range(experts))
    assert max(map(len, owners)) == -(-experts // number)


def test_exchanged_experts_have_the_logits_and_gradients_of_experts_that_run_one_after_the_other(
    tiny: Experiment, images: Images
) -> None:
    mixture = _mixture(tiny, images).double()
    x, y = torch.rand(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    plain = differentiate(mixture.eval(), x, y)
    with exchange.divided(mixture):
        assert isinstance(mixture.experts, exchange.ExchangedExperts)
        torch.testing.assert_close(differentiate(mixture, x, y), plain)
        torch.testing.assert_close(differentiate(frozen(mixture), x, y), plain)
    assert not isinstance(mixture.experts, exchange.ExchangedExperts)
