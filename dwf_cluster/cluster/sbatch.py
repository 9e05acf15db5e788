"""Submit jobs to SLURM from the login node, through submitit, and follow them until they have ended.

submitit writes the batch script and stores what the job runs; `allocation.py` runs it. With submitit's local executor
the jobs are processes on this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import submitit
from submitit.helpers import DelayedSubmission

from dwf_cluster.cluster import environment
from dwf_cluster.settings import InvalidInput

FOLDER = Path("slurm-jobs")
"""Batch scripts, logs, and the job number of each experiment; in the folder that the jobs are submitted from."""

SIGNAL_SECONDS = 120
"""How long before the time limit SLURM sends a job a signal; as in `slurm/full_pipeline.sh`."""

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 60.0
"""Seconds between two calls of squeue: at first, and after each change of a job's state; and at most."""

_FOLLOWS = "the job's log is read from there"
_REQUEUED = "a job whose time is over is requeued and resumes"
_ONE_TASK = "a job has one task on each node"
RESERVED = {
    "array": "several seeds are one array; --throttle limits how many run at once",
    "chdir": "a job runs in the folder that it is submitted from",
    "clusters": "jobs are followed on this cluster only",
    "cpus-per-task": "use --cpus-per-node",
    "error": _FOLLOWS,
    "gpus-per-node": "use --gpus-per-node",
    "job-name": "it is dwf",
    "no-kill": _REQUEUED,
    "no-requeue": _REQUEUED,
    "nodes": "use --nodes",
    "ntasks": _ONE_TASK,
    "ntasks-per-core": _ONE_TASK,
    "ntasks-per-gpu": _ONE_TASK,
    "ntasks-per-node": _ONE_TASK,
    "ntasks-per-socket": _ONE_TASK,
    "open-mode": _FOLLOWS,
    "output": _FOLLOWS,
    "parsable": "sbatch's answer is read",
    "quiet": "sbatch's answer is read",
    "requeue": _REQUEUED,
    "signal": f"trainings are signalled to save {SIGNAL_SECONDS} s before the time is over",
    "tasks-per-node": _ONE_TASK,
    "test-only": "use --dry-run",
    "time": "use --time",
    "wait": "jobs are always followed",
    "wrap": "the command of a job is fixed",
}
"""Options of sbatch that `--sbatch` cannot set, because jobs rely on them; and what to use instead, or the reason."""


@dataclass(frozen=True)
class SlurmOptions:
    """Options of the jobs.

    Attributes:
        nodes: number of nodes of each job.
        gpus_per_node, cpus_per_node: numbers on each node; None: the site's default.
        minutes: time limit of one run of the job; a requeued job gets it again.
        options: further options of sbatch, by their long names.
        throttle: number of jobs of an array that run at once; None: all.
        executor: `slurm`, or `local` for processes on this machine.

    Raises:
        InvalidInput: for an option that is `RESERVED`.
    """

    nodes: int
    gpus_per_node: int | None
    cpus_per_node: int | None
    minutes: int
    options: Mapping[str, str]
    throttle: int | None
    executor: str

    def __post_init__(self) -> None:
        for option in self.options:
            # sbatch accepts unambiguous prefixes of a name. Of these, only "gpus" is an option of its own.
            prefixed = (name for name in RESERVED if name.startswith(option) and option != "gpus")
            if name := next(iter([*({option} & set(RESERVED)), *prefixed]), None):
                raise InvalidInput(f"--sbatch: {option!r} cannot be used: {RESERVED[name]}")


@dataclass(frozen=True)
class SlurmJob:
    """One experiment's job: submitit stores this object, and calls it each time that the job starts.

    Attributes:
        folder: name of the experiment's folder.
        arguments: of `dwf_cluster.launch`, without the choice of where to run.
        resume_command: resumes the experiment; for people.
    """

    folder: str
    arguments: tuple[str, ...]
    resume_command: str

    def __call__(self) -> None:
        """Run the experiment to its end.

        Raises:
            RuntimeError: if the run failed.
            SystemExit: if the job was requeued.
        """
        status = self._on_this_machine() if submitit.JobEnvironment().cluster == "local" else self._in_allocation()
        if status:
            raise RuntimeError(f"exit status {status}; resume: {self.resume_command}")

    def checkpoint(self) -> DelayedSubmission:
        """The requeued job: this one, since finished work is in the store."""
        return DelayedSubmission(self)

    def _in_allocation(self) -> int:
        from dwf_cluster.cluster.allocation import REQUEUE, run

        status = run(self.arguments, self.resume_command)
        if status == REQUEUE:
            sys.exit(status)  # without a result file: with one, submitit would take the job for ended
        return status

    def _on_this_machine(self) -> int:
        requeue = signal.getsignal(signal.SIGUSR2)  # submitit's own
        driver = subprocess.Popen([sys.executable, "-m", "dwf_cluster.launch", "--local", *self.arguments])
        status, is_requeued = environment.wait_for_driver(driver)
        if is_requeued and callable(requeue):
            requeue(signal.SIGUSR2, None)
        return status


