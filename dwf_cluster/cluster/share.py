"""What a SLURM job has on the node that this process runs on: GPUs and memory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from dwf_cluster.plan.resources import gpus_here


def claim_gpus(cpus: int) -> int:
    """Number of GPUs that Ray is to use on this node. All others are hidden from it.

    Where SLURM manages GPUs (GRES) these are the job's. Where it does not, they are as many as `DWF_GPUS` says, or all
    if all CPUs of the node are the job's. A warning names GPUs that are visible and not used.

    Args:
        cpus: of the job on this node.
    """
    if allocated := int(os.environ.get("SLURM_GPUS_ON_NODE", "0")):
        return allocated
    name, chosen = os.environ["SLURMD_NODENAME"], os.environ.get("DWF_GPUS")
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [str(i) for i in range(gpus_here())] if listed is None else re.findall(r"[^,\s]+", listed)
    if visible == ["NoDevFiles"]:  # SLURM's word for none
        visible = []
    declined = os.environ.get("SLURM_GPUS_PER_NODE") == "0"
    if chosen is not None:
        used = visible[: int(chosen)]
        if len(used) < int(chosen):
            print(f"warning: node {name}: DWF_GPUS is {chosen}, but {len(used)} are visible", file=sys.stderr)
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
    """Whether SLURM does not manage GPUs on this node, and all CPUs of it are the job's."""
    shown = subprocess.run(["scontrol", "show", "node", node], capture_output=True, text=True, check=False).stdout
    fields = dict(re.findall(r"\b(Gres|CPUTot)=(\S+)", shown))
    return "gpu" not in fields.get("Gres", "gpu") and cpus >= int(fields.get("CPUTot", cpus + 1))


def memory_share(cpus: int, gpus: int) -> int:
    """Bytes of memory that the job has on this node.

    What `--mem`, `--mem-per-cpu` or `--mem-per-gpu` gave it, and never more than its control group's limit. With
    neither, its share of the node by CPUs.

    Args:
        cpus, gpus: of the job on this node.
    """
    units = {"NODE": 1, "CPU": cpus, "GPU": gpus}
    given = [int(os.environ.get(f"SLURM_MEM_PER_{unit}", "0")) * count << 20 for unit, count in units.items()]
    node = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = cgroup_limit()
    allowed = next(filter(None, given), None) or (limit if limit is not None and limit < node else None)
    if allowed is None:
        return node * cpus // max(cpus, os.cpu_count() or 1)
    return min(allowed, node, node if limit is None else limit)


def cgroup_limit(root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> int | None:
    """The lowest memory limit in bytes of the control groups that this process is in; None if there is none."""
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
            except OSError:  # the top has none, and a container may show it no others
                continue
            limits += [int(text)] if text.isdigit() else []
    return min(limits, default=None)
