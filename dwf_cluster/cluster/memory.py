"""How much memory of its node a job reserves, so that Ray starts no more than fit. Needs neither torch nor ray."""

from __future__ import annotations

from dwf_cluster.cluster.failures import OUT_OF_MEMORY, Kind
from dwf_cluster.plan.jobs import Job
from dwf_cluster.plan.schedule import Allocation
from dwf_cluster.store import Store, tables

_PROCESS = 500 << 20
"""Bytes of a process that has imported torch and holds small images: a first estimate."""

_ACTIVATIONS = 110 << 10
"""Bytes of one 32x32 image's activations in a ResNet-18, for each channel of its first layer: a first estimate."""

_MARGIN = 1.1
"""What was measured, times this: other images and other iterations need a little more."""

_Kind = tuple[str, str, bool, str | None]


class Memory:
    """What each kind of job of a run needs: measured where one of the kind has ended, else estimated."""

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: bytes that can be reserved on every node; 0: unknown, and nothing is reserved.
        """
        self._limit = limit
        self._measured: dict[_Kind, int] = {}
        self._alone: set[Job] = set()

    def need(self, job: Job, place: Allocation) -> int:
        """Bytes to reserve for the process of a job, which every node can hold. 0: nothing.

        Workers that Ray Train starts are not reserved for.
        """
        if job in self._alone:
            return self._limit
        if place.workers or job.copy_of:
            return 0
        return min(self._limit, self._measured.get(_kind(job)) or estimate(job))

    def failed(self, job: Job, kind: Kind) -> None:
        """Have a job that was killed for want of memory run alone on its node when it is tried again."""
        if kind is OUT_OF_MEMORY:
            self._alone.add(job)

    def learn(self, job: Job, done: bool, store: Store) -> None:
        """Take note of what a job that has ended needed, if it is done and the first of its kind."""
        if not done or job.copy_of or _kind(job) in self._measured:
            return
        for row in tables.read(store, "jobs", [job.file]).to_pylist():
            self._measured[_kind(job)] = int(_MARGIN * (row["peak_memory_bytes"] or 0))


def estimate(job: Job) -> int:
    """Bytes that a job's process may need, before one of its kind was measured."""
    settings = job.experiment
    if job.is_training:
        images = -(-job.training.batch_size // job.training.accumulation)
    else:
        images = settings.evaluation.batch_size
    return _PROCESS + images * job.spec.networks * job.spec.width * _ACTIVATIONS


def _kind(job: Job) -> _Kind:
    """Jobs of one kind need about the same."""
    return job.folder, job.stage, bool(job.spec.parents), job.suite
