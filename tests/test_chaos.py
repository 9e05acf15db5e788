"""A run whose processes are killed at random times and restarted gives the numbers of an uninterrupted run."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from glob import glob
from pathlib import Path

import psutil
import pytest

from dwf_cluster.store.status import Status

from . import PATIENCE
from .conftest import ARGUMENTS, assert_same, store_of
from .process import Launch, launch_on_machine

VICTIMS = ("driver", "checkpoint write", "worker", "table write", "raylet", "whole tree")
MORE_VICTIMS = (*VICTIMS, "low memory", "suspended owner")
THREE_WORKERS = [*ARGUMENTS, "--cpus", "3", "--joint-workers", "3"]


class Chaos:
    """A run that is killed at random times, and restarted until it is done."""

    def __init__(self, folder: Path, arguments: list[str], chance: random.Random, victims: list[str]) -> None:
        self.folder, self.arguments, self.random, self.victims = folder, arguments, chance, victims
        self.killed: list[str] = []
        self.starts = 0

    def run(self) -> None:
        """Start the run until it ends with exit status 0; meanwhile kill one victim after the other."""
        with open(self.folder / "log", "wb") as log:
            while True:
                self.starts += 1
                assert self.starts < 100, self.log
                command = [sys.executable, "-m", "dwf_cluster.launch", *self.arguments]
                # Every machine uses more memory than this, so Ray kills every worker.
                low = {"RAY_memory_usage_threshold": "0.001"} if self.victims[:1] == ["low memory"] else {}
                self._driver = psutil.Popen(command, cwd=self.folder, stdout=log, stderr=log, env=os.environ | low)
                try:
                    while self.victims and self._kill(self.victims[0]):
                        self.killed.append(self.victims.pop(0))
                    if self._driver.wait() == 0:
                        return
                finally:
                    _send(self._tree())

    @property
    def log(self) -> str:
        """The output of all starts."""
        return (self.folder / "log").read_text()

    def _kill(self, victim: str) -> bool:
        """Wait for the right time, then kill the victim; return False if the driver ended before."""
        if victim.endswith("write"):
            return self._kill_during_write(victim.partition(" ")[0])
        if victim == "low memory":
            return bool(self._driver.wait() == 1)
        if victim == "suspended owner":
            return self._take_over()
        at = time.monotonic() + self.random.uniform(1, 10)
        find: dict[str, Callable[[], list[psutil.Process]]] = {
            "driver": lambda: [self._driver],
            "worker": lambda: self._random_process("ray::"),
            "raylet": lambda: self._random_process("raylet"),
            "whole tree": self._tree,
        }
        while self._driver.poll() is None:
            if time.monotonic() > at and (processes := find[victim]()):
                return bool(_send(processes))
            time.sleep(0.01)  # no event: the time is random
        return False

    def _take_over(self) -> bool:
        """Suspend all processes at a random time, let another machine take over and finish, and resume them.

        Returns whether the suspended run owned the experiment and has noticed that it lost the lock.
        """
        at = time.monotonic() + self.random.uniform(5, 15)
        while self._driver.poll() is None and time.monotonic() < at:
            time.sleep(0.01)  # no event: the time is random
        suspended = self._tree()
        _send(suspended, signal.SIGSTOP)
        before = len(self._locks())
        with open(self.folder / "second", "wb") as log:
            second = subprocess.Popen(
                launch_on_machine("second", self.arguments, impatient=True), cwd=self.folder, stdout=log, stderr=log
            )
            while second.poll() is None and len(self._locks()) == before:
                time.sleep(0.01)  # there is no event for files of another process
            _send(suspended, signal.SIGCONT)
            assert second.wait() == 0, (self.folder / "second").read_text()
        return before > 0 and self._driver.wait() == 1

    def _locks(self) -> list[str]:
        return glob(f"{self.folder}/runs/*/lease/*.json")

    def _kill_during_write(self, kind: str) -> bool:
        """Suspend the process that writes, whose number is in the unfinished file's name, then kill all processes."""
        pattern = {"checkpoint": ".run-*/checkpoints-*.unfinished", "table": ".run-*/results-*.unfinished"}[kind]
        skipped = self.random.randrange(6)
        while self._driver.poll() is None:
            time.sleep(0.001)  # there is no event for files of another process
            for name in glob(
                f"{self.folder}/runs/*/{pattern}"
            ):  # pathlib's glob fails if a folder is removed meanwhile
                path, match = Path(name), re.search(r"\.(\d+)-\w+\.unfinished$", name)
                assert match is not None
                writer = [process for process in self._tree() if process.pid == int(match[1])]
                if not _send(writer, signal.SIGSTOP):
                    continue
                _wait_until_suspended(writer[0])
                if path.exists() and (skipped := skipped - 1) < 0:
                    # The writer first: as soon as its parent ends, the kernel may continue it (orphaned process group).
                    _send([*writer, *self._tree()])
                    assert path.exists()
                    return True
                _send(writer, signal.SIGCONT)
        return False

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._driver, *self._driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _random_process(self, title: str) -> list[psutil.Process]:
        matches = []
        for process in self._tree()[1:]:
            try:
                name = process.cmdline()[0]
            except (psutil.Error, IndexError):  # the process has ended
                continue
            if name.startswith(title) or name.endswith(f"/{title}"):
                matches.append(process)
        return [self.random.choice(matches)] if matches else []


