"""Two workers with NCCL, a GPU each: they end with one model, and resumed with the bits of an uninterrupted run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import load
from dwf_cluster.determinism import make_deterministic
from dwf_cluster.presets import build
from dwf_cluster.store import Store, checkpoints
from dwf_cluster.training.loop import Stopped, train

from .conftest import TINY, task_for, untrained_model
from .gloo import run_workers

MODELS = ("pgd-1", "mixture")


def _train_whole_and_interrupted(folder: Path, name: str) -> None:
    """Train a model without an interruption, and with one that the second worker requests in an epoch."""
    make_deterministic(1)
    device = torch.device("cuda", dist.get_rank())
    experiment = build("digits", 0, TINY)
    images = load(experiment.data, folder)

    def run(run_name: str, **options: Callable[..., Any]) -> None:
        model = untrained_model(experiment, images, name).to(device)
        store = Store(str(folder), run_name, labels=experiment.labels)
        try:
            train(task_for(experiment, store, name, **options), model, DeviceImages(images, experiment.data, device))
        finally:
            dist.barrier()  # the first worker has saved
        for tensor in model.state_dict().values():
            first = tensor.clone()
            dist.broadcast(first, 0)
            assert torch.equal(tensor, first)

    run("whole")
    steps = itertools.count(1)
    with pytest.raises(Stopped):  # three steps an epoch
        run("interrupted", stopping=lambda: next(steps) == 5 and dist.get_rank() == 1)
    run("interrupted")


@pytest.mark.cuda(2)
@pytest.mark.parametrize("model", MODELS)
def test_two_workers_resumed_end_with_the_bits_of_an_uninterrupted_run(tmp_path: Path, model: str) -> None:
    run_workers(2, _train_whole_and_interrupted, tmp_path, model, backend="nccl")
    whole, resumed = (checkpoints.load_latest(Store(str(tmp_path), name), model) for name in ("whole", "interrupted"))
    assert whole is not None
    assert resumed is not None
    assert resumed.epoch == whole.epoch
    different = [key for key, tensor in whole.tensors.items() if not torch.equal(tensor, resumed.tensors[key])]
    assert not different
