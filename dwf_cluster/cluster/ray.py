"""A Ray of our own on this machine: private, token-authenticated, loopback only, gone when we are."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from dwf_cluster.cluster.placement import Placement, Resources, placement
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan import Job
from dwf_cluster.store import Store


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
    # Threads that wait by spinning make the joint stage ten times slower where other programs want the CPUs too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
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
