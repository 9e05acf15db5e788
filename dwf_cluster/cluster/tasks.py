"""The body of a Ray task: the training of a model as a Ray Train run, or one suite of attacks on one model.

A training without workers runs in the process of its task (Ray Train's local mode). With workers, Ray Train starts
them, and they have the GPUs; the task that waits for them has no resources. Such a task must not call CUDA: CUDA reads
CUDA_VISIBLE_DEVICES at the first call only, and Ray may give the process a GPU later.
"""

from __future__ import annotations

import functools
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
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
from dwf_cluster.data.sources import Images
from dwf_cluster.data.subsets import checked
from dwf_cluster.defences.build import to_train, trained
from dwf_cluster.defences.registry import WEIGHTS
from dwf_cluster.determinism import make_deterministic
from dwf_cluster.evaluation.adversarial import Collector
from dwf_cluster.evaluation.registry import CHECKS
from dwf_cluster.evaluation.run import check, evaluate
from dwf_cluster.plan.jobs import Job, is_trained, prepare_training
from dwf_cluster.plan.schedule import Allocation
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.store.job_log import recorded
from dwf_cluster.training.given import take_over
from dwf_cluster.training.loop import Stopped, Task, train
from dwf_cluster.training.probe import Probe

CLAIM_SECONDS = 60.0
"""How long a process waits for its device, if a job that no longer computes on it has not ended yet."""


class DeviceShared(RuntimeError):
    """A worker was given a device that another job computes on. The message names device, node and both jobs."""


def run_job(job: Job, store: Store, images: ray.ObjectRef, allocation: Allocation, control: Any) -> bool:
    """Run one job and record it.

    Args:
        job: of the plan.
        store: for the results.
        images: reference to a `data.sources.Images`.
        allocation: of the job.
        control: the run's `Control` actor.

    Returns:
        Whether the job is done; if not, the run was asked to stop, and the training has saved what it has.
    """
    if job.copy_of:
        _copy(job, replace(store, folder=job.copy_of, run=None), store)
        return True
    columns = {"stage": job.stage, "model": job.model, "task": job.name}
    gpus = allocation.gpus * max(1, allocation.workers)
    log = failures.logged(store, job.file)
    with log, recorded(store, columns, job.file, gpus, None if allocation.gpus else "cpu") as row:
        try:
            if not job.is_training:
                _evaluate(job, store, images, allocation, control)
            else:
                row["note"] = "\n".join(prepare_training(job, store)) or None
                if checkpoints.latest_path(store, job.model):  # even if its row was removed
                    row["attempts"] = max(2, row["attempts"])
                if not is_trained(job.spec, store):
                    _fit(functools.partial(_train, job, store, images, allocation, control), job, store, allocation)
        finally:  # Only the processes that compute can name their devices; the control actor has their claims.
            claims = _get(control.claims.remote((job.folder, job.name)))
            row["device"] = ", ".join(sorted({claim.hardware for claim in claims})) or row["device"]
            row["devices"] = [str(claim) for claim in claims]
            if versions := {claim.cudnn for claim in claims if claim.cudnn}:
                row["cudnn_version"], row["tf32"] = ", ".join(sorted(versions)), _uses_tf32(job)
        if job.is_training and not is_trained(job.spec, store):
            row["state"] = "stopped"
    return bool(row["state"] == "done")


def _copy(job: Job, source: Store, store: Store) -> None:
    """Copy the results of another experiment's job. The file that marks the job as done is written last."""
    tables.copy(source, store, "jobs", job.file, state="shared")
    if job.keeps_images and (images := source.read(job.images_file)) is not None:
        store.write(job.images_file, images)
    for table in job.tables:
        tables.copy(source, store, table, job.model if table == "metrics" else job.file)
    if job.is_training:
        checkpoints.refer(source, store, job.model)


def _fit(loop: Callable[[], None], job: Job, store: Store, allocation: Allocation) -> None:
    resources = {"CPU": float(allocation.cpus)} | ({"GPU": float(allocation.gpus)} if allocation.gpus else {})
    # With the number of the run: a run that has lost its lock writes into no other run's folder.
    folder = store.path(f"train/run-{store.run or 0:05d}")
    TorchTrainer(
        loop,
        scaling_config=ScalingConfig(
            num_workers=allocation.workers,
            use_gpu=allocation.gpus > 0,
            resources_per_worker=resources,
            label_selector=allocation.label_selector,
        ),
        # Undefined: torch chooses in the worker, nccl with a GPU and gloo without.
        torch_config=TorchConfig(backend=dist.Backend.UNDEFINED if allocation.gpus else "gloo"),
        # The driver retries failures (`failures`). The name has no time stamp, so that a retry is the same Train run.
        run_config=RunConfig(
            name=job.file,
            # Arrow's own S3 client would read credentials and endpoint from other places than the store does.
            storage_filesystem=None if store.is_local else PyFileSystem(FSSpecHandler(store.files)),
            storage_path=folder if store.is_local else folder.partition("://")[2],
            failure_config=FailureConfig(max_failures=failures.BY_RAY),
        ),
    ).fit()


def _uses_tf32(job: Job) -> bool:
    """Whether a GPU's convolutions may use TF32: where weights are trained, and not where a model is measured."""
    return job.is_training and job.spec.method != WEIGHTS


