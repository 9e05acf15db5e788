"""A running Ray: one of our own on this machine, or one that is there already; and jobs on it."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from dwf_cluster.cluster.control import Claim, Control
from dwf_cluster.cluster.placement import Limits, Resources
from dwf_cluster.cluster.schedule import Placement, Schedule
from dwf_cluster.experiment import InvalidInput
from dwf_cluster.plan import Job
from dwf_cluster.store import Store

STOP_SECONDS = 60.0
"""How long a run that is to stop waits for trainings to save what they have."""


@dataclass(frozen=True)
class Started:
    """A job that was given to Ray."""

    job: Job


@dataclass(frozen=True)
class Ended:
    """A job that came to its end.

    Attributes:
        job: which.
        state: `done`, `stopped` (at the run's request; it goes on from there) or `failed`.
        reason: one line that says why it failed.
    """

    job: Job
    state: str
    reason: str = ""


class Cluster:
    """Runs jobs on the Ray that this process is connected to.

    Attributes:
        resources: what it has.
        dashboard, token_file: where people look on, and what they need for it.
        control: the `Control` actor of the run.
    """

    def __init__(self, resources: Resources, dashboard: str = "", token_file: str = "", control: Any = None) -> None:
        import ray

        self._ray = ray
        # One remote function for all jobs: Ray reuses its processes. Outside of what a trial has asked for, which is
        # nothing to compute with.
        anywhere = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(placement_group=None)
        self._task = ray.remote(max_retries=2, scheduling_strategy=anywhere)(_run_job)
        # On this node: should another be lost, the run still has it.
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        # Its calls, several a second, would bury the jobs in the dashboard.
        quiet = {"enable_task_events": False, "num_cpus": 0, "scheduling_strategy": here}
        self.control = control or ray.remote(Control).options(**quiet).remote()
        self.resources = resources
        self.dashboard = dashboard
        self.token_file = token_file

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process of this Ray it is made anew, of the same run."""
        return Cluster, (self.resources, self.dashboard, self.token_file, self.control)

    def stop(self, folders: Iterable[str]) -> None:
        """Ask all processes to stop what they do for these experiments; trainings save what they have."""
        self._ray.get(self.control.stop.remote(set(folders)))

    def is_stopped(self, folder: str) -> bool:
        """Whether that was asked for an experiment."""
        return folder in self._ray.get(self.control.stopped.remote())

    def share(self, value: Any) -> Any:
        """Put a value where every task of this Ray can read it; returns the reference."""
        return self._ray.put(value)

    def run(
        self,
        jobs: Sequence[Job],
        places: Mapping[Job, Placement],
        storage: str,
        images: Any,
        title: Callable[[Job], str],
        stopping: Callable[[], bool],
    ) -> Iterator[Started | Claim | Ended | None]:
        """Run jobs as `schedule` has them.

        Args:
            jobs: to run.
            places: what each of them gets.
            storage: URL below which each job's experiment has its folder.
            images: reference to a `data.sources.Images`.
            title: a job's name in the dashboard.
            stopping: says whether the run is to stop: then no job is started, trainings save what they have, at
                the same step on all their workers, and evaluations are given up.

        Yields:
            What was started, who computes where, what ended, and None about once a second. If the caller stops
            early, what still runs is cancelled.
        """
        schedule = Schedule(jobs, places, self.resources.room)
        running: dict[Any, Job] = {}
        deadline, looked = float("inf"), time.monotonic()
        try:
            while time.monotonic() < deadline:
                if stopping() and deadline == float("inf"):
                    deadline = time.monotonic() + STOP_SECONDS
                    self._stop(running)
                while not stopping() and (job := schedule.start()):
                    running[self._submit(job, title(job), places[job], storage, images)] = job
                    yield Started(job)
                if not running:
                    return
                ended, _ = self._ray.wait(list(running), timeout=0.2)
                yield from self._ray.get(self.control.news.remote())
                for reference in ended:
                    job = running.pop(reference)
                    outcome = self._outcome(reference, job, stopping())
                    self._ray.get(self.control.release.remote((job.folder, job.name)))
                    schedule.end(job, outcome.state == "done")
                    yield outcome
                if time.monotonic() > looked + 1:
                    looked = time.monotonic()
                    yield None
        finally:
            for reference in running:
                self._ray.cancel(reference, force=True)

    def _submit(self, job: Job, title: str, place: Placement, storage: str, images: Any) -> Any:
        # With workers of its own, Train asks for what they need; the task that waits for them holds nothing.
        holds = {"num_cpus": 0} if place.workers else {"num_cpus": place.cpus, "num_gpus": place.gpus}
        task = self._task.options(name=title, **holds)
        return task.remote(job, Store(storage, job.folder), [images], place, self.control)

    def _outcome(self, reference: Any, job: Job, stopping: bool) -> Ended:
        try:
            return Ended(job, "done" if self._ray.get(reference) else "stopped")
        except Exception as error:  # of any class: Ray raises what the job raised
            return Ended(job, "stopped") if stopping else Ended(job, "failed", _reason(error))

    def _stop(self, running: Mapping[Any, Job]) -> None:
        self.stop(job.folder for job in running.values())
        for reference, job in running.items():
            if job.stage == "evaluate":
                self._ray.cancel(reference, force=True)


def _run_job(job: Job, store: Store, images: list[Any], place: Placement, control: Any) -> bool:
    # Imports torch only in the worker. The reference comes in a list, so that Ray does not resolve it here.
    from dwf_cluster.cluster.tasks import run_job

    return run_job(job, store, images[0], place, control)


def _reason(error: Exception) -> str:
    """One line that says why a job failed, from what Ray made of its exception."""
    cause: Any = error
    while inner := getattr(cause, "cause", None) or next(iter(getattr(cause, "worker_failures", {}).values()), None):
        cause = inner
    text = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {text[0] if text else 'no message'}"


def make_private(folder: str, token: str) -> None:
    """Make a folder that only this user can read, with a file `token` that only this user can read.

    One of that name is removed first.

    Raises:
        OSError: if it belongs to somebody else.
    """
    shutil.rmtree(folder, ignore_errors=True)
    os.mkdir(folder, 0o700)
    with open(os.open(f"{folder}/token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)


def set_environment(folder: str) -> None:
    """The environment of every Ray process that this one starts: token authentication, nobody is called home."""
    os.environ.pop("RAY_AUTH_TOKEN", None)
    # Threads that wait by spinning make the joint stage ten times slower where other programs want the CPUs too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=f"{folder}/token",
        RAY_TRAIN_V2_ENABLED="1",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",  # what is worth keeping is in the store
    )


@contextmanager
def local(resources: Resources) -> Iterator[Cluster]:
    """Start Ray on this machine, for this process alone, and stop it again.

    Its files, and the token that its services ask for, lie in a temporary folder that only the user can read.
    """
    folder = tempfile.mkdtemp(prefix="dwf-", dir="/tmp")  # socket paths over 107 bytes fail
    make_private(folder, secrets.token_hex(32))
    set_environment(folder)
    # Off, as on laptops by default: no Ray across machines, so all that Ray starts listens on 127.0.0.1.
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    try:
        context = ray.init(
            address="local",
            num_cpus=resources.cpus,
            num_gpus=resources.gpus,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            _temp_dir=f"{folder}/ray",  # Ray opens its own folder to everyone, ours stays closed
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
        yield Cluster(resources, f"http://{context.dashboard_url}", f"{folder}/token")
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def attached(address: str, limits: Limits) -> Iterator[Cluster]:
    """Connect to a Ray that is running, and leave it running.

    What is used of it: all its nodes, each with as many CPUs and GPUs as the smallest has.

    Args:
        address: `auto`, `HOST:PORT` or `ray://HOST:PORT`.
        limits: of what jobs get.

    Raises:
        InvalidInput: if there is no Ray at that address, or it has no room for the workers.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    import ray

    try:
        if ":" in address:  # Ray itself would try for minutes
            host, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        context = ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, ignore_reinit_error=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInput(f"--address: {address!r} cannot be reached: {reason}") from None
    try:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        cpus, gpus = (int(min(node.get(kind, 0) for node in alive)) for kind in ("CPU", "GPU"))
        resources = Resources(cpus, gpus, len(alive), limits)
        dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else ""
        yield Cluster(resources, dashboard, os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token"))
    finally:
        ray.shutdown()
