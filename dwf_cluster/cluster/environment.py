"""SLURM's interface to the processes of a job: environment variables, and a signal before the time limit.

`allocation.py` adds variables of its own (`DWF_...`) for the processes that it starts on the nodes.
"""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

RESUME_COMMAND = "DWF_RESUME_COMMAND"
"""Variable with the command that resumes the run, for people; `dwf_cluster.launch` reads it."""

JOINED = "joined"
"""Content of the status file from the moment that all nodes have joined until the driver has ended."""


def job_number() -> int:
    """Number of this job."""
    return int(os.environ["SLURM_JOB_ID"])


def node_count() -> int:
    """Number of nodes of this allocation."""
    return int(os.environ["SLURM_JOB_NUM_NODES"])


def hostnames() -> list[str]:
    """The nodes of this allocation, the first one first."""
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def node_name() -> str:
    """SLURM's name of this node."""
    return os.environ["SLURMD_NODENAME"]


def is_first_node() -> bool:
    """Whether this process runs on the first node, which has Ray's head and the driver."""
    return os.environ["SLURM_PROCID"] == "0"


def cpus() -> int:
    """CPUs that this job has on this node."""
    return int(os.environ["SLURM_CPUS_ON_NODE"])


def managed_gpus() -> int:
    """GPUs that this job has on this node, where SLURM manages GPUs (GRES); else 0."""
    return int(os.environ.get("SLURM_GPUS_ON_NODE", "0"))


def declines_gpus() -> bool:
    """Whether the job was submitted with `--gpus-per-node=0`."""
    return os.environ.get("SLURM_GPUS_PER_NODE") == "0"


def requested_memory(cpus: int, gpus: int) -> int | None:
    """Bytes of memory that `--mem`, `--mem-per-cpu` or `--mem-per-gpu` give the job on this node; None without them.

    Args:
        cpus, gpus: of the job on this node.
    """
    units = {"NODE": 1, "CPU": cpus, "GPU": gpus}
    amounts = (int(os.environ.get(f"SLURM_MEM_PER_{unit}", "0")) * count << 20 for unit, count in units.items())
    return next(filter(None, amounts), None)


def head_address() -> tuple[str, int]:
    """Address and port of Ray's head, on the first node."""
    host = os.environ.get("DWF_HEAD_ADDRESS") or os.environ["SLURM_LAUNCH_NODE_IPADDR"]
    return host, int(os.environ["DWF_HEAD_PORT"])


def join_seconds() -> float:
    """How long Ray has to start on all nodes of the allocation."""
    return float(os.environ.get("DWF_JOIN_SECONDS", "180"))


def private_folder() -> Path | None:
    """The private folder of the Ray cluster that `allocation.py` has started around this process; None without one.

    Ray needs the same path on all nodes.
    """
    folder = os.environ.get("DWF_FOLDER")
    return None if folder is None else Path(folder)


def status_file() -> Path:
    """Where the first node's process writes the exit status of its driver.

    It lies in the folder that all nodes share: in a container, or where each step has its own /tmp, the process sees
    other temporary folders than the batch script.
    """
    return Path(os.environ["SLURM_SUBMIT_DIR"], f"slurm-{job_number()}.status")


def log_file(node: str) -> str:
    """Where a node's Ray writes its output, in the folder that the job was submitted from."""
    return f"{os.environ['SLURM_SUBMIT_DIR']}/slurm-{job_number()}-{node}.log"


def wait_for_driver(driver: subprocess.Popen[bytes]) -> tuple[int, bool]:
    """Wait until a driver has ended, and interrupt it (as Ctrl-C does) if SLURM sends this process SIGUSR2.

    SLURM sends SIGUSR2 before the job's time is over, and before it preempts the job.

    Args:
        driver: a child process that runs `dwf_cluster.launch`.

    Returns:
        Its exit status, and whether the job is to be requeued: the driver has stopped because of the signal.
    """
    warnings: list[int] = []

    def interrupt(signum: int, frame: object) -> None:
        warnings.append(signum)
        driver.send_signal(signal.SIGINT)

    signal.signal(signal.SIGUSR2, interrupt)
    status = driver.wait()
    if status == -signal.SIGINT:  # it was still importing its modules
        status = 130
    return status, bool(warnings) and status == 130
