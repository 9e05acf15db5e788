"""Submission to SLURM through submitit, from the login node, and looking on until the job has ended.

submitit writes the batch script and keeps what is to be run; `allocation.py` runs it. With its local executor the
same goes on in processes of this machine.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from dwf_cluster.experiment import InvalidInput

FOLDER = Path("slurm-jobs")
"""Batch scripts and logs, and which job runs which experiment; below the folder that it was submitted from."""

SIGNAL_SECONDS = 120
"""How long before its time is over a job is told; as in `slurm/full_pipeline.sh`."""


@dataclass(frozen=True)
class Request:
    """What to ask SLURM for.

    Attributes:
        nodes: of each job.
        gpus_per_node, cpus_per_node: None: what the site gives without being asked.
        minutes: time limit of one life of the job; it goes on in the next.
        options: of sbatch, by their long names.
        throttle: jobs of an array that run at once; None: all.
        executor: `slurm`, or `local` for processes of this machine.
    """

    nodes: int
    gpus_per_node: int | None
    cpus_per_node: int | None
    minutes: int
    options: Mapping[str, str]
    throttle: int | None
    executor: str


@dataclass(frozen=True)
class Run:
    """One experiment's job: what submitit keeps and calls, in each life of the job.

    Attributes:
        folder: the experiment's.
        arguments: of `dwf_cluster.launch`, without the choice of where to run.
        again: the command that resumes it, for people.
    """

    folder: str
    arguments: tuple[str, ...]
    again: str

    def __call__(self) -> None:
        """Run to the end.

        Raises:
            RuntimeError: if the run failed.
            SystemExit: if it is to go on in the job's next life.
        """
        status = self._here() if submitit.JobEnvironment().cluster == "local" else self._in_allocation()
        if status:
            raise RuntimeError(f"exit status {status}; resume: {self.again}")

    def checkpoint(self) -> DelayedSubmission:
        """What the next life runs: the same, and the store knows the rest."""
        return DelayedSubmission(self)

    def _in_allocation(self) -> int:
        from dwf_cluster.cluster.allocation import REQUEUE, run

        status = run(self.arguments, self.again)
        if status == REQUEUE:
            sys.exit(status)  # without a result, which submitit would take for the end
        return status

    def _here(self) -> int:
        process = subprocess.Popen([sys.executable, "-m", "dwf_cluster.launch", "--local", *self.arguments])
        requeue, told = signal.getsignal(signal.SIGUSR2), list[int]()

        def tell(signum: int, frame: object) -> None:
            told.append(signum)
            process.send_signal(signal.SIGINT)

        signal.signal(signal.SIGUSR2, tell)
        status = process.wait()
        if told and status == 130:
            assert callable(requeue)
            requeue(signal.SIGUSR2, None)  # submitit's own, once the run has stopped
        return status


def script(runs: Sequence[Run], request: Request) -> str:
    """The batch script that `submit` would hand to sbatch."""
    executor = _executor(request)
    if not isinstance(executor, submitit.SlurmExecutor):
        raise InvalidInput("--executor: local has no sbatch script")
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit(runs: Sequence[Run], request: Request, say: Callable[[str], None]) -> dict[Run, submitit.Job[None]]:
    """Submit what is not in the queue yet, several as one array; returns each run's job."""
    executor = _executor(request)
    jobs = {run: job for run in runs if (job := _running(run, executor))}
    for run, job in jobs.items():
        say(f"{run.folder}: job {job.job_id} is there already")
    new = [run for run in runs if run not in jobs]
    if new and request.executor == "slurm":
        _refuse_what_sbatch_refuses(script(new, request))
    with executor.batch() if len(new) > 1 else nullcontext():
        submitted = {run: executor.submit(run) for run in new}
    for run, job in submitted.items():
        _record(run).write_text(json.dumps({"job": job.job_id}))
        say(f"{run.folder}: job {job.job_id} submitted")
    return jobs | submitted


