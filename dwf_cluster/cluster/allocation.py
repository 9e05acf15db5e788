"""Run the pipeline on the nodes of a SLURM allocation. The batch script runs this module on the first node.

    python -m dwf_cluster.cluster.allocation [arguments of dwf_cluster.launch]

It starts one process on each node with srun (`node.py`), which together make a Ray cluster. It starts a lost cluster
again, and has SLURM requeue the job when its time is over.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from dwf_cluster.cluster.failures import DRIVER
from dwf_cluster.cluster.temporary import make_private, sockets_fit

RESTARTS = DRIVER.retries or 0
"""How often a Ray cluster that was lost, or has not started, is started again within one allocation."""

REQUEUE = 75
"""Exit status of a run whose time is over and that is to be continued (EX_TEMPFAIL of sysexits.h)."""

JOINED = "joined"
"""What the status file holds from the moment that all nodes have joined until the driver has ended."""

_FIRST_PORT, _LAST_PORT = 20_000, 32_000
"""Below the ports that Linux hands out by itself."""


@dataclass(frozen=True)
class Ports:
    """The ports of the first node that must be known before Ray starts.

    Attributes:
        head: of Ray's head, where the other nodes join.
        dashboard: on 127.0.0.1.
    """

    head: int
    dashboard: int

    @staticmethod
    def free(job: int) -> Ports:
        """Ports that nobody listens on. The search begins at another place for each job number.

        Raises:
            RuntimeError: if there are none.
        """
        count = len(Ports.__dataclass_fields__)
        blocks = (_LAST_PORT - _FIRST_PORT) // count
        for attempt in range(blocks):
            first = _FIRST_PORT + (job + attempt) % blocks * count
            with ExitStack() as stack:
                try:
                    for port in range(first, first + count):
                        stack.enter_context(socket.socket()).bind(("", port))
                except OSError:
                    continue
                return Ports(*range(first, first + count))
        raise RuntimeError(f"no {count} free ports between {_FIRST_PORT} and {_LAST_PORT}")


def folder() -> Path:
    """The private folder of this life of the cluster. Ray needs the same path on all nodes."""
    return Path(os.environ["DWF_FOLDER"])


def new_folder() -> Path:
    """A path for the private folder that nobody can guess, in TMPDIR, or in /tmp if TMPDIR is too long for sockets."""
    name = f"dwf-{os.environ['SLURM_JOB_ID']}-{secrets.token_urlsafe(3)}"
    parent = os.environ.get("TMPDIR", "")
    fits = os.path.isabs(parent) and sockets_fit(os.path.join(parent, name))
    return Path(parent if fits and os.access(parent, os.W_OK | os.X_OK) else "/tmp", name)


def remove_old_folders(current: Path) -> None:
    """Remove the private folders that killed lives of this job have left on this node; keep everybody else's."""
    for old in current.parent.glob(f"dwf-{os.environ['SLURM_JOB_ID']}-*"):
        with contextlib.suppress(FileNotFoundError):  # two nodes of a test cluster share one /tmp
            if old != current and old.lstat().st_uid == os.getuid():
                shutil.rmtree(old, ignore_errors=True)


def status_file() -> Path:
    """Where the first node's process leaves its driver's exit status.

    It lies in the folder that all nodes share: in a container, or where each step has its own /tmp, the process sees
    other temporary folders than the batch script.
    """
    return Path(os.environ["SLURM_SUBMIT_DIR"], f"slurm-{os.environ['SLURM_JOB_ID']}.status")


def run(arguments: Sequence[str], again: str) -> int:
    """Run the pipeline on all nodes of this allocation; returns the exit status.

    Args:
        arguments: of `dwf_cluster.launch`, without the choice of where to run.
        again: the command that resumes the run, for people.
    """
    if wrong := _wrong_setting():
        print(f"error: {wrong}", file=sys.stderr, flush=True)
        return 2
    stopped: list[str] = []

    def on_stop(signum: int, frame: object) -> None:
        if not stopped:
            stopped.append(again)
            print(
                f"stopped by SLURM; what is done is kept. Unless the job is requeued by itself:\nresume: {again}",
                file=sys.stderr,
                flush=True,
            )

    signal.signal(signal.SIGTERM, on_stop)  # scancel, preemption: all processes of the job get it, then SIGKILL
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the first node's process handles it
    for attempt in range(1 + RESTARTS):
        try:
            status = _run_cluster(arguments, again)
        except OSError as error:
            print(f"failed: {error}\nresume: {again}", file=sys.stderr, flush=True)
            return 1
        if stopped:
            return 130
        if status.isdigit():
            return _requeue(again) if int(status) == REQUEUE else int(status)
        # Not to have started counts as lost: Ray gives its nodes 30 s, which is too short for a busy file system.
        cause = "the Ray cluster was lost" if status == JOINED else "Ray has not started on all nodes"
        print(
            f"{cause}; see {' '.join(log_file(node) for node in hostnames())}; "
            + (f"starting it again ({attempt + 1} of {RESTARTS})" if attempt < RESTARTS else f"resume: {again}"),
            file=sys.stderr,
            flush=True,
        )
    return 1


