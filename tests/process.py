"""Runs the commands in child processes, as a user does, and signals, pauses and finds processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from . import PATIENCE


class Launch:
    """`python -m dwf_cluster.launch` as a user runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _command(self, arguments: Sequence[str | os.PathLike[str]]) -> list[str]:
        return [sys.executable, "-m", "dwf_cluster.launch", *map(str, arguments)]

    def __call__(self, *arguments: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
        """Run until the command ends."""
        return subprocess.run(
            self._command(arguments), cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    def run_and_act_at(
        self,
        line: str,
        action: Callable[[psutil.Process, str], None],
        *arguments: str | os.PathLike[str],
        later_lines: list[str] | None = None,
    ) -> tuple[int, str]:
        """Run until the command ends; call `action` at the first line of output that matches the pattern `line`.

        Args:
            line: a regular expression.
            action: takes the command's process and the line.
            arguments: of the command.
            later_lines: extended by the lines of output after that one.

        Returns:
            The exit status and stderr.
        """
        code, errors, lines = self.run_with_steps([(line, action)], *arguments)
        matched = next(number for number, printed in enumerate(lines) if re.search(line, printed))
        (later_lines if later_lines is not None else []).extend(lines[matched + 1 :])
        return code, errors

    def run_with_steps(
        self, steps: Sequence[tuple[str, Callable[[psutil.Process, str], None]]], *arguments: str | os.PathLike[str]
    ) -> tuple[int, str, list[str]]:
        """Run until the command ends; call each step's action at the first line that matches its pattern, in order.

        A step waits for its line only after the step before has been called.

        Returns:
            The exit status, stderr, and the lines of stdout.
        """
        pending, lines = list(steps), list[str]()
        with subprocess.Popen(
            self._command(arguments),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for printed in process.stdout:
                lines.append(printed.rstrip("\n"))
                if pending and re.search(pending[0][0], printed):
                    pending.pop(0)[1](psutil.Process(process.pid), printed)
            errors = process.stderr.read()
            assert not pending, f"no line matched {pending[0][0]!r}: {errors}"
            return process.wait(), errors, lines


def pause_after_first_epoch(folder: Path, job: str) -> psutil.Process:
    """Suspend a training job's process as soon as its first epoch is saved, so that a test has time to interrupt it.

    Call it before the job begins: the run prints an epoch up to a second after the epoch has ended.
    """

    def is_job(process: psutil.Process) -> bool:
        try:  # another run on this machine may have a job of that name
            return re.match(rf"ray::(\S+ )?{job}", command_line(process)) is not None and folder.samefile(process.cwd())
        except (psutil.Error, OSError):  # the process has ended
            return False

    saved = f"runs/*/checkpoints/{job.rsplit(maxsplit=1)[-1]}/epoch-00001/manifest.json"
    deadline, process = time.monotonic() + PATIENCE, None
    while True:
        if process is None or not is_job(process):
            process = next(filter(is_job, psutil.process_iter()), None)
        if process is not None and any(folder.glob(saved)):
            process.suspend()
            return process
        assert time.monotonic() < deadline, f"no process of {job} has saved its first epoch"
        time.sleep(0.01)  # there is no event for files of another process


def resume_and_stop(training: psutil.Process) -> None:
    """Resume a suspended training after its run has been asked to stop, so that it stops at its next step."""
    time.sleep(2)  # there is no event for its arrival at the training, which takes less than half a second
    training.resume()


def wait_for_answer(request: urllib.request.Request | str) -> str:
    """The body of a service's answer. Retries while the service is starting or busy."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                text: str = response.read().decode()
                return text
        except urllib.error.HTTPError as error:
            if error.code < 500 or time.monotonic() > deadline:
                raise
        except OSError:  # connection refused or reset, or timed out
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)  # there is no event for a service that is ready


def launch_on_machine(name: str, arguments: Sequence[str], impatient: bool = False) -> list[str]:
    """The command line of a launch in a UTS namespace of its own, which looks like another machine.

    Args:
        name: the machine's host name.
        arguments: of the launch.
        impatient: whether another run is dead if it sends no heartbeat in the two seconds that this launch waits for
            one, instead of in a minute.
    """
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    shorter_timeout = (
        "from dwf_cluster.store import lock; lock.HEARTBEAT_TIMEOUT, lock.HEARTBEAT = 0, 1; " if impatient else ""
    )
    program = f"{shorter_timeout}import sys; from dwf_cluster.launch import main; sys.exit(main(sys.argv[1:]))"
    rename = ["sh", "-c", 'hostname "$0" && exec "$@"', name]
    return ["unshare", *root, "--uts", *rename, sys.executable, "-c", program, *arguments]


def command_line(process: psutil.Process) -> str:
    """A process's command line; empty if the process has ended."""
    try:
        return " ".join(process.cmdline()).strip()  # Ray pads the title that it sets
    except psutil.Error:
        return ""
