"""A Ray of our own on this machine: private, token-authenticated, loopback only, gone when we are."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from typing import Any

from dwf_cluster.experiment import Experiment, InvalidInput
from dwf_cluster.plan import Job
from dwf_cluster.store import Store


@dataclass(frozen=True)
class Resources:
    """Where it runs. No part of the experiment.

    Attributes:
        cpus, gpus: that Ray may use.
        joint_workers: processes of the joint stage's DDP run.
    """

    cpus: int
    gpus: int
    joint_workers: int

    @staticmethod
    def here(cpus: int | None, gpus: int | None, joint_workers: int | None) -> Resources:
        """This machine; None takes all CPUs and GPUs this process may use, and one joint worker a GPU (or one).

        Raises:
            InvalidInput: if there is no room for the joint workers.
        """
        if cpus is None:
            # Where the system can say which CPUs this process may use (not on macOS).
            affinity = getattr(os, "sched_getaffinity", None)
            cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
        if gpus is None:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            devices = glob("/dev/nvidia[0-9]*") if visible is None else [d for d in visible.split(",") if d.strip()]
            gpus = len(devices)
        room = gpus or cpus
        if joint_workers is not None and joint_workers > room:
            raise InvalidInput(f"--joint-workers: {joint_workers} cannot be used: allowed are 1 to {room}")
        return Resources(cpus, gpus, joint_workers or max(1, gpus))


@dataclass(frozen=True)
class Placement:
    """What a job gets.

    Attributes:
        workers: processes that Ray Train starts; 0: the task's own process does the work.
        cpus, gpus: of each process; on a CPU also its number of threads.
    """

    workers: int
    cpus: int
    gpus: int

    def __str__(self) -> str:
        what = f"{self.cpus} CPU" + (f", {self.gpus} GPU" if self.gpus else "")
        return f"{self.workers} x ({what})" if self.workers > 1 else what


def placement(job: Job, resources: Resources) -> Placement:
    """What a job gets on these resources."""
    gpus = min(1, resources.gpus)
    if job.stage == "joint":
        workers = resources.joint_workers
        in_process = workers == 1 and not gpus
        return Placement(0 if in_process else workers, max(1, resources.cpus // workers), gpus)
    return Placement(gpus if job.stage == "experts" else 0, 1, gpus)


class Cluster:
    """A running Ray: shares the images, runs jobs."""

    def __init__(self, resources: Resources, dashboard: str, token_file: str) -> None:
        import ray

        self._ray = ray
        # One remote function for all jobs: only then Ray starts them in the order of submission.
        self._task = ray.remote(max_retries=2)(_run_job)
        self.resources = resources
        self.dashboard = dashboard
        self.token_file = token_file

    def share(self, value: Any) -> Any:
        """Put a value where every task of this Ray can read it; returns the reference."""
        return self._ray.put(value)

    def run(
        self, jobs: Sequence[Job], experiment: Experiment, store: Store, images: Any
    ) -> Iterator[tuple[Job, str | None] | None]:
        """Run jobs in parallel, started in the given order.

        Yields:
            (job, None) when one is done, (job, one line that says why) when one failed, None about once a
            second otherwise. If the caller stops early, what still runs is cancelled.
        """
        waiting = {self._submit(job, experiment, store, images): job for job in jobs}
        try:
            while waiting:
                ended, _ = self._ray.wait(list(waiting), timeout=1.0)
                for reference in ended:
                    job = waiting.pop(reference)
                    try:
                        self._ray.get(reference)
                        yield job, None
                    except Exception as error:  # of any class: Ray raises what the job raised
                        yield job, _reason(error)
                yield None
        finally:
            for reference in waiting:
                self._ray.cancel(reference, force=True)

    def _submit(self, job: Job, experiment: Experiment, store: Store, images: Any) -> Any:
        place = placement(job, self.resources)
        # With workers of its own, Train asks for what they need; the task that waits for them holds nothing.
        holds = {"num_cpus": 0} if place.workers else {"num_cpus": place.cpus, "num_gpus": place.gpus}
        task = self._task.options(name=job.name, **holds)
        return task.remote(job, experiment, store, [images], place)


def _run_job(job: Job, experiment: Experiment, store: Store, images: list[Any], place: Placement) -> None:
    # Imports torch only in the worker. The reference comes in a list, so that Ray does not resolve it here.
    from dwf_cluster.cluster.tasks import run_job

    run_job(job, experiment, store, images[0], place)


def _reason(error: Exception) -> str:
    """One line that says why a job failed, from what Ray made of its exception."""
    cause: Any = error
    while inner := getattr(cause, "cause", None) or next(iter(getattr(cause, "worker_failures", {}).values()), None):
        cause = inner
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else 'no message'}"


@contextmanager
def local(resources: Resources) -> Iterator[Cluster]:
    """Start Ray on this machine, for this process alone, and stop it again.

    Its files, and the token that its services ask for, lie in a temporary folder that only the user can read.
    """
    folder = tempfile.mkdtemp(prefix="dwf-", dir="/tmp")  # socket paths over 107 bytes fail
    token_file = os.path.join(folder, "token")
    with open(os.open(token_file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=token_file,
        RAY_TRAIN_V2_ENABLED="1",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    )
    import ray

    try:
        context = ray.init(
            address="local",
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            _temp_dir=os.path.join(folder, "ray"),  # Ray opens its own folder to everyone, ours stays closed
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        yield Cluster(resources, f"http://{context.dashboard_url}", token_file)
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
