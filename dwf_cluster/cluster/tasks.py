"""What runs inside a Ray task: an expert's Train run, the joint Train run, one family of attacks on one model.

An expert on a CPU trains in its task's process (Train's local mode); with GPUs the task holds nothing and Train
starts the worker that holds the GPU. Both ways are one call with another `ScalingConfig`.
"""

from __future__ import annotations

import functools
import platform
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import ray
import torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.metrics import Gauge
from torch import nn

from dwf_cluster.cluster.control import Claim
from dwf_cluster.cluster.schedule import Placement
from dwf_cluster.data.sources import Images
from dwf_cluster.determinism import make_deterministic
from dwf_cluster.evaluation import check, evaluate
from dwf_cluster.experiment import MIXTURE, Experiment
from dwf_cluster.grid import CHECKS
from dwf_cluster.plan import Job, is_trained, prepare_training
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.store.jobs import recorded
from dwf_cluster.training import expert, joint
from dwf_cluster.training.loop import Stopped, Task, weights


class DeviceShared(RuntimeError):
    """A worker was given a device that others have already. Its text names device, node and both."""


def run_job(job: Job, store: Store, images: ray.ObjectRef, place: Placement, control: Any) -> bool:
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
    if job.origin:
        _copy(job, replace(store, folder=job.origin), store)
        return True
    columns = {"stage": job.stage, "model": job.model, "task": job.name}
    gpus = place.gpus * max(1, place.workers)
    with recorded(store, job.experiment, columns, job.file, gpus, _device_name(place)) as row:
        if job.stage == "evaluate":
            _evaluate(job, store, images, place, control)
        else:
            row["note"] = "\n".join(prepare_training(job, store)) or None
            if checkpoints.latest_path(store, job.model):  # also where its row was removed
                row["attempts"] = max(2, row["attempts"])
            if not is_trained(job.experiment, store, job.stage, job.model):
                _fit(functools.partial(_train, job, store, images, place, control), job, store, place)
        row["devices"] = _get(control.devices.remote((job.folder, job.name)))
        if job.stage != "evaluate" and not is_trained(job.experiment, store, job.stage, job.model):
            row["state"] = "stopped"
    return bool(row["state"] == "done")


def _copy(job: Job, source: Store, store: Store) -> None:
    """Take what another experiment's job has come to; what says that the job is done comes last."""
    tables.copy(source, store, job.experiment, "jobs", job.file, state="shared")
    for table in job.tables:
        tables.copy(source, store, job.experiment, table, job.model if table == "metrics" else job.file)
    if job.stage != "evaluate":
        checkpoints.refer(source, store, job.model)


def _fit(loop: Callable[[], None], job: Job, store: Store, place: Placement) -> None:
    resources = {"CPU": float(place.cpus)} | ({"GPU": float(place.gpus)} if place.gpus else {})
    cuda = place.gpus > 0 and torch.cuda.is_available()
    TorchTrainer(
        loop,
        scaling_config=ScalingConfig(num_workers=place.workers, use_gpu=place.gpus > 0, resources_per_worker=resources),
        torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
        # For workers that die; an error of the loop's own is met again after the last checkpoint, then ends the run.
        # No time stamp in the name: the same run again is the same run.
        run_config=RunConfig(
            name=job.file,
            # Arrow's own S3 would look for credentials and endpoint in other places than the store does.
            storage_filesystem=None if store.is_local else PyFileSystem(FSSpecHandler(store.files)),
            storage_path=store.path("train") if store.is_local else store.path("train").partition("://")[2],
            failure_config=FailureConfig(max_failures=2),
        ),
    ).fit()


def _train(job: Job, store: Store, images: ray.ObjectRef, place: Placement, control: Any) -> None:
    """One worker's part of a Train run."""
    make_deterministic(place.cpus)
    _claim(control, job, ray.train.get_context().get_world_rank(), place)
    experiment, arrays = job.experiment, _get(images)
    training = experiment.training(job.stage)
    stopped = _stopped(control)
    report, stopping = functools.partial(_report, job), lambda: job.folder in stopped.folders
    task = Task(experiment, store, job.stage, job.model, training, report, stopping)
    try:
        if job.stage == "joint":
            joint.train_joint(task, arrays, _device())
        else:
            regime = next(r for r in experiment.regimes if r.name == job.model)
            expert.train_expert(task, arrays, regime, _device())
    except Stopped:
        return  # to Train, which would take an exception for a failure and try again


def _report(job: Job, row: dict[str, Any]) -> None:
    """Tell Train of an epoch, and whoever asks Ray for its metrics (Prometheus)."""
    for name, gauge in _gauges().items():
        gauge.set(row[name], {"experiment": job.folder, "model": job.model})
    ray.train.report(row)


@functools.cache
def _gauges() -> dict[str, Gauge]:
    names = ("epoch", "loss", "clean_accuracy", "probe_pgd_accuracy", "images_per_second")
    about = "of the last epoch of a model's training, as in the table metrics"
    return {name: Gauge(f"dwf_{name}", f"{name} {about}", ("experiment", "model")) for name in names}


def _evaluate(job: Job, store: Store, images: ray.ObjectRef, place: Placement, control: Any) -> None:
    make_deterministic(place.cpus)
    _claim(control, job, 0, place)
    experiment, arrays, device = job.experiment, _get(images), _device()
    assert job.family is not None
    chosen = slice(job.first, job.stop)
    x, y = arrays.x_test[chosen], arrays.y_test[chosen]
    names = [job.model]
    if job.family == "paper" and "transfer" in experiment.evaluation.beyond:
        names = [*(regime.name for regime in experiment.regimes), MIXTURE]
    models = {name: _trained(experiment, store, arrays, name).to(device) for name in names}
    if job.family == CHECKS:
        checks = check(experiment, models[job.model], job.model, x, y, device)
        tables.write(store, CHECKS, job.file, tables.rows_of(experiment, checks))
        return
    rows, predictions = evaluate(experiment, models, job.model, job.family, x, y, job.first, device)
    tables.write(store, "predictions", job.file, tables.rows_of(experiment, predictions))
    tables.write(store, "shards", job.file, tables.rows_of(experiment, rows))


def _trained(experiment: Experiment, store: Store, images: Images, name: str) -> nn.Module:
    model = joint.build(experiment, images) if name == MIXTURE else expert.build(experiment, images, name)
    epochs = experiment.training("joint" if name == MIXTURE else "experts").epochs
    model.load_state_dict(weights(checkpoints.load_trained(store, name, epochs)))
    return model


def _get(reference: Any) -> Any:
    """`ray.get` on another thread: while the main one waits, Ray gives the CPUs of its task to another task."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ray.get, reference).result()


def _claim(control: Any, job: Job, worker: int, place: Placement) -> None:
    """Say which device this process got.

    Raises:
        DeviceShared: if it is not free.
    """
    if not place.gpus:
        device = "cpu"
    elif torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name(0)} GPU-{torch.cuda.get_device_properties(0).uuid}"
    else:  # Ray was told of GPUs that this machine does not have
        device = "GPU " + ",".join(ray.get_runtime_context().get_accelerator_ids()["GPU"])
    claim = Claim((job.folder, job.name), worker, platform.node(), device, place.gpus)
    complaint = _get(control.claim.remote(claim))
    if complaint:
        raise DeviceShared(complaint)


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


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _device_name(place: Placement) -> str:
    return str(torch.cuda.get_device_name(0)) if place.gpus and torch.cuda.is_available() else "cpu"
