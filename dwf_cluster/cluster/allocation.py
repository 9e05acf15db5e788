"""Run the pipeline on the nodes of a SLURM allocation. The batch script runs this module on the first node.

    python -m dwf_cluster.cluster.allocation [arguments of dwf_cluster.launch]

srun starts one process on each node (`node.py`); together they make a Ray cluster. A cluster that is lost is started
again, and SLURM requeues the job when its time is over.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from dwf_cluster.cluster import environment
from dwf_cluster.cluster.failures import DRIVER
from dwf_cluster.cluster.temporary import make_private, remove, sockets_fit

RESTARTS = DRIVER.retries or 0
"""How often a Ray cluster that was lost, or did not start, is started again within one allocation."""

REQUEUE = 75
"""Exit status of a run that SLURM has interrupted and requeued (EX_TEMPFAIL of sysexits.h)."""

_FIRST_PORT, _LAST_PORT = 20_000, 32_000
"""Below the range from which Linux assigns ports automatically."""


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
        """Ports that are not in use. The search begins at a different port for each job number.

        Raises:
            RuntimeError: if all ports are in use.
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
    """The private folder of this start of the cluster."""
    path = environment.private_folder()
    assert path is not None, "allocation.py did not start this process"
    return path


def new_folder() -> Path:
    """An unpredictable path for the private folder, in TMPDIR, or in /tmp if TMPDIR is too long for sockets."""
    name = f"dwf-{environment.job_number()}-{secrets.token_urlsafe(3)}"
    parent = os.environ.get("TMPDIR", "")
    fits = os.path.isabs(parent) and sockets_fit(os.path.join(parent, name))
    return Path(parent if fits and os.access(parent, os.W_OK | os.X_OK) else "/tmp", name)


def remove_old_folders(current: Path) -> None:
    """Remove this user's private folders that earlier, killed starts of this job left on this node."""
    for old in current.parent.glob(f"dwf-{environment.job_number()}-*"):
        with contextlib.suppress(FileNotFoundError):  # two nodes of a test cluster share one /tmp
            if old != current and old.lstat().st_uid == os.getuid():
                remove(str(old))


def run(arguments: Sequence[str], resume_command: str) -> int:
    """Run the pipeline on all nodes of this allocation; returns the exit status.

    Args:
        arguments: of `dwf_cluster.launch`, without the choice of where to run.
        resume_command: resumes the run; for people.
    """
    if message := _invalid_setting():
        print(f"error: {message}", file=sys.stderr, flush=True)
        return 2
    signals: list[int] = []

    def on_stop(signum: int, frame: object) -> None:
        if not signals:
            print(
                "stopped by SLURM; what is done is kept. Unless SLURM requeues the job by itself:\n"
                f"resume: {resume_command}",
                file=sys.stderr,
                flush=True,
            )
        signals.append(signum)

    signal.signal(signal.SIGTERM, on_stop)  # scancel, preemption: all processes of the job get it, then SIGKILL
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # the first node's process handles it
    for attempt in range(1 + RESTARTS):
        try:
            status = _run_cluster(arguments, resume_command)
        except OSError as error:
            print(f"failed: {error}\nresume: {resume_command}", file=sys.stderr, flush=True)
            return 1
        if signals:
            return 130
        if status.isdigit():
            return _requeue(resume_command) if int(status) == REQUEUE else int(status)
        # A cluster that did not start counts as lost: Ray gives its nodes 30 s, too short for a busy file system.
        cause = "the Ray cluster was lost" if status == environment.JOINED else "Ray has not started on all nodes"
        logs = " ".join(map(environment.log_file, environment.hostnames()))
        is_last = attempt == RESTARTS
        what_next = f"resume: {resume_command}" if is_last else f"starting it again ({attempt + 1} of {RESTARTS})"
        print(f"{cause}; see {logs}; {what_next}", file=sys.stderr, flush=True)
    return 1


def _run_cluster(arguments: Sequence[str], resume_command: str) -> str:
    """Start the cluster once, and wait for its end.

    Returns:
        The driver's exit status; `JOINED` if the cluster was lost before the driver ended; an empty text if Ray did
        not start on all nodes.

    Raises:
        OSError: if the private folder cannot be made or srun cannot be run.
    """
    ports = Ports.free(environment.job_number())
    token, path, status = secrets.token_hex(32), new_folder(), environment.status_file()
    remove_old_folders(path)
    status.unlink(missing_ok=True)
    try:
        make_private(str(path), token)
        command = [*_srun(), os.environ.get("DWF_PYTHON", sys.executable), "-m", "dwf_cluster.cluster.node", *arguments]
        # srun's own exit status does not count: it is the highest of all processes, killed ones included.
        subprocess.run(command, env=_variables(path, token, ports, resume_command), check=False)
        return status.read_text() if status.exists() else ""
    finally:
        status.unlink(missing_ok=True)
        remove(str(path))


def _srun() -> list[str]:
    """The srun command that starts one process on each node, which may use all that the job has there."""
    nodes = environment.node_count()
    # No --cpus-per-task: nodes may have different numbers of CPUs, and without it a step has all CPUs of the job.
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none"]
    # When one process fails, the others end at once; when the first ends, the others have ten seconds.
    command += ["--kill-on-bad-exit=1", "--wait=10"]
    # Ray is not an MPI program. The token must reach the nodes even if sbatch was given --export=NONE.
    return [*command, "--mpi=none", "--export=ALL"]


def _variables(path: Path, token: str, ports: Ports, resume_command: str) -> dict[str, str]:
    """The environment variables of srun, and through it of the process on each node."""
    variables = dict(os.environ)
    dropped = ["SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK"]  # srun would read them as --cpus-per-task
    if "SLURM_GPUS_ON_NODE" in variables:
        dropped += ["CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"]  # SLURM's, of this node; the step has its own
    for name in dropped:
        variables.pop(name, None)
    numbers = {f"DWF_{name.upper()}_PORT": str(port) for name, port in asdict(ports).items()}
    texts = {"DWF_FOLDER": str(path), "DWF_TOKEN": token, environment.RESUME_COMMAND: resume_command}
    return variables | numbers | texts


def _invalid_setting() -> str | None:
    """The error message for the variables that a site may set; None if they are valid."""
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


def _requeue(resume_command: str) -> int:
    """Have SLURM requeue this job; returns the exit status."""
    command = ["scontrol", "requeue", str(environment.job_number())]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        print("requeued: the run continues when SLURM starts the job again", flush=True)
        return REQUEUE
    message = f"cannot be requeued ({answer.stderr.strip()})\nresume: {resume_command}"
    print(message, file=sys.stderr, flush=True)
    return 1


if __name__ == "__main__":
    if "SLURM_JOB_ID" not in os.environ:
        print("error: no SLURM allocation here; use sbatch slurm/full_pipeline.sh", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(sys.argv[1:], f"sbatch slurm/full_pipeline.sh {shlex.join(sys.argv[1:])}".rstrip()))