def script(jobs: Sequence[SlurmJob], request: SlurmOptions) -> str:
    """The batch script that `submit` would hand to sbatch."""
    executor = _executor(request)
    if not isinstance(executor, submitit.SlurmExecutor):
        raise InvalidInput("--executor: local has no sbatch script")
    if len(jobs) > 1:
        executor.parameters["map_count"] = len(jobs)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit(
    jobs: Sequence[SlurmJob], request: SlurmOptions, print_line: Callable[[str], None]
) -> dict[SlurmJob, submitit.Job[None]]:
    """Submit the jobs that are not in the queue yet, several as one array; returns submitit's handle of each job.

    Raises:
        InvalidInput: if SLURM refuses the jobs, or they could not run or write their logs.
    """
    executor = _executor(request)
    try:
        FOLDER.mkdir(mode=0o700, exist_ok=True)
        FOLDER.chmod(0o700)  # other users must not read scripts, arguments and logs
    except OSError as error:
        raise InvalidInput(f"--slurm: {str(FOLDER.absolute())!r} cannot be made: {error.strerror}") from None
    queued = _queued(jobs, request.executor, executor.folder)
    for job, handle in queued.items():
        print_line(f"{job.folder}: job {handle.job_id} is already in the queue")
    new = [job for job in jobs if job not in queued]
    if new and request.executor == "slurm":
        _test_with_sbatch(script(new, request))
    with executor.batch() if len(new) > 1 else nullcontext():
        submitted = {job: executor.submit(job) for job in new}
    for job, handle in submitted.items():
        _number_file(job).write_text(json.dumps({"job": handle.job_id}))
        print_line(f"{job.folder}: job {handle.job_id} submitted")
    return queued | submitted