def _run_cluster(arguments: Sequence[str], again: str) -> str:
    """Run one life of the cluster.

    Returns:
        The driver's exit status; `JOINED` if the cluster was lost before the driver could leave one; an empty text if
        the nodes have not come together.

    Raises:
        OSError: if the private folder cannot be made or srun cannot be run.
    """
    ports = Ports.free(int(os.environ["SLURM_JOB_ID"]))
    token, path, status = secrets.token_hex(32), new_folder(), status_file()
    remove_old_folders(path)
    status.unlink(missing_ok=True)
    try:
        make_private(str(path), token)
        command = [*_srun(), os.environ.get("DWF_PYTHON", sys.executable), "-m", "dwf_cluster.cluster.node", *arguments]
        # Not srun's exit status: that is the highest of all processes, killed ones included.
        subprocess.run(command, env=_environment(path, token, ports, again), check=False)
        return status.read_text() if status.exists() else ""
    finally:
        status.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


def _srun() -> list[str]:
    """The srun command that starts one process on each node, which may use all that the job has there."""
    nodes = os.environ["SLURM_JOB_NUM_NODES"]
    # No --cpus-per-task: nodes may have unequal numbers, and without it a step has all CPUs of the job on each node.
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]
    # When one process fails the others end; when the first ends, the others have ten seconds.
    command += ["--kill-on-bad-exit=1", "--wait=10"]
    # Ray is no MPI program; and the token must reach the nodes also where sbatch was given --export=NONE.
    return [*command, "--mpi=none", "--export=ALL"]


def _environment(path: Path, token: str, ports: Ports, again: str) -> dict[str, str]:
    """The environment of srun, and through it of the process on each node."""
    environment = dict(os.environ)
    dropped = ["SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK"]  # srun would read them as --cpus-per-task
    if "SLURM_GPUS_ON_NODE" in environment:
        dropped += ["CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"]  # SLURM's, of this node; the step has its own
    for name in dropped:
        environment.pop(name, None)
    numbers = {f"DWF_{name.upper()}_PORT": str(port) for name, port in asdict(ports).items()}
    return environment | numbers | {"DWF_FOLDER": str(path), "DWF_TOKEN": token, "DWF_AGAIN": again}


def _wrong_setting() -> str | None:
    """What is wrong with the variables that a site may set; None if nothing is."""
    gpus = os.environ.get("DWF_GPUS", "0")
    if not (gpus.isascii() and gpus.isdigit()):
        return f"DWF_GPUS: {gpus!r} cannot be used: allowed is the number of GPUs to use on each node"
    address = os.environ.get("DWF_HEAD_ADDRESS")
    if address is not None:
        try:
            family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET
            with socket.socket(family) as probe:
                probe.bind((address, 0))
        except (ValueError, OSError):
            return f"DWF_HEAD_ADDRESS: {address!r} cannot be used: allowed is an IP address of the first node"
    return None


def _requeue(again: str) -> int:
    asked = subprocess.run(
        ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True, check=False
    )
    if asked.returncode == 0:
        print("requeued: it goes on when SLURM runs the job again", flush=True)
        return REQUEUE
    print(f"cannot be requeued ({asked.stderr.strip()})\nresume: {again}", file=sys.stderr, flush=True)
    return 1


def hostnames() -> list[str]:
    """The nodes of this allocation, the first one first."""
    command = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def log_file(node: str) -> str:
    """Where a node's Ray writes its output, in the folder that the job was submitted from."""
    return f"{os.environ['SLURM_SUBMIT_DIR']}/slurm-{os.environ['SLURM_JOB_ID']}-{node}.log"


if __name__ == "__main__":
    if "SLURM_JOB_ID" not in os.environ:
        print("error: no SLURM allocation here; use sbatch slurm/full_pipeline.sh", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(sys.argv[1:], f"sbatch slurm/full_pipeline.sh {shlex.join(sys.argv[1:])}".rstrip()))
