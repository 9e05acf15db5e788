"""The resources of a SLURM job on the node of this process: GPUs and memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from dwf_cluster.cluster import environment
from dwf_cluster.plan.resources import gpus_here


def claim_gpus(cpus: int) -> int:
    """Choose the GPUs that Ray uses on this node, hide all others from it, and return their number.

    Where SLURM manages GPUs (GRES), Ray uses those of the job. Where it does not, Ray uses as many as `DWF_GPUS` says,
    or all of them if the job has all CPUs of the node. A warning counts visible GPUs that are not used.

    Args:
        cpus: of the job on this node.
    """
    if allocated := environment.managed_gpus():
        return allocated
    name, setting = environment.node_name(), os.environ.get("DWF_GPUS")
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [str(i) for i in range(gpus_here())] if listed is None else re.findall(r"[^,\s]+", listed)
    if visible == ["NoDevFiles"]:  # SLURM's value for none
        visible = []
    declined = environment.declines_gpus()
    if setting is not None:
        used = visible[: int(setting)]
        if len(used) < int(setting):
            print(f"warning: node {name}: DWF_GPUS is {setting}, but {len(used)} are visible", file=sys.stderr)
    else:
        used = visible if visible and not declined and _is_whole_and_without_gres(name, cpus) else []
        if visible and not used and not declined:
            print(
                f"warning: node {name}: {len(visible)} GPUs are visible and not used: ask SLURM for them with "
                f"--gpus-per-node or, where SLURM does not manage GPUs, set DWF_GPUS={len(visible)} "
                "(0: none, without this warning)",
                file=sys.stderr,
            )
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(used)
    return len(used)


def _is_whole_and_without_gres(node: str, cpus: int) -> bool:
    """Whether SLURM does not manage GPUs on this node, and the job has all of its CPUs."""
    output = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, check=False).stdout
    fields = dict(re.findall(r"\b(Gres|CPUTot)=(\S+)", output))
    return "gpu" not in fields.get("Gres", "gpu") and cpus >= int(fields.get("CPUTot", cpus + 1))


def memory_share(cpus: int, gpus: int) -> int:
    """Bytes of memory that the job has on this node.

    This is what `--mem`, `--mem-per-cpu` or `--mem-per-gpu` requests, and never more than the limit of its control
    group. Without either, it is the job's share of the node by CPUs.

    Args:
        cpus, gpus: of the job on this node.
    """
    node = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroup_limit()
    allowed = environment.requested_memory(cpus, gpus) or (limit if limit is not None and limit < node else None)
    if allowed is None:
        return node * cpus // max(cpus, os.cpu_count() or 1)
    return min(allowed, node, node if limit is None else limit)


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The lowest memory limit, in bytes, of the control groups that contain this process; None without a limit."""
    limits = []
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(top):
                break
            try:
                text = (folder / name).read_text().strip()
            except OSError:  # the top group has no limit, and a container may hide the others
                continue
            limits += [int(text)] if text.isdigit() else []
    return min(limits, default=None)
