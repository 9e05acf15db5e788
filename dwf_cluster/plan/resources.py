"""The resources of a run, and the allocation of each job. Needs neither torch nor ray."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dwf_cluster.plan.jobs import Job
from dwf_cluster.plan.schedule import Allocation
from dwf_cluster.settings import InvalidInput

MIN_IMAGES_PER_WORKER = 32
"""Images of a batch, unless the user requests more workers: BatchNorm sees only the images of its worker."""


@dataclass(frozen=True)
class Limits:
    """The resources that a user requests for jobs, where they differ from the default.

    Attributes:
        joint_workers: processes that train a model with parents; None: one a GPU or, without GPUs, one a node, as long
            as each has `MIN_IMAGES_PER_WORKER` images of a batch or, with `joint.parallelism=experts`, an expert.
        expert_workers: processes that train a model without parents, with GPUs; None: 1.
        gpus_per_expert: share of a GPU, at most 1, for a model without parents; below 1 it has one worker.
    """

    joint_workers: int | None = None
    expert_workers: int | None = None
    gpus_per_expert: float = 1.0


@dataclass(frozen=True)
class Resources:
    """The machines of a run. No part of the experiment.

    Attributes:
        cpus, gpus: of each node, that Ray may use.
        nodes: number of machines.
        limits: the resources that the user requests for jobs.
        excluded_nodes: Ray's ids of other machines of the same Ray cluster, which jobs must not run on.
    """

    cpus: int
    gpus: int
    nodes: int = 1
    limits: Limits = Limits()
    excluded_nodes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        workers = {"--joint-workers": self.limits.joint_workers, "--expert-workers": self.limits.expert_workers}
        for option, value in workers.items():
            if value is not None and value > self.slots:
                raise InvalidInput(f"{option}: {value} cannot be used: allowed are 1 to {self.slots}")
        if self.limits.gpus_per_expert < 1 and not self.gpus:
            raise InvalidInput(f"--gpus-per-expert: {self.limits.gpus_per_expert:g} cannot be used: there are no GPUs")

    @property
    def slots(self) -> int:
        """Processes with a GPU of their own or, without GPUs, with a CPU of their own."""
        return self.nodes * (self.gpus or self.cpus)


def alike_nodes(nodes: Iterable[Mapping[str, Any]], limits: Limits) -> tuple[Resources, str]:
    """Choose the nodes of a Ray cluster that a run uses: equal ones, because one plan must fit each of them.

    With GPUs: the nodes with the same number and type of GPUs that have the most GPUs together. Without GPUs: all nodes
    with CPUs. Of each, as many CPUs as the smallest has.

    Args:
        nodes: what `ray.nodes()` returns.
        limits: the resources that the user requests for jobs.

    Returns:
        The resources, and a line that names used and unused nodes; empty if all are used.

    Raises:
        InvalidInput: if no node has a CPU, or there are too few slots for the workers that `limits` request.
    """
    alive = sorted((n for n in nodes if n["Alive"]), key=lambda node: (node["NodeManagerHostname"], node["NodeID"]))
    kinds: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for node in alive:
        if node["Resources"].get("CPU", 0) >= 1:
            kinds.setdefault(_gpus(node), []).append(node)
    if not kinds:
        raise InvalidInput("--address: no node of that Ray has a CPU for jobs")
    (gpus, _), used = max(kinds.items(), key=lambda kind: (kind[0][0] * len(kind[1]), kind[0]))
    if not gpus:
        used = [node for nodes in kinds.values() for node in nodes]
    # A head node that offers neither CPUs nor GPUs is not mentioned.
    unused = [node for node in alive if node not in used and (node["Resources"].get("CPU") or _gpus(node)[0])]
    cpus = int(min(node["Resources"]["CPU"] for node in used))
    resources = Resources(cpus, gpus, len(used), limits, tuple(node["NodeID"] for node in unused))
    if not unused:
        return resources, ""
    names = ", ".join(f"{node['NodeManagerHostname']} ({_inventory(node)})" for node in unused)
    smallest = min(used, key=lambda node: node["Resources"]["CPU"])
    return resources, f"nodes: {len(used)} with {_inventory(smallest)} are used; left out: {names}"


def _gpus(node: Mapping[str, Any]) -> tuple[int, str]:
    """Number and type of a node's GPUs; Ray names the type where it can detect it."""
    types = (name.partition(":")[2] for name in node["Resources"] if name.startswith("accelerator_type:"))
    return int(node["Resources"].get("GPU", 0)), ",".join(sorted(types))


