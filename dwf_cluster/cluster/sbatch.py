"""Submit jobs to SLURM through submitit, from the login node, and follow them until they have ended.

submitit writes the batch script and stores what the job runs; `allocation.py` runs it. With submitit's local executor
the jobs are processes of this machine.
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

from dwf_cluster.settings import InvalidInput

FOLDER = Path("slurm-jobs")
"""Batch scripts, logs, and which job runs which experiment; in the folder that the jobs are submitted from."""

SIGNAL_SECONDS = 120
"""How long before the end of its time SLURM signals a job; as in `slurm/full_pipeline.sh`."""

FIRST_PAUSE, LONGEST_PAUSE = 10.0, 60.0
"""Seconds between two calls of squeue: at first and after each change of a job's state; at most."""

_FOLLOWS = "the job's log is followed there"
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
    "signal": f"trainings are told to save {SIGNAL_SECONDS} s before the time is over",
    "tasks-per-node": _ONE_TASK,
    "test-only": "use --dry-run",
    "time": "use --time",
    "wait": "jobs are followed anyway",
    "wrap": "what a job runs is fixed",
}
"""Options of sbatch that jobs rely on, so that `--sbatch` cannot set them, and what to use instead or why."""


@dataclass(frozen=True)
class SlurmOptions:
    """What to ask SLURM for.

    Attributes:
        nodes: number of nodes of each job.
        gpus_per_node, cpus_per_node: number of each; None: the site's default.
        minutes: time limit of one life of the job; the next life resumes it.
        options: further options of sbatch, by their long names.
        throttle: number of jobs of an array that run at once; None: all.
        executor: `slurm`, or `local` for processes of this machine.

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
            # sbatch takes any beginning of a name that fits no other; of these, only "gpus" is an option of its own.
            beginning = (name for name in RESERVED if name.startswith(option) and option != "gpus")
            if name := next(iter([*({option} & set(RESERVED)), *beginning]), None):
                raise InvalidInput(f"--sbatch: {option!r} cannot be used: {RESERVED[name]}")


@dataclass(frozen=True)
class SlurmJob:
    """One experiment's job: what submitit stores, and calls in each life of the job.

    Attributes:
        folder: name of the experiment's folder.
        arguments: of `dwf_cluster.launch`, without the choice of where to run.
        again: the command that resumes the experiment, for people.
    """

    folder: str
    arguments: tuple[str, ...]
    again: str

    def __call__(self) -> None:
        """SlurmJob to the end.

        Raises:
            RuntimeError: if the run failed.
            SystemExit: if the job's next life is to resume it.
        """
        status = self._here() if submitit.JobEnvironment().cluster == "local" else self._in_allocation()
        if status:
            raise RuntimeError(f"exit status {status}; resume: {self.again}")

    def checkpoint(self) -> DelayedSubmission:
        """What the next life runs: the same. The store has what is done."""
        return DelayedSubmission(self)

    def _in_allocation(self) -> int:
        from dwf_cluster.cluster.allocation import REQUEUE, run

        status = run(self.arguments, self.again)
        if status == REQUEUE:
            sys.exit(status)  # without a result, which submitit would take for the end
        return status

    def _here(self) -> int:
        process = subprocess.Popen([sys.executable, "-m", "dwf_cluster.launch", "--local", *self.arguments])
        requeue, signals = signal.getsignal(signal.SIGUSR2), list[int]()

        def on_warning(signum: int, frame: object) -> None:
            signals.append(signum)
            process.send_signal(signal.SIGINT)

        signal.signal(signal.SIGUSR2, on_warning)
        status = process.wait()
        if signals and status == 130:
            assert callable(requeue)
            requeue(signal.SIGUSR2, None)  # submitit's own, once the run has stopped
        return status


def script(runs: Sequence[SlurmJob], request: SlurmOptions) -> str:
    """The batch script that `submit` would hand to sbatch."""
    executor = _executor(request)
    if not isinstance(executor, submitit.SlurmExecutor):
        raise InvalidInput("--executor: local has no sbatch script")
    if len(runs) > 1:
        executor.parameters["map_count"] = len(runs)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


def submit(
    runs: Sequence[SlurmJob], request: SlurmOptions, say: Callable[[str], None]
) -> dict[SlurmJob, submitit.Job[None]]:
    """Submit the runs that are not in the queue yet, several as one array; returns each run's job.

    Raises:
        InvalidInput: if SLURM refuses the job, or the jobs could not run or write their logs.
    """
    executor = _executor(request)
    try:
        FOLDER.mkdir(mode=0o700, exist_ok=True)
        FOLDER.chmod(0o700)  # scripts, arguments and logs are nobody else's business
    except OSError as error:
        raise InvalidInput(f"--slurm: {str(FOLDER.absolute())!r} cannot be made: {error.strerror}") from None
    jobs = _queued(runs, request.executor, executor.folder)
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


def follow(
    jobs: Mapping[SlurmJob, submitit.Job[None]],
    request: SlurmOptions,
    say: Callable[[str], None],
    wait: Callable[[float], object] = time.sleep,
) -> None:
    """Pass on the jobs' logs and changes of their states, until none of the jobs is in the queue any more.

    Logs are read once a second. SLURM is asked once for all jobs, and seldom: when a job's log or result appears, and
    after pauses that grow from `FIRST_PAUSE` to `LONGEST_PAUSE`.

    Args:
        jobs: the jobs to follow.
        request: how they were submitted.
        say: is given each line.
        wait: waits so many seconds.
    """
    read = dict.fromkeys(jobs, 0)
    states = dict.fromkeys(jobs, "")
    queued = dict(jobs)
    begun: set[SlurmJob] = set()
    pause, due = FIRST_PAUSE, 0.0
    while True:
        # A job that has a result has ended: submitit writes it last.
        ended = {run for run, job in queued.items() if job.paths.result_pickle.exists()}
        logging = {run for run, job in queued.items() if job.paths.stdout.exists()}
        queued = {run: job for run, job in queued.items() if run not in ended}
        if queued and (request.executor == "local" or due <= 0 or ended or logging - begun):
            found = _states(queued, request.executor)
            queued = {run: job for run, job in queued.items() if found[run]}
            changed = {run: state for run, state in found.items() if state and state != states[run]}
            for run, state in changed.items():
                say(f"{_prefix(run, jobs)}job {jobs[run].job_id}: {state}")
            states |= found
            pause = FIRST_PAUSE if changed else min(LONGEST_PAUSE, pause * 1.5)
            due = pause
        begun |= logging
        for run, job in jobs.items():
            read[run] += _pass_on(job.paths.stdout, read[run], run not in queued, _prefix(run, jobs), say)
        if not queued:
            return
        wait(1)
        due -= 1


def _prefix(run: SlurmJob, jobs: Mapping[SlurmJob, submitit.Job[None]]) -> str:
    return f"{run.folder}: " if len(jobs) > 1 else ""


def _pass_on(log: Path, start: int, is_complete: bool, prefix: str, say: Callable[[str], None]) -> int:
    """Pass on a log's lines from that byte on; returns the number of bytes passed on.

    A last line without its end waits until the log is complete.
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
        say(prefix + line)
    return len(text)


