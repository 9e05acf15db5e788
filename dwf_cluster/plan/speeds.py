"""How long jobs take: measured on the user's own finished jobs or, before there are any, as `gpu.json` says.

`gpu.json` beside this module holds an entry for each device, stage and precision, with the card, the versions and the
date, and says of each whether it is a measurement or an estimate. `python -m benchmarks.gpu` measures them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dwf_cluster.plan.jobs import STAGES, Job
from dwf_cluster.plan.schedule import Allocation
from dwf_cluster.store import Store

FILE = Path(__file__).with_name("gpu.json")

FLOAT32 = "float32"
"""The precision that every device has entries for; on a GPU the convolutions of trainings then use TF32."""

_LAUNCHES, _LAUNCHES_PER_NETWORK = 17, 126
"""CUDA kernels of one iteration of an attack, and those that each network adds: counted on ResNet-18, without BatchNorm
as attacks see it. Other networks are counted as if they were ResNet-18: one of many small layers has more."""


@dataclass(frozen=True)
class Entry:
    """One line of `gpu.json`.

    Attributes:
        device: `gpu` or `cpu`.
        stage: one of `plan.jobs.STAGES`.
        precision: of the stage's trainings and their attacks: `float32` or `bfloat16`.
        teraflops: planned floating-point operations a second (`Job.flop`) of one GPU or CPU core, in units of 1e12,
            where the batch is large enough that its arithmetic takes longer than its launches.
        launch_microseconds: that one kernel takes at least: the host's time to launch it or, in a CUDA graph, the
            GPU's to begin and end it; 0 where there are no kernels.
        kind: whether it was measured.
        card: the GPU or CPU.
        date: of the measurement or estimate.
        versions: of torch, CUDA and so on; empty for an estimate.
        note: what else the number rests on.
    """

    device: Literal["gpu", "cpu"]
    stage: str
    precision: str
    teraflops: float
    launch_microseconds: float
    kind: Literal["measurement", "estimate"]
    card: str
    date: str
    versions: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def source(self) -> str:
        """What hours rest on that are planned with it."""
        versions = [f"{name} {version}" for name, version in self.versions.items()]
        parts = ", ".join(part for part in (self.card, *versions, self.note, self.date) if part)
        return f"measured on {parts}" if self.kind == "measurement" else f"estimate for {parts}, not measured"


@dataclass(frozen=True)
class Speed:
    """Of one GPU or CPU.

    Attributes:
        flops: planned floating-point operations a second.
        launch: seconds that one kernel takes at least.
        source: what these rest on.
    """

    flops: float
    launch: float
    source: str

    def seconds(self, job: Job, slots: float) -> float:
        """How long a job takes on so many GPUs or CPUs, which share each batch evenly, or divide the experts.

        Kernels are launched while others compute, so the slower of the two counts. Workers that share a batch launch
        as many kernels as one alone. Of workers that divide the experts, one with the most experts decides; what they
        exchange is not counted.
        """
        networks = job.spec.networks
        if job.is_training and job.spec.parallelism == "experts":
            most = math.ceil(networks / slots)
            return max(job.flop / self.flops * most / networks, self.launch * launches(job, most))
        return max(job.flop / (self.flops * slots), self.launch * launches(job, networks))


class Speeds:
    """The speed of each stage and precision.

    Args:
        jobs: all jobs of a run's experiments, finished ones too.
        allocations: of the jobs.
        storage: URL below which the experiments have their folders.
    """

    def __init__(self, jobs: Sequence[Job], allocations: Mapping[Job, Allocation], storage: str) -> None:
        self._device = "gpu" if any(allocation.gpus for allocation in allocations.values()) else "cpu"
        known = recorded(self._device)
        self._speeds = {kind: _known_or_float32(known, *kind) for kind in set(map(_kind, jobs))}
        self._speeds.update(self._measured(jobs, allocations, storage))

    def seconds(self, job: Job, allocation: Allocation) -> float:
        """Planned length of a job."""
        return self._speeds[_kind(job)].seconds(job, allocation.slots)

    def lines(self, jobs: Iterable[Job]) -> list[str]:
        """A line for each stage and precision of these jobs: its speed, and what that rests on."""
        lines = []
        for kind in sorted(dict.fromkeys(map(_kind, jobs)), key=lambda kind: STAGES.index(kind[0])):
            (stage, precision), speed = kind, self._speeds[kind]
            named = stage if precision == FLOAT32 else f"{stage} in {precision}"
            launch = f", {speed.launch * 1e6:.3g} microseconds a kernel at least" if speed.launch else ""
            device = self._device.upper()
            lines.append(f"speed of {named}: {speed.flops / 1e12:.3g} TFLOP/s a {device}{launch}, {speed.source}")
        return lines

    def _measured(
        self, jobs: Sequence[Job], allocations: Mapping[Job, Allocation], storage: str
    ) -> dict[tuple[str, str], Speed]:
        """The recorded speeds, multiplied by how much faster the finished jobs on this kind of device were."""
        from dwf_cluster.store import tables  # which imports pyarrow; other parts of a plan do not need it

        totals: dict[tuple[str, str], tuple[float, float]] = {}
        by_name = {(job.folder, job.name): job for job in jobs}
        for folder in dict.fromkeys(job.folder for job in jobs):
            for row in tables.read(Store(storage, folder), "jobs").to_pylist():
                job = by_name.get((folder, row["task"]))
                if job is None or job.copy_of or row["state"] != "done" or row["attempts"] != 1:
                    continue
                if bool(row["gpus"]) == (self._device == "gpu"):
                    planned, real = totals.get(_kind(job), (0.0, 0.0))
                    seconds = self._speeds[_kind(job)].seconds(job, row["gpus"] or allocations[job].slots)
                    totals[_kind(job)] = planned + seconds, real + row["seconds"]
        speeds = {kind: (self._speeds[kind], planned / real) for kind, (planned, real) in totals.items() if real}
        return {
            kind: Speed(speed.flops * factor, speed.launch / factor, "measured on finished jobs")
            for kind, (speed, factor) in speeds.items()
            if factor
        }


def launches(job: Job, networks: int) -> float:
    """CUDA kernels that a worker launches for a job, roughly, if a pass of training has as many as one of an attack.

    Args:
        job: that the worker takes part in.
        networks: of the model, that the worker computes.
    """
    if job.is_training:
        batch = job.training.batch_size / job.training.accumulation
    else:
        batch = job.experiment.evaluation.batch_size
    iterations = job.cost / (2 * job.spec.networks * batch)  # of a forward pass and an input gradient, which count as 2
    return iterations * kernel_count(networks)


def kernel_count(networks: int) -> int:
    """CUDA kernels of one iteration of PGD on a model of so many networks."""
    return _LAUNCHES + _LAUNCHES_PER_NETWORK * networks


def entries(file: Path) -> list[Entry]:
    """The entries of a file such as `gpu.json`."""
    return [Entry(**entry) for entry in json.loads(file.read_text())["speeds"]]


def recorded(device: str) -> dict[tuple[str, str], Speed]:
    """Speeds in `gpu.json`, by stage and precision: a measurement before an estimate, a newer entry before an older."""
    ordered = sorted(entries(FILE), key=lambda entry: (entry.kind == "measurement", entry.date))
    return {
        (entry.stage, entry.precision): Speed(entry.teraflops * 1e12, entry.launch_microseconds / 1e6, entry.source)
        for entry in ordered
        if entry.device == device
    }


def _known_or_float32(known: Mapping[tuple[str, str], Speed], stage: str, precision: str) -> Speed:
    if (stage, precision) in known:
        return known[stage, precision]
    speed = known[stage, FLOAT32]
    return replace(speed, source=f"{speed.source}, for {FLOAT32}: none is known for {precision}")


def _kind(job: Job) -> tuple[str, str]:
    """Stage and precision of a job; evaluations are in float32."""
    return job.stage, job.training.precision if job.is_training else FLOAT32
