"""Which job starts next: one rule, which the real run and the planned timeline both follow.

Models without parents come first, over all experiments: given weights, then the longest before the others. Models with
parents follow, then evaluations. So with several seeds no GPU waits for one seed's slowest expert while another seed
has an expert to train. Evaluations of trained models fill the time until a model with parents can start.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from dwf_cluster.defences.registry import WEIGHTS
from dwf_cluster.plan.jobs import STAGES, Job

_ROUNDING = 1e-9
"""Tolerance of sums: three thirds of a GPU are one GPU."""

PROCESS_FLOP = 4.5e16
"""Planned work of the evaluations of a model that one process with a GPU does, one after the other.

Each such process pays for its start: imports, CUDA, images. At an estimated 10 to 15 s, and 9e13 FLOP/s of an H100,
this is 2 to 3 % of a process with this much work, and less than 5 % of all processes of `cifar10`.
"""


@dataclass(frozen=True)
class Allocation:
    """The resources of a job.

    Attributes:
        workers: processes that Ray Train starts; 0: the task's own process does the work.
        cpus, gpus: of each process; on a CPU also its number of threads.
        excluded_nodes: Ray's ids of nodes that the job must not run on.
    """

    workers: int
    cpus: int
    gpus: float
    excluded_nodes: tuple[str, ...] = ()

    @property
    def label_selector(self) -> dict[str, str] | None:
        """Ray's label selector for the nodes where it may run; None: anywhere."""
        return {"ray.io/node-id": f"!in({','.join(self.excluded_nodes)})"} if self.excluded_nodes else None

    @property
    def is_gpu_task(self) -> bool:
        """Whether a Ray task of its own, and not Ray Train's workers, has the GPU. Its process is not reused."""
        return self.gpus > 0 and not self.workers

    @property
    def slots(self) -> float:
        """Total number of GPUs or, without GPUs, of CPUs."""
        return max(1, self.workers) * (self.gpus or self.cpus)

    def __str__(self) -> str:
        process = f"{self.cpus} CPU" + (f", {self.gpus:g} GPU" if self.gpus else "")
        return f"{self.workers} x ({process})" if self.workers > 1 else process


def duration(job: Job, allocation: Allocation) -> float:
    """Planned length of a job, in FLOP of one GPU or CPU, if several share its work evenly."""
    return job.flop / allocation.slots


class Schedule:
    """Waiting jobs, in the order in which they start when enough slots are free."""

    def __init__(self, jobs: Iterable[Job], allocations: Mapping[Job, Allocation], slots: float) -> None:
        """
        Args:
            jobs: to run. Inputs that are no job's output exist already.
            allocations: of the jobs.
            slots: total number of GPUs or, without GPUs, of CPUs.
        """
        self._allocations, self._free_slots, self._last_stage = allocations, slots, len(STAGES) - 1
        groups: dict[tuple[object, ...], list[Job]] = {}
        for job in jobs:
            # Jobs that wait for other models, as the checks do, must not hold up the others of their model.
            inputs = None if job.copy_of else job.inputs
            groups.setdefault((job.folder, job.stage, job.model, inputs), []).append(job)
        # Only the longest job of each group is compared: there may be thousands of shards.
        self._waiting = [deque(sorted(group, key=self._order)) for group in groups.values()]
        self._missing = {job.output for group in self._waiting for job in group}
        self._next_on_slots: dict[Job, Job] = {}

    def start(self) -> Job | None:
        """Take the next job that may start and for which enough slots are free; None if there is none now."""
        for group in self._startable():
            job, slots = group[0], self._allocations[group[0]].slots
            if slots <= self._free_slots + _ROUNDING:
                self._free_slots -= slots
                self._take(group)
                return job
            if job.is_training and job.spec.parents:
                return None  # it needs many slots, which smaller jobs would take one after the other
        return None

    def start_after(self, job: Job) -> list[Job]:
        """Take the jobs that the process of a job which has just started does afterwards, on the same slots.

        With a GPU, these are evaluations of the same model, up to `PROCESS_FLOP` together. Without one, Ray reuses
        processes, and shards that are apart fill the CPUs.
        """
        batch = [job]
        if not job.is_training and not job.copy_of and self._allocations[job].is_gpu_task:
            work = job.flop
            for group in self._startable():
                if (group[0].folder, group[0].stage, group[0].model) != (job.folder, job.stage, job.model):
                    continue
                while group and not group[0].copy_of and work + group[0].flop <= PROCESS_FLOP:
                    work += group[0].flop
                    batch.append(self._take(group))
        self._next_on_slots |= dict(pairwise(batch))
        return batch[1:]

    def end(self, job: Job, done: bool = True) -> Job | None:
        """Free the slots of a job, or return the job that starts on them now (`start_after`).

        After a failed one (not `done`), no job of a later stage starts.
        """
        if done:
            self._missing.discard(job.output)
        else:
            self._last_stage = min(self._last_stage, STAGES.index(job.stage))
        following = self._next_on_slots.pop(job, None)
        if following is None:
            self._free_slots += self._allocations[job].slots
        return following

    def _startable(self) -> list[deque[Job]]:
        """The groups whose inputs exist, in the order in which their first jobs start."""
        ready = (
            group
            for group in self._waiting
            if STAGES.index(group[0].stage) <= self._last_stage and self._missing.isdisjoint(group[0].inputs)
        )
        return sorted(ready, key=lambda group: self._order(group[0]))

    def _take(self, group: deque[Job]) -> Job:
        job = group.popleft()
        if not group:
            self._waiting.remove(group)
        return job

    def _order(self, job: Job) -> tuple[int, bool, float, float]:
        allocation = self._allocations[job]
        # Given weights first: whether they are refused must not wait for hours of training.
        is_trained = job.spec.method != WEIGHTS
        return STAGES.index(job.stage), is_trained, -duration(job, allocation), -allocation.slots


