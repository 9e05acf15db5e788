"""Where it runs, and what each job gets of it. Needs neither torch nor ray."""

from __future__ import annotations

import os
from dataclasses import dataclass
from glob import glob

from dwf_cluster.experiment import InvalidInput
from dwf_cluster.plan import Job


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