def _train(job: Job, store: Store, images: ray.ObjectRef, allocation: Allocation, control: Any) -> None:
    """Train a model in one worker of a Train run."""
    make_deterministic(allocation.cpus, tf32=_uses_tf32(job))
    device = _claim(control, job, ray.train.get_context().get_world_rank(), allocation)
    experiment, arrays = job.experiment, _get(images)
    evaluation = experiment.evaluation
    listener, is_paused = _stop_listener(control), False

    def on_epoch(row: dict[str, Any]) -> None:
        nonlocal is_paused
        is_paused = job.until is not None and row["epoch"] >= job.until
        ray.train.report(row)

    task = Task(
        job.spec,
        job.stage,
        experiment.seed,
        Probe(experiment.threat, evaluation.probe_steps, evaluation.probe_examples, evaluation.random_start),
        experiment.checkpoint_minutes,
        store,
        on_epoch,
        lambda: is_paused or job.folder in listener.folders,
    )
    try:
        model = to_train(experiment.models, job.model, arrays.format, experiment.seed, store).to(device)
        if job.spec.method == WEIGHTS:
            whole_test = arrays.whole_test or (arrays.x_test, arrays.y_test)
            take_over(task, model, DeviceImages(arrays, experiment.data, device), *whole_test)
        else:
            train(task, model, DeviceImages(arrays, experiment.data, device))
    except Stopped:
        return  # Ray Train would take an exception for a failure
    except Exception:
        if allocation.workers:  # the job's own process gets only a part of this traceback
            failures.keep_log(store, failures.log_name(job.file, ray.train.get_context().get_world_rank()))
        raise


def _evaluate(job: Job, store: Store, images: ray.ObjectRef, allocation: Allocation, control: Any) -> None:
    make_deterministic(allocation.cpus, tf32=_uses_tf32(job))
    device = _claim(control, job, 0, allocation)
    experiment, arrays = job.experiment, _get(images)
    specs, loaded = experiment.models, dict[str, torch.nn.Module]()
    models = {
        name: trained(specs, name, arrays.format, experiment.seed, store, loaded).to(device)
        for name in job.evaluated_with
    }
    dtype = experiment.save_adversarial
    collector = Collector(job.model, dtype) if dtype and job.suite != CHECKS else None
    results = evaluation_rows(job, arrays, models, device, collector)
    if collector:
        store.write(job.images_file, collector.images().to_npz())
    elif job.suite != CHECKS:
        store.remove(job.images_file)  # of an earlier run, whose rows are replaced too
    for table, rows in results.items():
        tables.write(store, table, job.file, rows)


def evaluation_rows(
    job: Job,
    arrays: Images,
    models: Mapping[str, torch.nn.Module],
    device: torch.device,
    collector: Collector | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the tables that an evaluation or the checks of a model write, by table, in the order of writing.

    Args:
        job: an evaluation.
        arrays: the experiment's images.
        models: on the device, by name: those of `job.evaluated_with`.
        device: that computes.
        collector: keeps the adversarial images; None: they are not kept.
    """
    experiment, suite = job.experiment, job.suite
    evaluation, seed = experiment.evaluation, experiment.seed
    assert suite is not None
    if suite == CHECKS:
        part = checked(experiment.data.source, arrays.y_test, job.stop)
        x, y = arrays.x_test[part], arrays.y_test[part]
        others = {name: model for name, model in models.items() if name != job.model}
        model, threat = models[job.model], experiment.threat
        return {CHECKS: check(model, job.model, x, y, evaluation, threat, seed=seed, device=device, others=others)}
    shard = slice(job.first, job.stop)
    corrupted = arrays.corrupted if experiment.corruption_files else {}
    rows, predictions = evaluate(
        models,
        job.model,
        suite,
        arrays.x_test[shard],
        arrays.y_test[shard],
        evaluation,
        experiment.threats,
        seed=seed,
        device=device,
        first=job.first,
        experts=job.spec.experts,
        corrupted={key: images[shard] for key, images in corrupted.items()},
        collector=collector,
    )
    return {"predictions": predictions, "shards": rows}


def _get(reference: Any) -> Any:
    """`ray.get` in another thread: while the main thread of a task waits, Ray gives the task's CPUs to another task."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(ray.get, reference).result()


def _claim(control: Any, job: Job, worker: int, allocation: Allocation) -> torch.device:
    """Claim the device of this process from the control actor; returns the device.

    Raises:
        DeviceShared: if another job still claims the device after `CLAIM_SECONDS`. Ray frees a GPU as soon as the
            process that used it has ended, which may be before that process's job has ended.
    """
    device, hardware, name, cudnn = torch.device("cpu"), "cpu", "cpu", None
    if allocation.gpus and torch.cuda.is_available():
        # Each worker of a Train run sees all GPUs that the run has on the node; Train has selected the worker's own.
        device = torch.device("cuda", torch.cuda.current_device())
        hardware = torch.cuda.get_device_name(device)
        name = f"{hardware} GPU-{torch.cuda.get_device_properties(device).uuid}"
        cudnn = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
    elif allocation.gpus:  # Ray was started with GPUs that this machine does not have
        name = "GPU " + ",".join(map(str, ray.get_runtime_context().get_accelerator_ids()["GPU"]))
    claim = Claim((job.folder, job.name), worker, platform.node(), name, allocation.gpus, hardware, os.getpid(), cudnn)
    deadline = time.monotonic() + CLAIM_SECONDS
    while refusal := _get(control.claim.remote(claim)):
        if time.monotonic() > deadline:
            raise DeviceShared(refusal)
        time.sleep(0.1)
    return device


class _StopListener:
    """Receives from the control actor, in a thread, which experiments were asked to stop.

    Attributes:
        folders: of these experiments.
    """

    def __init__(self, control: Any) -> None:
        self.folders: set[str] = set()
        threading.Thread(target=self._listen, args=(control,), daemon=True).start()

    def _listen(self, control: Any) -> None:
        try:
            while True:
                self.folders = ray.get(control.stopped.remote(len(self.folders)))
        except ray.exceptions.RayError:  # the run has ended
            return


_stop_listener = functools.cache(_StopListener)
"""One for each run that this process works for."""