def _inventory(node: Mapping[str, Any]) -> str:
    gpus, kind = _gpus(node)
    return f"{int(node['Resources'].get('CPU', 0))} CPU, {gpus} GPU{kind and ' '}{kind}"


def cpus_here(root: Path = Path("/")) -> int:
    """CPUs that this process may use: those of its affinity, or fewer if a cgroup's quota is lower.

    Args:
        root: of the file system.
    """
    # macOS has no affinity.
    affinity = getattr(os, "sched_getaffinity", None)
    allowed = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min([allowed, *_cgroup_quotas(root)])))


def _cgroup_quotas(root: Path) -> Iterator[float]:
    """CPU quotas of this process's cgroups (version 1 or 2) and of their parents."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        mounted = root / "sys/fs/cgroup" / controllers
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the path may be the host's, of which only the first folders or none exist here.
        for folder in (mounted / path.lstrip("/"), *(mounted / path.lstrip("/")).parents):
            try:
                if controllers:
                    names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                    quota, period = ((folder / name).read_text().strip() for name in names)
                else:
                    quota, period = (folder / "cpu.max").read_text().split()
            except OSError:
                pass
            else:
                if quota not in ("max", "-1"):
                    yield int(quota) / int(period)
            if folder == mounted:
                break


def gpus_here() -> int:
    """Number of GPUs that this process may use; 0 without a PyTorch that can use them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = _nvidia_devices() if visible is None else [name for name in visible.split(",") if name.strip()]
    return len(devices) if _torch_uses_gpus() else 0


def unused_gpus() -> str:
    """A line that says why GPUs of this machine are not used; empty if there are none, or they are used."""
    devices = _nvidia_devices()
    if not devices or gpus_here():
        return ""
    reason = "CUDA_VISIBLE_DEVICES is empty" if _torch_uses_gpus() else "this PyTorch is built without CUDA"
    return f"warning: {len(devices)} GPU of this machine not used: {reason}"


def _nvidia_devices() -> list[str]:
    return glob("/dev/nvidia[0-9]*")


def _torch_uses_gpus() -> bool:
    """Whether the installed PyTorch is built for GPUs; without importing it, which takes seconds."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    built = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    return bool(built.get("cuda") or built.get("hip"))


def allocate(jobs: Iterable[Job], resources: Resources) -> dict[Job, Allocation]:
    """The allocation of each job on these resources.

    An allocation depends on its job alone, not on what else runs: with another number of workers BatchNorm would see
    other parts of each batch, and a run of several seeds would give other numbers than a run of one.

    Raises:
        InvalidInput: if the user requests more workers than a batch has images for, or a model has experts for.
    """
    return {job: replace(_allocation(job, resources), excluded_nodes=resources.excluded_nodes) for job in jobs}


def _allocation(job: Job, resources: Resources) -> Allocation:
    gpus = min(1, resources.gpus)
    limits = resources.limits
    if job.is_training and job.spec.parents:
        most = resources.slots if gpus else resources.nodes
        if job.spec.parallelism == "experts":
            networks = job.spec.networks
            workers = _checked_workers("--joint-workers", limits.joint_workers, networks, "one expert for each")
            workers = workers or min(most, networks)
        else:
            batch = job.training.batch_size
            workers = _checked_batch("--joint-workers", limits.joint_workers, batch)
            workers = workers or max(1, min(most, batch // MIN_IMAGES_PER_WORKER))
        # GPUs that this training leaves free keep their share of the CPUs.
        workers_per_node = resources.gpus or -(-workers // resources.nodes)
        in_process = workers == 1 and not gpus
        return Allocation(0 if in_process else workers, max(1, resources.cpus // workers_per_node), gpus)
    if job.is_training and gpus:
        workers = _checked_batch("--expert-workers", limits.expert_workers, job.training.batch_size) or 1
        return Allocation(1 if limits.gpus_per_expert < 1 else workers, 1, limits.gpus_per_expert)
    return Allocation(0, 1, gpus)


def _checked_batch(option: str, workers: int | None, batch: int) -> int | None:
    return _checked_workers(option, workers, max(1, batch // 2), f"two images of a batch of {batch} for each")


def _checked_workers(option: str, workers: int | None, largest: int, reason: str) -> int | None:
    """The number of workers that an option requests.

    Raises:
        InvalidInput: if it is above `largest`.
    """
    if workers and workers > largest:
        raise InvalidInput(f"{option}: {workers} cannot be used: allowed are 1 to {largest}, {reason}")
    return workers