@dataclass(frozen=True)
class Planned:
    """When and where a job is to run.

    Attributes:
        start, end: since the start of the first job, in the unit of the jobs' lengths.
        devices: numbers of its GPUs or CPUs, counted over all nodes.
    """

    start: float
    end: float
    devices: tuple[int, ...]


def timeline(
    jobs: Iterable[Job],
    allocations: Mapping[Job, Allocation],
    slots: float,
    length: Callable[[Job, Allocation], float] = duration,
) -> dict[Job, Planned]:
    """When and where each job would run, if each took exactly as long as planned; in the order of their starts.

    Args:
        jobs, allocations, slots: as in `Schedule`.
        length: of a job: by default in FLOP of one GPU or CPU; `Speeds.seconds` gives seconds. It does not change the
            order, which follows from `duration` in a real run too.
    """
    schedule, now, running = Schedule(jobs, allocations, slots), 0.0, list[tuple[float, int, Job]]()
    free = [1.0] * math.ceil(slots)
    planned: dict[Job, Planned] = {}
    while True:
        while job := schedule.start():
            allocation = allocations[job]
            share = min(1.0, allocation.gpus or 1.0)
            # Shares of GPUs fill one GPU after the other.
            candidates = sorted((remaining, n) for n, remaining in enumerate(free) if remaining >= share - _ROUNDING)
            devices = tuple(n for _, n in candidates[: round(allocation.slots / share)])
            for n in devices:
                free[n] -= share
            planned[job] = Planned(now, now + length(job, allocation), devices)
            heapq.heappush(running, (planned[job].end, len(planned), job))
        if not running:
            return planned
        now = running[0][0]
        while running and running[0][0] <= now * (1 + _ROUNDING):
            job = heapq.heappop(running)[2]
            schedule.end(job)
            for n in planned[job].devices:
                free[n] += min(1.0, allocations[job].gpus or 1.0)


def lower_bound(
    jobs: Iterable[Job],
    allocations: Mapping[Job, Allocation],
    slots: float,
    length: Callable[[Job, Allocation], float] = duration,
) -> float:
    """A makespan that no schedule is shorter than.

    The largest of three: all work shared evenly; the longest chain of jobs of which each needs the one before; and, for
    jobs that cannot all run at once, the rounds that they take and the shortest chain that follows one of them.

    Args:
        jobs, allocations, slots: as in `Schedule`.
        length: as in `timeline`.
    """
    jobs = sorted(jobs, key=lambda job: STAGES.index(job.stage), reverse=True)
    if not jobs:
        return 0.0
    lengths = {job: length(job, allocations[job]) for job in jobs}
    chains: dict[tuple[str, str], float] = {}  # the longest one that follows an output
    for job in jobs:
        chain = lengths[job] + chains.get(job.output, 0.0)
        for output in job.inputs:
            chains[output] = max(chains.get(output, 0.0), chain)
    following = {job: chains.get(job.output, 0.0) for job in jobs}
    at_once = max(1, int(slots / min(allocations[job].slots for job in jobs) + _ROUNDING))
    work = sum(lengths[job] * allocations[job].slots for job in jobs) / slots
    bounds, shortest = [work, *(lengths[job] + following[job] for job in jobs)], float("inf")
    for number, job in enumerate(sorted(jobs, key=lambda job: -lengths[job])):
        shortest = min(shortest, following[job])
        bounds.append((number // at_once + 1) * lengths[job] + shortest)
    return max(bounds)
