"""Three workers, whose sums depend on the order of the terms: a resumed run has the bits of an uninterrupted one."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import load
from dwf_cluster.experiment import MIXTURE, build
from dwf_cluster.store import Store, checkpoints
from dwf_cluster.training import expert, joint
from dwf_cluster.training.loop import Stopped, Task, train

from ..conftest import ARGUMENTS, TINY, Launch, assert_same, held, store_of, title
from .gloo import run_workers

MODELS = ("pgd-1", MIXTURE)
INTERRUPTED = ("after an epoch", "in the middle of an epoch")


class Interrupt(Exception):
    pass


def _interrupt_after_the_first_epoch(row: dict[str, Any]) -> None:
    if row["epoch"] == 1:
        raise Interrupt


def _train_three_times(folder: Path, model: str) -> None:
    """Train a model without a pause, and with one at each of two instants; one worker asks for the second one."""
    experiment = build("digits", 0, TINY)
    images, cpu = load(experiment.data, folder), torch.device("cpu")
    stage = "joint" if model == MIXTURE else "experts"
    if model == MIXTURE:
        perturb = joint.three_parts(experiment)
    else:
        regime = next(regime for regime in experiment.regimes if regime.name == model)
        perturb = expert.adversary(regime, experiment.pgd)

    def run(name: str, **options: Callable[..., Any]) -> None:
        module = joint.build(experiment, images) if model == MIXTURE else expert.build(experiment, images, model)
        task = Task(experiment, Store(str(folder), name), stage, model, experiment.training(stage), **options)
        try:
            train(task, module, DeviceImages(images, experiment.data, cpu), perturb)
        finally:
            dist.barrier()  # the first worker has saved

    run("whole")
    with pytest.raises(Interrupt):
        run("after an epoch", report=_interrupt_after_the_first_epoch)
    steps = itertools.count(1)
    with pytest.raises(Stopped):  # three steps an epoch
        run("in the middle of an epoch", stopping=lambda: next(steps) == 5 and dist.get_rank() == 2)
    assert checkpoints.latest_epoch(Store(str(folder), "after an epoch"), model) == 1
    (*_, last) = Store(str(folder), "in the middle of an epoch").names(f"checkpoints/{checkpoints_of(model)}")
    assert last == "epoch-00001-step-000002"
    for name in INTERRUPTED:
        run(name)


def checkpoints_of(model: str) -> str:
    return "joint" if model == MIXTURE else model


@pytest.mark.parametrize("model", MODELS)
def test_three_workers_resumed_end_with_the_bits_of_an_uninterrupted_run(tmp_path: Path, model: str) -> None:
    run_workers(3, _train_three_times, tmp_path, model)
    whole = checkpoints.load_latest(Store(str(tmp_path), "whole"), model)
    assert whole is not None
    for name in INTERRUPTED:
        resumed = checkpoints.load_latest(Store(str(tmp_path), name), model)
        assert resumed is not None
        assert resumed.epoch == whole.epoch
        different = [key for key, tensor in whole.tensors.items() if not torch.equal(tensor, resumed.tensors[key])]
        assert not different, name
