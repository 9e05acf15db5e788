"""What runs inside a Ray task: an expert's Train run, the joint Train run, one family of attacks on one model.

A training without workers of its own runs in its task's process (Train's local mode). With workers, Train starts
them, and they hold the GPUs; the task that waits for them holds nothing. Such a task must not call CUDA: the first
call reads CUDA_VISIBLE_DEVICES once and for all, and Ray may give the process a GPU later.
"""

from __future__ import annotations

import functools
import os
import platform
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ray
import torch
import torch.distributed as dist
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from dwf_cluster.cluster import failures
from dwf_cluster.cluster.control import Claim
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.defences.build import to_train, trained
from dwf_cluster.determinism import make_deterministic
from dwf_cluster.evaluation.registry import CHECKS
from dwf_cluster.evaluation.run import check, evaluate
from dwf_cluster.plan.jobs import Job, is_trained, prepare_training
from dwf_cluster.plan.schedule import Allocation
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.store.job_log import recorded
from dwf_cluster.training import Probe, Stopped, Task, train

CLAIM_SECONDS = 60.0
"""How long a process waits for the claim of a job that has left its GPU, but has not ended yet."""


class DeviceShared(RuntimeError):
    """A worker was given a device that another job computes on. The message names device, node and both jobs."""


def run_job(job: Job, store: Store, images: ray.ObjectRef, place: Allocation, control: Any) -> bool:
    """Run one job and record it.

    Args:
        job: of the plan.
        store: takes what comes out.
        images: reference to a `data.sources.Images`.
        place: processes, and CPUs and GPUs of each.
        control: the run's `Control` actor.

    Returns:
        Whether it came to its end; else the run is to stop, and it has saved what it has.
    """
    if job.copy_of:
        _copy(job, replace(store, folder=job.copy_of, run=None), store)
        return True
    columns = {"stage": job.stage, "model": job.model, "task": job.name}
    gpus = place.gpus * max(1, place.workers)
    log = failures.logged(store, job.file)
    with log, recorded(store, columns, job.file, gpus, None if place.gpus else "cpu") as row:
        try:
            if not job.is_training:
                _evaluate(job, store, images, place, control)
            else:
                row["note"] = "\n".join(prepare_training(job, store)) or None
                if checkpoints.latest_path(store, job.model):  # also where its row was removed
                    row["attempts"] = max(2, row["attempts"])
                if not is_trained(job.spec, store):
                    _fit(functools.partial(_train, job, store, images, place, control), job, store, place)
        finally:  # Only the processes that compute know their devices, and they have told the control actor.
            claims = _get(control.claims.remote((job.folder, job.name)))
            row["device"] = ", ".join(sorted({claim.hardware for claim in claims})) or row["device"]
            row["devices"] = [str(claim) for claim in claims]
        if job.is_training and not is_trained(job.spec, store):
            row["state"] = "stopped"
    return bool(row["state"] == "done")


def _copy(job: Job, source: Store, store: Store) -> None:
    """Take what another experiment's job has come to; what says that the job is done comes last."""
    tables.copy(source, store, "jobs", job.file, state="shared")
    for table in job.tables:
        tables.copy(source, store, table, job.model if table == "metrics" else job.file)
    if job.is_training:
        checkpoints.refer(source, store, job.model)


def _fit(loop: Callable[[], None], job: Job, store: Store, place: Allocation) -> None:
    resources = {"CPU": float(place.cpus)} | ({"GPU": float(place.gpus)} if place.gpus else {})
    notes = store.path(f"train/run-{store.run or 0:05d}")  # a run that has lost its lock writes into no other's
    TorchTrainer(
        loop,
        scaling_config=ScalingConfig(
            num_workers=place.workers,
            use_gpu=place.gpus > 0,
            resources_per_worker=resources,
            label_selector=place.label_selector,
        ),
        # Undefined: torch chooses in the worker, nccl where there is a GPU and gloo where there is none.
        torch_config=TorchConfig(backend=dist.Backend.UNDEFINED if place.gpus else "gloo"),
        # Whatever fails is tried again, or not, by the driver (`failures`).
        # No time stamp in the name: the same run again is the same run.
        run_config=RunConfig(
            name=job.file,
            # Arrow's own S3 would look for credentials and endpoint in other places than the store does.
            storage_filesystem=None if store.is_local else PyFileSystem(FSSpecHandler(store.files)),
            storage_path=notes if store.is_local else notes.partition("://")[2],
            failure_config=FailureConfig(max_failures=failures.BY_RAY),
        ),
    ).fit()


