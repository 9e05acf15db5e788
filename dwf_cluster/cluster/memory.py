"""The memory that a job reserves on its node, so that Ray starts no more jobs than fit. Needs neither torch nor ray."""

from __future__ import annotations

from dwf_cluster.cluster.failures import OUT_OF_MEMORY, Kind
from dwf_cluster.plan.jobs import Job
from dwf_cluster.plan.schedule import Allocation
from dwf_cluster.store import Store, tables

_PROCESS = 500 << 20
"""Bytes of a process that has imported torch and small images: a first estimate."""

_ACTIVATIONS = 110 << 10
"""Bytes of one 32x32 image's activations in a ResNet-18, for each channel of its first layer: a first estimate."""

_RELATIVE_ACTIVATIONS = {
    "resnet34": 1.7,
    "resnet50": 5.4,
    "vgg19": 0.6,
    "densenet121": 8.5,
    "densenet169": 10.4,
    "densenet121-k12": 3.2,
    "googlenet": 8.8,
    "inception-v3": 6.6,
    "xception": 4.9,
    "mobilenet-v2": 4.1,
}
"""What a training step keeps of an image, divided by what it keeps in a ResNet-18 of the same width: measured at width
64 and 32x32 pixels. A network that is not listed is taken for a ResNet-18; it is measured when its first job has ended.
"""

_MARGIN = 1.1
"""Factor on measured memory: other images and iterations need a little more."""

_Group = tuple[object, ...]


class Memory:
    """The memory that the jobs of a run need: estimated, until a similar job has ended and was measured."""

    def __init__(self, limit: int) -> None:
        """
        Args:
            limit: bytes that can be reserved on every node; 0: unknown, so that nothing is reserved.
        """
        self._limit = limit
        self._measured: dict[_Group, int] = {}
        self._run_alone: set[Job] = set()

    def need(self, job: Job, allocation: Allocation) -> int:
        """Bytes to reserve for the process of a job, at most those of every node; 0: none.

        Nothing is reserved for workers that Ray Train starts.
        """
        if job in self._run_alone:
            return self._limit
        if allocation.workers or job.copy_of:
            return 0
        return min(self._limit, self._measured.get(_group(job)) or estimate(job))

    def failed(self, job: Job, kind: Kind) -> None:
        """Let a job that was killed because memory ran out run alone on its node when it is retried."""
        if kind is OUT_OF_MEMORY:
            self._run_alone.add(job)

    def learn(self, job: Job, done: bool, store: Store) -> None:
        """Record the memory of a job that has ended, if it is done and the first of its group."""
        if not done or job.copy_of or _group(job) in self._measured:
            return
        for row in tables.read(store, "jobs", [job.file]).to_pylist():
            self._measured[_group(job)] = int(_MARGIN * (row["peak_memory_bytes"] or 0))


def estimate(job: Job) -> int:
    """Bytes that a job's process may need, before a job of its group was measured."""
    settings = job.experiment
    if job.is_training:
        images = -(-job.training.batch_size // job.training.accumulation)
    else:
        images = settings.evaluation.batch_size
    spec = job.spec
    networks = sum(_RELATIVE_ACTIVATIONS.get(backbone, 1.0) for backbone in spec.backbones)
    return int(_PROCESS + images * networks * spec.width * _ACTIVATIONS)


def _group(job: Job) -> _Group:
    """Key of the jobs that need about the same memory."""
    spec = job.spec
    return job.folder, job.stage, spec.backbones, spec.width, job.suite
