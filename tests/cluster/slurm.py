"""A real SLURM on this machine: munged, slurmctld, and a slurmd for each of several nodes.

Everything lies in one folder and listens on loopback. Nodes have host names of their own (n1, n2, ...) but share the
machine's one address, its processes and its /tmp. The partitions `main` and `high` have nodes that are alike, with
fake H100s: device files that behave like /dev/null. The partition `uneven` also has a last node with one CPU, whose
GPUs SLURM does not manage.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import stat
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from .. import PATIENCE

COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
NODES, CPUS, GPUS, MEMORY = 2, 2, 2, 8000
"""Number of nodes that are alike, and CPUs, GPUs and MB of each."""
LAST = f"n{NODES + 1}"
"""The last node, in the partition `uneven` only."""
_NAMES = [f"n{i + 1}" for i in range(NODES + 1)]

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
# Stock SLURM waits two minutes before it starts a requeued job again.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
SlurmdParameters=config_overrides
ReturnToService=0
MailProg=/bin/true
InactiveLimit=0
KillWait=5
MinJobAge=3600
GresTypes=gpu
NodeName=n[1-{nodes}] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cpus} RealMemory={memory} \
Gres=gpu:h100:{gpus} State=UNKNOWN
NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port_of_last} CPUs=1 RealMemory={memory} State=UNKNOWN
PartitionName=main Nodes=n[1-{nodes}] Default=YES DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 \
State=UP
PartitionName=high Nodes=n[1-{nodes}] DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=uneven Nodes=ALL DefaultTime=10 PriorityTier=1 PreemptMode=REQUEUE State=UP
"""


def missing() -> str | None:
    """Why no SLURM can be started on this machine; None if one can."""
    if os.geteuid() != 0:
        return "starting a SLURM of our own needs root"
    absent = [command for command in COMMANDS if shutil.which(command) is None]
    return f"no SLURM on this machine ({absent[0]}): install Debian's slurm-wlm and munge" if absent else None


class Slurm:
    """A running SLURM; `environment` makes its commands talk to it."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        folder.chmod(0o755)  # munge requires that every user can reach its socket
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "spool", "dev", *(f"spool/{name}" for name in _NAMES)):
            (folder / name).mkdir(parents=True)
        for i in range(GPUS):
            os.mknod(folder / "dev" / f"nvidia{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (folder / "gres.conf").write_text(
            f"NodeName=n[1-{NODES}] Name=gpu Type=h100 File={folder}/dev/nvidia[0-{GPUS - 1}]\n"
        )
        port = _free_ports(1 + len(_NAMES))
        settings = _CONFIGURATION.format(
            host=socket.gethostname().partition(".")[0],
            folder=folder,
            port=port,
            first=port + 1,
            last=port + NODES,
            name=LAST,
            port_of_last=port + NODES + 1,
            nodes=NODES,
            cpus=CPUS,
            gpus=GPUS,
            memory=MEMORY,
        )
        (folder / "slurm.conf").write_text(settings)
        hosts = "".join(f"127.0.0.1 {name}\n" for name in _NAMES)
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + hosts)
        with open(os.open(folder / "munge.key", os.O_WRONLY | os.O_CREAT, 0o600), "wb") as key:
            key.write(secrets.token_bytes(128))

    def start(self) -> None:
        """Start the daemons and wait until every node is idle."""
        f = self.folder
        munge = {"socket": "munge.socket", "key-file": "munge.key", "pid-file": "munged.pid", "log-file": "munged.log"}
        self("munged", *(f"--{option}={f / name}" for option, name in munge.items()), f"--seed-file={f}/munged.seed")
        self("slurmctld")
        with_name = 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; exec slurmd -N "$1"'
        for name in _NAMES:
            self("unshare", "--uts", "--mount", "bash", "-c", with_name, "_", name, str(f))
        idle = ("sinfo", "-hNt", "idle", "-o", "%N")
        self.wait_for(lambda: set(self(*idle).split()) >= set(_NAMES), "idle nodes")

    def stop(self) -> None:
        """Cancel every job, then stop the daemons by their pid files. slurmstepd outlives slurmd, so jobs first."""
        jobs = self("squeue", "-ho", "%A").split()
        if jobs:
            self("scancel", "--signal=KILL", "--full", *set(jobs))
            self("scancel", *set(jobs))
            self.wait_for(lambda: not self("squeue", "-h"), "an empty queue")
        for name in (*(f"slurmd-{name}" for name in _NAMES), "slurmctld", "munged"):
            file = self.folder / f"{name}.pid"
            if file.exists():
                try:
                    process = psutil.Process(int(file.read_text()))
                    process.terminate()
                    psutil.wait_procs([process], timeout=PATIENCE)
                except psutil.NoSuchProcess:
                    continue
        shutil.rmtree(self.folder)

    def __call__(self, *command: str | os.PathLike[str], cwd: Path | None = None, **variables: str) -> str:
        """Run a command with this SLURM; returns its output."""
        result = subprocess.run(
            command,
            cwd=cwd or self.folder,
            env=self.environment | variables,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert result.returncode == 0, (command, result.stdout, result.stderr)
        return result.stdout

    def submit(self, *arguments: str | os.PathLike[str], cwd: Path, **variables: str) -> str:
        """`sbatch` with these arguments; returns the job's number."""
        number = re.search(r"\d+", self("sbatch", *arguments, cwd=cwd, **variables))
        assert number is not None
        return number[0]

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`, such as `JobState` or `Restarts`."""
        match = re.search(rf"\b{name}=(\S+)", self("scontrol", "show", "job", job))
        assert match is not None, name
        return match[1]

    def state(self, job: str) -> str:
        """`PENDING`, `RUNNING`, `COMPLETED`, ..."""
        return self.field(job, "JobState")

    def wait(self, job: str, seconds: float = PATIENCE) -> str:
        """Wait until a job is no longer in the queue; returns its last state."""
        self.wait_for(lambda: not self("squeue", "-hj", job, "-o", "%T").strip(), f"the end of job {job}", seconds)
        return self.state(job)

    def wait_for(self, condition: object, what: str, seconds: float = PATIENCE) -> None:
        """Check every tenth of a second until `condition()` is true: SLURM has no events."""
        assert callable(condition)
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {seconds} s"
            time.sleep(0.1)

    def processes(self, job: str) -> list[psutil.Process]:
        """Every process of this machine that has the job's number in its environment."""
        processes = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURM_JOB_ID") == job and process.status() != psutil.STATUS_ZOMBIE:
                    processes.append(process)
            except psutil.Error:  # it has ended since
                continue
        return processes


def _free_ports(count: int) -> int:
    """The first of `count` consecutive unused ports."""
    for port in range(17000, 32000, count):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, candidate in enumerate(sockets):
                candidate.bind(("127.0.0.1", port + offset))
            return port
        except OSError:
            continue
        finally:
            for candidate in sockets:
                candidate.close()
    raise AssertionError("no free ports")
