"""Commands as a user runs them, in processes of their own, and what can be done to those processes."""

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
        """Run to the end."""
        return subprocess.run(
            self._command(arguments), cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    def until(
        self,
        line: str,
        then: Callable[[psutil.Process, str], None],
        *arguments: str | os.PathLike[str],
        rest: list[str] | None = None,
    ) -> tuple[int, str]:
        """Run until a line of the output matches, do something, read on; returns the exit status and stderr.

        `rest` is given the lines that follow.
        """
        code, errors, lines = self.along([(line, then)], *arguments)
        met = next(number for number, printed in enumerate(lines) if re.search(line, printed))
        (rest if rest is not None else []).extend(lines[met + 1 :])
        return code, errors

    def along(
        self, steps: Sequence[tuple[str, Callable[[psutil.Process, str], None]]], *arguments: str | os.PathLike[str]
    ) -> tuple[int, str, list[str]]:
        """Run to the end, and do each step at the first line that matches it, one after the other.

        Returns the exit status, stderr, and the lines of stdout.
        """
        left, lines = list(steps), list[str]()
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
                if left and re.search(left[0][0], printed):
                    left.pop(0)[1](psutil.Process(process.pid), printed)
            errors = process.stderr.read()
            assert not left, f"no line matched {left[0][0]!r}: {errors}"
            return process.wait(), errors, lines


def pause_after_first_epoch(folder: Path, job: str) -> psutil.Process:
    """Stop a process of a job, as soon as its training's first epoch is saved: what is to meet it there may be slow.

    To be called before the job begins: the run's output tells of an epoch up to a second after its end.
    """

    def is_it(process: psutil.Process) -> bool:
        try:  # another run on this machine may have a job of that name
            return re.match(rf"ray::(\S+ )?{job}", command_line(process)) is not None and folder.samefile(process.cwd())
        except (psutil.Error, OSError):  # it has ended
            return False

    saved = f"runs/*/checkpoints/{job.rsplit(maxsplit=1)[-1]}/epoch-00001/manifest.json"
    deadline, process = time.monotonic() + PATIENCE, None
    while True:
        if process is None or not is_it(process):
            process = next(filter(is_it, psutil.process_iter()), None)
        if process is not None and any(folder.glob(saved)):
            process.suspend()
            return process
        assert time.monotonic() < deadline, f"no {job} to be held"
        time.sleep(0.01)  # nobody tells of another process's file


def resume_and_stop(training: psutil.Process) -> None:
    """Let a held training go on, so that it meets its run's wish to stop."""
    time.sleep(2)  # until the wish has got there: less than a quarter of that, and nothing tells of it
    training.resume()


def wait_for_answer(request: urllib.request.Request | str) -> str:
    """What a service answers to a request. One that is starting, or busy, may refuse the first connections."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                text: str = response.read().decode()
                return text
        except urllib.error.HTTPError as error:
            if error.code < 500 or time.monotonic() > deadline:
                raise
        except OSError:  # refused, reset, timed out
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)  # a service does not tell when it is ready


def launch_on_machine(name: str, arguments: Sequence[str], impatient: bool = False) -> list[str]:
    """A launch on a machine of another name.

    Args:
        name: its host name.
        arguments: of the launch.
        impatient: whether another machine's silence of two seconds seems long to it: not two waits of a minute.
    """
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    patience = "from dwf_cluster.store import lease; lock.SILENCE, lock.HEARTBEAT = 2, 1; " if impatient else ""
    program = f"{patience}import sys; from dwf_cluster.launch import main; sys.exit(main(sys.argv[1:]))"
    rename = ["sh", "-c", 'hostname "$0" && exec "$@"', name]
    return ["unshare", *root, "--uts", *rename, sys.executable, "-c", program, *arguments]


def command_line(process: psutil.Process) -> str:
    """A process's command line; empty if it has ended."""
    try:
        return " ".join(process.cmdline()).strip()  # Ray pads the title that it sets
    except psutil.Error:
        return ""
