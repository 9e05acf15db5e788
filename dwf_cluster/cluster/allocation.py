"""A SLURM allocation becomes a Ray cluster: what the batch script runs, on the first node.

    python -m dwf_cluster.cluster.allocation [arguments of dwf_cluster.launch]

It starts one process on each node with srun (`node.py`), and outlives them: asks SLURM to run the job again when its
time is over, and starts the cluster again when it was lost.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from dwf_cluster.cluster.temporary import make_private

RESTARTS = 2
"""How often a lost Ray cluster is started again within one allocation."""

REQUEUE = 75
"""Exit status of a run that SLURM told that its time is over: to be continued (EX_TEMPFAIL of sysexits.h)."""

_FIRST_PORT, _LAST_PORT = 20_000, 32_000
"""Below those that Linux gives to programs that ask for any."""


@dataclass(frozen=True)
class Ports:
    """The ports of the first node that others must know, or that cannot be chosen by the system.

    Attributes:
        head: of Ray's head, where the other nodes join.
        dashboard: on 127.0.0.1.
        client: for `ray://`.
    """

    head: int
    dashboard: int
    client: int

    @staticmethod
    def free(job: int) -> Ports:
        """Ports that nobody listens on; those of two jobs on one node are looked for in different places.

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
    """The private folder of this job, at the same place on each of its nodes: Ray wants that, and a short path."""
    return Path(f"/tmp/dwf-{os.environ['SLURM_JOB_ID']}")


def run(arguments: Sequence[str], again: str) -> int:
    """Run the pipeline on all nodes of this allocation; returns the exit status.

    Args:
        arguments: of `dwf_cluster.launch`, without the choice of where to run.
        again: the command that resumes the run, for people.
    """
    told: list[str] = []

    def tell(signum: int, frame: object) -> None:
        if not told:
            told.append(again)
            print(
                f"stopped by SLURM; what is done is kept. Unless the job is requeued by itself:\nresume: {again}",
                file=sys.stderr,
                flush=True,
            )

    signal.signal(signal.SIGTERM, tell)  # scancel, preemption: all processes of the job get it, then SIGKILL
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # for the first node's process
    for attempt in range(1 + RESTARTS):
        status = _step(arguments, again)
        if told:
            return 130
        if status == REQUEUE:
            return _requeue(again)
        if status is not None:
            return status
        print(
            f"the Ray cluster was lost; see {' '.join(log_files())}; "
            + (f"starting it again ({attempt + 1} of {RESTARTS})" if attempt < RESTARTS else f"resume: {again}"),
            file=sys.stderr,
            flush=True,
        )
    return 1


def _step(arguments: Sequence[str], again: str) -> int | None:
    """One life of the cluster; returns its driver's exit status, None if it had no time to leave one."""
    ports = Ports.free(int(os.environ["SLURM_JOB_ID"]))
    token = secrets.token_hex(32)
    make_private(str(folder()), token)
    environment = {
        **os.environ,
        "DWF_TOKEN": token,
        "DWF_AGAIN": again,
        **{f"DWF_{name.upper()}_PORT": str(port) for name, port in asdict(ports).items()},
    }
    nodes = os.environ["SLURM_JOB_NUM_NODES"]
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    # When one process fails the others end; when the first ends, the others have ten seconds.
    command += ["--kill-on-bad-exit=1", "--wait=10"]
    cpus = os.environ.get("SLURM_JOB_CPUS_PER_NODE", "").partition("(")[0]
    if cpus.isdigit():  # equal on all nodes: the one process is bound to all CPUs of the allocation
        command.append(f"--cpus-per-task={cpus}")
    python = os.environ.get("DWF_PYTHON", sys.executable)  # a container's start script, say
    node = [python, "-m", "dwf_cluster.cluster.node", *arguments]
    # Not its exit status: srun's own is the highest of all processes, killed ones included.
    with tempfile.NamedTemporaryFile("r", prefix="dwf-status-") as status:
        subprocess.run([*command, *node], env=environment | {"DWF_STATUS": status.name}, check=False)
        text = status.read()
    shutil.rmtree(folder(), ignore_errors=True)
    return int(text) if text else None


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


def log_files() -> Iterator[str]:
    """Where each node's Ray writes what it has to say, in the folder that the job was submitted from."""
    for node in hostnames():
        yield f"{os.environ['SLURM_SUBMIT_DIR']}/slurm-{os.environ['SLURM_JOB_ID']}-{node}.log"


if __name__ == "__main__":
    if "SLURM_JOB_ID" not in os.environ:
        print("error: no SLURM allocation here; use sbatch slurm/full_pipeline.sh", file=sys.stderr)
        sys.exit(2)
    sys.exit(run(sys.argv[1:], f"sbatch slurm/full_pipeline.sh {shlex.join(sys.argv[1:])}".rstrip()))