def follow(
    handles: Mapping[SlurmJob, submitit.Job[None]],
    request: SlurmOptions,
    print_line: Callable[[str], None],
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Print the jobs' logs and the changes of their states, until no job is in the queue any more.

    The logs are read once a second. squeue is called once for all jobs, and seldom: when a job's log or result appears,
    and after pauses that grow from `FIRST_PAUSE` to `LONGEST_PAUSE`.

    Args:
        handles: submitit's handle of each job.
        request: the options that the jobs were submitted with.
        print_line: is called with each line.
        wait: waits for a number of seconds.
    """
    read = dict.fromkeys(handles, 0)
    states = dict.fromkeys(handles, "")
    queued = dict(handles)
    begun: set[SlurmJob] = set()
    pause, remaining = FIRST_PAUSE, 0.0
    while True:
        # A job that has a result has ended: submitit writes it last.
        ended = {job for job, handle in queued.items() if handle.paths.result_pickle.exists()}
        logging = {job for job, handle in queued.items() if handle.paths.stdout.exists()}
        queued = {job: handle for job, handle in queued.items() if job not in ended}
        if queued and (request.executor == "local" or remaining <= 0 or ended or logging - begun):
            current = _states(queued, request.executor)
            queued = {job: handle for job, handle in queued.items() if current[job]}
            changed = {job: state for job, state in current.items() if state and state != states[job]}
            for job, state in changed.items():
                print_line(f"{_prefix(job, handles)}job {handles[job].job_id}: {state}")
            states |= current
            pause = FIRST_PAUSE if changed else min(LONGEST_PAUSE, pause * 1.5)
            remaining = pause
        begun |= logging
        for job, handle in handles.items():
            prefix, is_complete = _prefix(job, handles), job not in queued
            read[job] += _print_log(handle.paths.stdout, read[job], is_complete, prefix, print_line)
        if not queued:
            return
        wait(1)
        remaining -= 1


def _prefix(job: SlurmJob, handles: Mapping[SlurmJob, submitit.Job[None]]) -> str:
    return f"{job.folder}: " if len(handles) > 1 else ""


def _print_log(log: Path, start: int, is_complete: bool, prefix: str, print_line: Callable[[str], None]) -> int:
    """Print a log's lines from byte `start` on; returns the number of bytes printed.

    A last line without a line break is printed when the log is complete.
    """
    try:
        with open(log, "rb") as file:
            file.seek(start)
            text = file.read()
    except FileNotFoundError:  # the job has not begun
        return 0
    if not is_complete:
        text = text[: text.rfind(b"\n") + 1]
    for line in text.decode(errors="replace").splitlines():
        print_line(prefix + line)
    return len(text)


def sacct_states(handles: Iterable[submitit.Job[None]]) -> dict[str, str]:
    """The states of jobs that have ended, by job number, from SLURM's accounting.

    Empty where there is no accounting. Accounting lags behind, so the states are only hints.
    """
    numbers = ",".join(handle.job_id for handle in handles)
    if shutil.which("sacct") is None or not numbers:
        return {}
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={numbers}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return {number: state for number, separator, state in (line.partition("|") for line in lines) if separator}


def _executor(request: SlurmOptions) -> Any:
    if re.search(r"[\x00-\x1f\x7f%\\]", str(FOLDER.absolute())):  # sbatch would interpret them
        raise InvalidInput(
            f"--slurm: cannot be used in the folder {str(Path.cwd())!r}: "
            "allowed is a path without line breaks and other control characters, % and \\"
        )
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
    python = os.environ.get("DWF_PYTHON")
    if python is not None and shutil.which(python) is None:
        raise InvalidInput(f"DWF_PYTHON: {python!r} cannot be used: allowed is a command that can be run")
    executor = submitit.SlurmExecutor(folder, max_num_timeout=1000)
    numbers = {"gpus_per_node": request.gpus_per_node or None, "cpus_per_task": request.cpus_per_node}
    executor.update_parameters(
        job_name="dwf",
        nodes=request.nodes,
        time=request.minutes,
        signal_delay_s=SIGNAL_SECONDS,
        stderr_to_stdout=True,
        use_srun=False,  # the allocation starts its processes itself
        array_parallelism=request.throttle or 1000,
        additional_parameters={"requeue": True, **request.options},
        **{name: value for name, value in numbers.items() if value is not None},
    )
    return executor


def _test_with_sbatch(script: str) -> None:
    """Check a batch script with `sbatch --test-only`.

    Raises:
        InvalidInput: if sbatch refuses it.
    """
    answer = subprocess.run(["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False)
    if answer.returncode:
        *_, reason = ["sbatch refuses the job", *answer.stderr.strip().splitlines()]
        raise InvalidInput(f"--slurm: {reason}")


def _number_file(job: SlurmJob) -> Path:
    return FOLDER / f"{job.folder}.json"


def _queued(jobs: Sequence[SlurmJob], executor: str, folder: Path) -> dict[SlurmJob, submitit.Job[None]]:
    """The jobs that were submitted earlier and are still in the queue, with their handles."""
    handles: dict[SlurmJob, submitit.Job[None]] = {}
    for job in jobs if executor == "slurm" else ():
        try:
            number = json.loads(_number_file(job).read_text())["job"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(number, str) and re.fullmatch(r"\d+(_\d+)?", number):
            handles[job] = submitit.SlurmJob(folder, number)
    states = _states(handles, executor) if handles else {}
    return {job: handle for job, handle in handles.items() if states[job] and not handle.paths.result_pickle.exists()}


def _states(handles: Mapping[SlurmJob, submitit.Job[None]], executor: str) -> dict[SlurmJob, str]:
    """The state of each job, with the reason if it is pending; empty for a job that is not in the queue."""
    if executor == "local":
        return {job: "RUNNING" if handle.state == "RUNNING" else "" for job, handle in handles.items()}
    numbers = ",".join(sorted({handle.job_id.partition("_")[0] for handle in handles.values()}))
    command = ["squeue", "--noheader", "--array", f"--jobs={numbers}", "--format=%i|%T|%r"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return dict.fromkeys(handles, "UNKNOWN")  # SLURM does not answer at the moment
    states = {}
    for line in answer.stdout.splitlines():
        number, state, reason = f"{line.strip()}||".split("|")[:3]
        states[number] = f"{state} ({reason})" if reason not in ("", "None") else state
    return {job: states.get(handle.job_id, "") for job, handle in handles.items()}