def _train(job: Job, store: Store, images: ray.ObjectRef, place: Allocation, control: Any) -> None:
    """One worker's part of a Train run."""
    make_deterministic(place.cpus)
    device = _claim(control, job, ray.train.get_context().get_world_rank(), place)
    experiment, arrays = job.experiment, _get(images)
    evaluation = experiment.evaluation
    stopped = _stopped(control)
    task = Task(
        job.spec,
        job.stage,
        experiment.seed,
        Probe(experiment.threat, evaluation.probe_steps, evaluation.probe_examples),
        experiment.checkpoint_minutes,
        store,
        ray.train.report,
        lambda: job.folder in stopped.folders,
    )
    try:
        model = to_train(experiment.models, job.model, arrays.format, experiment.seed, store)
        train(task, model.to(device), DeviceImages(arrays, experiment.data, device))
    except Stopped:
        return  # to Train, which would take an exception for a failure and try again
    except Exception:
        if place.workers:  # of which the job's own process hears only a part
            failures.keep_log(store, failures.log_name(job.file, ray.train.get_context().get_world_rank()))
        raise


def _evaluate(job: Job, store: Store, images: ray.ObjectRef, place: Allocation, control: Any) -> None:
    make_deterministic(place.cpus)
    device = _claim(control, job, 0, place)
    experiment, arrays = job.experiment, _get(images)
    assert job.suite is not None
    shard = slice(job.first, job.stop)
    x, y = arrays.x_test[shard], arrays.y_test[shard]
    names = experiment.names if job.tests_transfer else (job.model,)
    seed, specs = experiment.seed, experiment.models
    models = {name: trained(specs, name, arrays.format, seed, store).to(device) for name in names}
    settings = (x, y, experiment.evaluation, experiment.threat)
    if job.suite == CHECKS:
        checks = check(models[job.model], job.model, *settings, seed=seed, device=device)
        tables.write(store, CHECKS, job.file, checks)
        return
    rows, predictions = evaluate(models, job.model, job.suite, *settings, seed=seed, device=device, first=job.first)
    tables.write(store, "predictions", job.file, predictions)
    tables.write(store, "shards", job.file, rows)


def _get(reference: Any) -> Any:
    """`ray.get` on another thread: while the main one waits, Ray gives the CPUs of its task to another task."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ray.get, reference).result()


def _claim(control: Any, job: Job, worker: int, place: Allocation) -> torch.device:
    """Tell the control actor which device this process computes on; return the device.

    Raises:
        DeviceShared: if another job still claims the device after `CLAIM_SECONDS`. Ray takes a GPU back as soon as
            the process that held it is gone, which may be before that process's job has ended.
    """
    device, hardware, name = torch.device("cpu"), "cpu", "cpu"
    if place.gpus and torch.cuda.is_available():
        # All workers of a Train run on a node see all its GPUs there; Train has made each worker's own the current one.
        device = torch.device("cuda", torch.cuda.current_device())
        hardware = torch.cuda.get_device_name(device)
        name = f"{hardware} GPU-{torch.cuda.get_device_properties(device).uuid}"
    elif place.gpus:  # Ray was told of GPUs that this machine does not have
        name = "GPU " + ",".join(map(str, ray.get_runtime_context().get_accelerator_ids()["GPU"]))
    claim = Claim((job.folder, job.name), worker, platform.node(), name, place.gpus, hardware, os.getpid())
    deadline = time.monotonic() + CLAIM_SECONDS
    while complaint := _get(control.claim.remote(claim)):
        if time.monotonic() > deadline:
            raise DeviceShared(complaint)
        time.sleep(0.1)
    return device


class _Stopped:
    """Which experiments are to stop, as this process has heard.

    Attributes:
        folders: theirs.
    """

    def __init__(self, control: Any) -> None:
        self.folders: set[str] = set()
        threading.Thread(target=self._listen, args=(control,), daemon=True).start()

    def _listen(self, control: Any) -> None:
        try:
            while True:
                self.folders = ray.get(control.stopped.remote(len(self.folders)))
        except ray.exceptions.RayError:  # the run is over
            return


_stopped = functools.cache(_Stopped)
"""One for each run that this process works for."""