def sacct_states(jobs: Iterable[submitit.Job[None]]) -> dict[str, str]:
    """The states of jobs that have ended, by job number, from SLURM's accounting.

    Empty where there is no accounting. It lags, so the states are only hints.
    """
    numbers = ",".join(job.job_id for job in jobs)
    if shutil.which("sacct") is None or not numbers:
        return {}
    command = ["sacct", "--noheader", "--allocations", "--parsable2", "--format=JobID,State", f"--jobs={numbers}"]
    lines = subprocess.run(command, capture_output=True, text=True, check=False).stdout.splitlines()
    return {number: state for number, separator, state in (line.partition("|") for line in lines) if separator}


def _executor(request: SlurmOptions) -> Any:
    if re.search(r"[\x00-\x1f\x7f%\\]", str(FOLDER.absolute())):  # sbatch would read them
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
        *_, reason = ["sbatch refuses the job", *tried.stderr.strip().splitlines()]
        raise InvalidInput(f"--slurm: {reason}")


def _record(run: SlurmJob) -> Path:
    return FOLDER / f"{run.folder}.json"


def _queued(runs: Sequence[SlurmJob], executor: str, folder: Path) -> dict[SlurmJob, submitit.Job[None]]:
    """The jobs of earlier submissions that are still in the queue."""
    jobs: dict[SlurmJob, submitit.Job[None]] = {}
    for run in runs if executor == "slurm" else ():
        try:
            number = json.loads(_record(run).read_text())["job"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(number, str) and re.fullmatch(r"\d+(_\d+)?", number):
            jobs[run] = submitit.SlurmJob(folder, number)
    states = _states(jobs, executor) if jobs else {}
    return {run: job for run, job in jobs.items() if states[run] and not job.paths.result_pickle.exists()}


def _states(jobs: Mapping[SlurmJob, submitit.Job[None]], executor: str) -> dict[SlurmJob, str]:
    """The state of each job, with the reason for one that is pending; empty for one that is not in the queue."""
    if executor == "local":
        return {run: "RUNNING" if job.state == "RUNNING" else "" for run, job in jobs.items()}
    numbers = ",".join(sorted({job.job_id.partition("_")[0] for job in jobs.values()}))
    command = ["squeue", "--noheader", "--array", f"--jobs={numbers}", "--format=%i|%T|%r"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return dict.fromkeys(jobs, "UNKNOWN")  # SLURM does not answer just now
    states = {}
    for line in answer.stdout.splitlines():
        number, state, reason = f"{line.strip()}||".split("|")[:3]
        states[number] = f"{state} ({reason})" if reason not in ("", "None") else state
    return {run: states.get(job.job_id, "") for run, job in jobs.items()}