def _send(processes: list[psutil.Process], signum: signal.Signals = signal.SIGKILL) -> int:
    """Send a signal to processes; return how many of them exist."""
    sent = 0
    for process in processes:
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            continue
        sent += 1
    return sent


def _wait_until_suspended(process: psutil.Process) -> None:
    """Until each of its threads is suspended: one that writes may go on for a while after the signal."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            tasks = [path.read_text() for path in Path(f"/proc/{process.pid}/task").glob("*/stat")]
        except OSError:  # a thread or the process has ended
            tasks = [] if not process.is_running() else ["(ending) ?"]
        if all(task.rpartition(")")[2].split()[0] in "TZX" for task in tasks):
            return
        assert time.monotonic() < deadline, "the process is not suspended"


@pytest.mark.parametrize(
    ("kills", "kinds", "setups"),
    [
        pytest.param(len(VICTIMS), VICTIMS, [ARGUMENTS], marks=pytest.mark.interruptions),
        pytest.param(50, MORE_VICTIMS, [ARGUMENTS, THREE_WORKERS], marks=pytest.mark.soak),
    ],
    ids=["each once", "50"],
)
def test_killed_and_restarted_runs_give_the_numbers_of_an_uninterrupted_run(
    kills: int,
    kinds: tuple[str, ...],
    setups: list[list[str]],
    reference_run: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """Prints a summary. `DWF_CHAOS_SEED` repeats the same random times.

    Args:
        kills: number of kills, of all kinds in turn.
        kinds: kinds of victims.
        setups: arguments of the runs, in turn.
        reference_run: an uninterrupted run of the first setup.
        tmp_path: parent of the runs' folders.
    """
    seed = int(os.environ.get("DWF_CHAOS_SEED", time.time_ns() % 10**6))
    print(f"\nDWF_CHAOS_SEED={seed}")
    chance = random.Random(seed)
    references = [
        reference_run[0],
        *(_uninterrupted(tmp_path / f"reference-{n}", setups[n]) for n in range(1, len(setups))),
    ]
    victims = (list(kinds) * kills)[:kills]
    killed: Counter[str] = Counter()
    runs = starts = 0
    uninterrupted_seconds = 0.0
    began = time.monotonic()
    while victims:  # one run after the other, until all kills are done
        folder = tmp_path / str(runs)
        folder.mkdir()
        setup = runs % len(setups)
        chaos = Chaos(folder, setups[setup], chance, victims)
        chaos.run()
        (results,) = (folder / "runs").iterdir()
        assert_same(results, references[setup])
        assert not list(results.rglob("*.unfinished"))
        assert "Traceback" not in chaos.log, chaos.log
        status = Status.read(store_of(references[setup]))
        assert status is not None
        uninterrupted_seconds += status.seconds
        killed.update(chaos.killed)
        runs, starts = runs + 1, starts + chaos.starts
    lost = (time.monotonic() - began - uninterrupted_seconds) / kills
    survived = ", ".join(f"{count} {victim}" for victim, count in killed.items())
    print(
        f"{kills} kills survived ({survived}) in {runs} runs, {starts - runs} restarts, "
        f"{lost:.1f} s lost per kill (an uninterrupted run takes {uninterrupted_seconds / runs:.0f} s), "
        "0 differences, 0 tracebacks"
    )
    assert killed.total() == kills


def _uninterrupted(folder: Path, arguments: list[str]) -> Path:
    """The experiment's folder of an uninterrupted run."""
    folder.mkdir()
    result = Launch(folder)(*arguments)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])
