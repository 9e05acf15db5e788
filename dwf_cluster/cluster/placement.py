"""Where it runs, and what each job gets of it. Needs neither torch nor ray."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from glob import glob

from dwf_cluster.cluster.schedule import Placement, lower_bound, timeline
from dwf_cluster.experiment import InvalidInput
from dwf_cluster.plan import Job

LEAST_IMAGES = 32
"""Of a batch, for each worker of an expert's DDP run: BatchNorm sees no others."""

CLOSE = 1.05
"""A makespan that is this close to its lower bound is good enough."""


@dataclass(frozen=True)
class Limits:
    """What a user wants jobs to get, where it is not what they could.

    Attributes:
        joint_workers: processes of the joint stage's DDP run; None: one a GPU or, without GPUs, one a node.
        expert_workers: the most processes of one expert's DDP run, with GPUs; None: as many as leave each
            `LEAST_IMAGES` images of a batch.
        gpus_per_expert: share of a GPU that an expert gets, of 1 at most; below 1 it has one worker.
    """

    joint_workers: int | None = None
    expert_workers: int | None = None
    gpus_per_expert: float = 1.0


@dataclass(frozen=True)
class Resources:
    """Where it runs. No part of the experiment.

    Attributes:
        cpus, gpus: of each node, that Ray may use.
        nodes: number of machines.
        limits: to what jobs get.
    """

    cpus: int
    gpus: int
    nodes: int = 1
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        workers = {"--joint-workers": self.limits.joint_workers, "--expert-workers": self.limits.expert_workers}
        for option, value in workers.items():
            if value is not None and value > self.room:
                raise InvalidInput(f"{option}: {value} cannot be used: allowed are 1 to {self.room}")
        if self.limits.gpus_per_expert < 1 and not self.gpus:
            raise InvalidInput(f"--gpus-per-expert: {self.limits.gpus_per_expert:g} cannot be used: there are no GPUs")

    @property
    def room(self) -> int:
        """Processes with a GPU of their own or, without GPUs, with a CPU of their own."""
        return self.nodes * (self.gpus or self.cpus)


def cpus_here() -> int:
    """CPUs that this process may use."""
    # Where the system can say which (not on macOS).
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def gpus_here() -> int:
    """GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(glob("/dev/nvidia[0-9]*") if visible is None else [d for d in visible.split(",") if d.strip()])


def place(jobs: Sequence[Job], resources: Resources) -> dict[Job, Placement]:
    """What each job gets on these resources.

    Args:
        jobs: all of the experiments, done or not: a resumed run must give an expert as many workers as before,
            or BatchNorm would see other parts of each batch.
        resources: where they run.
    """
    workers = _expert_workers([job for job in jobs if job.stage == "experts"], resources)
    return {job: _placement(job, resources, workers.get(job, 1)) for job in jobs}


def _placement(job: Job, resources: Resources, workers: int) -> Placement:
    gpus = min(1, resources.gpus)
    if job.stage == "joint":
        batch = job.experiment.joint.batch_size
        workers = resources.limits.joint_workers or min(batch, resources.room if gpus else resources.nodes)
        in_process = workers == 1 and not gpus
        return Placement(0 if in_process else workers, max(1, resources.nodes * resources.cpus // workers), gpus)
    if job.stage == "experts" and gpus:
        return Placement(workers, 1, resources.limits.gpus_per_expert)
    return Placement(0, 1, gpus)


def most(jobs: Sequence[Job], resources: Resources) -> dict[Job, Placement]:
    """The most that each job can get on these resources."""
    return {job: _placement(job, resources, _most_workers(job, resources)) for job in jobs}


def _most_workers(job: Job, resources: Resources) -> int:
    if not resources.gpus or resources.limits.gpus_per_expert < 1:
        return 1
    limit = resources.limits.expert_workers or job.experiment.experts.batch_size // LEAST_IMAGES
    return max(1, min(limit, resources.room))


def _expert_workers(experts: Sequence[Job], resources: Resources) -> Mapping[Job, int]:
    """Processes of each expert's run: one, or more where GPUs would wait for the longest expert.

    Tries several numbers to begin with, improves each expert by expert from the one that ends last, and stops
    when the makespan is `CLOSE` to its lower bound.
    """
    best = float("inf"), dict.fromkeys(experts, 1)
    if not experts or all(_most_workers(job, resources) == 1 for job in experts):
        return best[1]
    bound = lower_bound(experts, most(experts, resources), resources.room)
    for slack in (float("inf"), 1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0):
        begin = {}
        for job in experts:
            limit = _most_workers(job, resources)
            begin[job] = next((n for n in range(1, limit) if job.cost / n <= slack * bound), limit)
        found = _improved(begin, resources, bound)
        best = min(best, found, key=lambda found: found[0])
        if best[0] <= CLOSE * bound:
            break
    return best[1]


def _improved(workers: dict[Job, int], resources: Resources, bound: float) -> tuple[float, dict[Job, int]]:
    """Give the expert that ends last more workers, as long as fewer then end that late; returns the makespan too."""

    def ends(workers: Mapping[Job, int]) -> dict[Job, float]:
        places = {job: _placement(job, resources, n) for job, n in workers.items()}
        return {job: planned.end for job, planned in timeline(workers, places, resources.room).items()}

    def lateness(ended: Mapping[Job, float]) -> tuple[float, int]:
        makespan = max(ended.values())
        return round(makespan, 6), sum(end > makespan * (1 - 1e-9) for end in ended.values())

    ended = ends(workers)
    while lateness(ended)[0] > CLOSE * bound:
        late = [job for job, end in ended.items() if end > max(ended.values()) * (1 - 1e-9)]
        more = ((job, n) for job in late for n in range(workers[job] + 1, _most_workers(job, resources) + 1))
        for job, n in more:
            tried = ends(workers | {job: n})
            if lateness(tried) < lateness(ended):
                workers, ended = workers | {job: n}, tried
                break
        else:
            break
    return lateness(ended)[0], workers
