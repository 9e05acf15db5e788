"""Three workers, whose sums depend on the order of the terms: a resumed run has the bits of an uninterrupted one."""

from __future__ import annotations

import copy
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch
import torch.distributed as dist

from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import load
from dwf_cluster.defences.build import untrained
from dwf_cluster.determinism import make_deterministic
from dwf_cluster.presets import build
from dwf_cluster.store import Store, checkpoints
from dwf_cluster.training.loop import Stopped, train

from . import PATIENCE
from .conftest import ARGUMENTS, TINY, assert_same, task_for
from .gloo import run_workers
from .process import Launch, command_line, resume_and_stop

MODELS = ("pgd-1", "mixture")
INTERRUPTED = ("after an epoch", "in the middle of an epoch")


class Interrupt(Exception):
    pass


def _interrupt_after_the_first_epoch(row: dict[str, Any]) -> None:
    if row["epoch"] == 1:
        raise Interrupt


def _train_three_times(folder: Path, name: str) -> None:
    """Train a model without an interruption, and with one at each of two instants; one worker requests the second."""
    experiment = build("digits", 0, TINY)
    images = load(experiment.data, folder)
    experts = {
        parent: untrained(experiment.spec(parent), images.format, experiment.seed, {})
        for parent in experiment.spec(name).parents
    }

    def run(run_name: str, **options: Callable[..., Any]) -> None:
        model = untrained(experiment.spec(name), images.format, experiment.seed, copy.deepcopy(experts))
        store = Store(str(folder), run_name, labels=experiment.labels)
        try:
            data = DeviceImages(images, experiment.data, torch.device("cpu"))
            train(task_for(experiment, store, name, **options), model, data)
        finally:
            dist.barrier()  # the first worker has saved

    run("whole")
    with pytest.raises(Interrupt):
        run("after an epoch", on_epoch=_interrupt_after_the_first_epoch)
    steps = itertools.count(1)
    with pytest.raises(Stopped):  # three steps an epoch
        run("in the middle of an epoch", stopping=lambda: next(steps) == 5 and dist.get_rank() == 2)
    assert checkpoints.latest_epoch(Store(str(folder), "after an epoch"), name) == 1
    stored_name = checkpoints.stored_name(name)
    (*_, last) = Store(str(folder), "in the middle of an epoch").names(f"checkpoints/{stored_name}")
    assert last == "epoch-00001-step-000002"
    for run_name in INTERRUPTED:
        run(run_name)


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


def test_sums_on_nvlink_switches_are_off_even_if_the_environment_turns_them_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "1")
    try:
        make_deterministic(1)
        assert os.environ["NCCL_NVLS_ENABLE"] == "0"
    finally:
        torch.use_deterministic_algorithms(False)


JOINT = ["--stages", "joint", *ARGUMENTS, "--cpus", "3", "--joint-workers", "3"]


def _suspended_worker(folder: Path, epoch: int) -> psutil.Process:
    """Suspend a worker of the joint stage as soon as an epoch is saved: the others wait for its gradients."""
    deadline = time.monotonic() + PATIENCE
    while not any(folder.glob(f"runs/*/checkpoints/joint/epoch-{epoch:05d}/manifest.json")):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.01)  # there is no event for a file of another process
    worker = next(process for process in psutil.process_iter() if "RayTrainWorker" in command_line(process))
    worker.suspend()
    return worker


@pytest.mark.interruptions
def test_a_joint_stage_of_three_workers_stopped_and_killed_ends_with_the_same_bits(
    reference_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    runs = []
    for name in ("uninterrupted", "interrupted"):
        launch = Launch(tmp_path / name)
        experts_only = shutil.ignore_patterns("joint*", "mixture*", "evaluat*", "lease", "status.json")
        shutil.copytree(reference_run[0], launch.folder / "runs" / reference_run[0].name, ignore=experts_only)
        runs.append(launch)
    uninterrupted, interrupted = runs
    result = uninterrupted(*JOINT)
    assert result.returncode == 0, result.stderr

    def stop(driver: psutil.Process, line: str) -> None:
        worker = _suspended_worker(interrupted.folder, epoch=1)
        driver.send_signal(signal.SIGINT)
        resume_and_stop(worker)

    def kill(driver: psutil.Process, line: str) -> None:
        _suspended_worker(interrupted.folder, epoch=2).kill()

    code, stderr = interrupted.run_and_act_at("^Ray dashboard", stop, *JOINT)
    assert code == 130, stderr
    folders = [launch.folder / "runs" / reference_run[0].name for launch in runs]
    assert list(folders[1].glob("checkpoints/joint/epoch-00001-step-*"))  # in the middle of the second epoch
    code, stderr = interrupted.run_and_act_at("^Ray dashboard", kill, *JOINT)
    assert code == 0, stderr
    assert_same(*folders, models=["mixture"], tables=["metrics"])
    jobs = pd.read_parquet(folders[1] / "results" / "jobs").set_index("task")
    assert jobs.loc["joint", "attempts"] > 1
    assert len(jobs.loc["joint", "devices"]) == 3