def follow(jobs: Mapping[Run, submitit.Job[None]], request: Request, say: Callable[[str], None]) -> None:
    """Pass on what the jobs log and their states, until none of them is in the queue any more."""
    seen = dict.fromkeys(jobs, 0)
    states = dict.fromkeys(jobs, "")
    while True:
        left = {run: _state(job, request.executor) for run, job in jobs.items()}
        for run, job in jobs.items():
            prefix = f"{run.folder}: " if len(jobs) > 1 else ""
            if left[run] and left[run] != states[run]:
                states[run] = left[run]
                say(f"{prefix}job {job.job_id}: {left[run]}")
            with open(job.paths.stdout, errors="replace") if job.paths.stdout.exists() else nullcontext() as log:
                if log:
                    log.seek(seen[run])
                    text = log.read()
                    whole = text if not left[run] else text[: text.rfind("\n") + 1]
                    seen[run] += len(whole.encode())
                    for line in whole.splitlines():
                        say(prefix + line)
        if not any(left.values()):
            return
        time.sleep(1)


def last_word(job: submitit.Job[None]) -> str:
    """What SLURM's accounting says of a job that has ended; empty where there is none. It lags, and is only a hint."""
    if shutil.which("sacct") is None:
        return ""
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=State", f"--jobs={job.job_id}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _executor(request: Request) -> Any:
    folder = FOLDER.absolute() / "%j"
    if request.executor == "local":
        local = submitit.LocalExecutor(folder, max_num_timeout=1000)
        local.update_parameters(
            timeout_min=request.minutes,
            signal_delay_s=SIGNAL_SECONDS,
            gpus_per_node=request.gpus_per_node or 0,
            stderr_to_stdout=True,
        )
        return local
    if shutil.which("srun") is None or shutil.which("sbatch") is None:
        raise InvalidInput("--slurm: cannot be used: srun and sbatch are not on PATH; --local runs on this machine")
    executor = submitit.SlurmExecutor(folder, max_num_timeout=1000)
    asked = {"gpus_per_node": request.gpus_per_node or None, "cpus_per_task": request.cpus_per_node}
    executor.update_parameters(
        job_name="dwf",
        nodes=request.nodes,
        time=request.minutes,
        signal_delay_s=SIGNAL_SECONDS,
        stderr_to_stdout=True,
        use_srun=False,  # the allocation starts its processes itself
        array_parallelism=request.throttle or 1000,
        additional_parameters={"requeue": True, **request.options},
        **{name: value for name, value in asked.items() if value is not None},
    )
    return executor


def _refuse_what_sbatch_refuses(script: str) -> None:
    tried = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    if tried.returncode:
        raise InvalidInput(f"--slurm: {tried.stderr.strip().splitlines()[-1]}")


def _record(run: Run) -> Path:
    return FOLDER / f"{run.folder}.json"


def _running(run: Run, executor: Any) -> submitit.Job[None] | None:
    """The job of an earlier submission, if it is still in the queue."""
    try:
        number = json.loads(_record(run).read_text())["job"]
    except (OSError, ValueError, KeyError):
        return None
    if not isinstance(executor, submitit.SlurmExecutor) or not re.fullmatch(r"\d+(_\d+)?", number):
        return None
    job: submitit.Job[None] = submitit.SlurmJob(executor.folder, number)
    return job if _state(job, "slurm") else None


def _state(job: submitit.Job[None], executor: str) -> str:
    """State of a job that is in the queue, with the reason for one that waits; empty if it is not."""
    if executor == "local":
        return "RUNNING" if job.state == "RUNNING" else ""
    command = ["squeue", "--noheader", f"--jobs={job.job_id}", "--format=%T %r"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode and "Invalid job id" not in found.stderr:
        return "UNKNOWN"  # SLURM does not answer just now
    state, _, reason = found.stdout.strip().partition(" ")
    return f"{state} ({reason})" if reason not in ("", "None") else state
