"""Whatever is killed, whenever: the job is begun again until it is done, and its numbers are those of a quiet run."""

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

from .conftest import ARGUMENTS, assert_same, store_of
from .process import Launch, launch_on_machine

VICTIMS = ("driver", "checkpoint write", "worker", "table write", "raylet", "whole tree")
MORE_VICTIMS = (*VICTIMS, "low memory", "stopped owner")
THREE_WORKERS = [*ARGUMENTS, "--cpus", "3", "--joint-workers", "3"]


class Chaos:
    """A run that is started again and again, and killed at random instants in between."""

    def __init__(self, folder: Path, arguments: list[str], chance: random.Random, victims: list[str]) -> None:
        self.folder, self.arguments, self.random, self.victims = folder, arguments, chance, victims
        self.killed: list[str] = []
        self.starts = 0

    def run(self) -> None:
        """Kill one victim after the other, until the job is done; then let the run end."""
        with open(self.folder / "log", "wb") as log:
            while True:
                self.starts += 1
                assert self.starts < 100, self.log
                command = [sys.executable, "-m", "dwf_cluster.launch", *self.arguments]
                # Any machine uses more, so Ray kills every worker.
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
        """What all starts have printed."""
        return (self.folder / "log").read_text()

    def _kill(self, victim: str) -> bool:
        """Wait for the instant, then kill; returns whether it came before the driver's end."""
        if victim.endswith("write"):
            return self._kill_in_the_middle_of(f"{victim.partition(' ')[0]}")
        if victim == "low memory":
            return bool(self._driver.wait() == 1)
        if victim == "stopped owner":
            return self._take_over()
        at = time.monotonic() + self.random.uniform(1, 10)
        find: dict[str, Callable[[], list[psutil.Process]]] = {
            "driver": lambda: [self._driver],
            "worker": lambda: self._one("ray::"),
            "raylet": lambda: self._one("raylet"),
            "whole tree": self._tree,
        }
        while self._driver.poll() is None:
            if time.monotonic() > at and (found := find[victim]()):
                return bool(_send(found))
            time.sleep(0.01)  # there is no event: the instant is drawn
        return False

    def _take_over(self) -> bool:
        """Stop all processes at a drawn instant, have another machine take over and finish, and continue them.

        Returns whether the stopped run owned the experiment and has noticed its loss.
        """
        at = time.monotonic() + self.random.uniform(5, 15)
        while self._driver.poll() is None and time.monotonic() < at:
            time.sleep(0.01)  # there is no event: the instant is drawn
        stopped = self._tree()
        _send(stopped, signal.SIGSTOP)
        before = len(self._locks())
        with open(self.folder / "second", "wb") as log:
            second = subprocess.Popen(
                launch_on_machine("second", self.arguments, impatient=True), cwd=self.folder, stdout=log, stderr=log
            )
            while second.poll() is None and len(self._locks()) == before:
                time.sleep(0.01)  # nothing tells of another process's file
            _send(stopped, signal.SIGCONT)
            assert second.wait() == 0, (self.folder / "second").read_text()
        return before > 0 and self._driver.wait() == 1

    def _locks(self) -> list[str]:
        return glob(f"{self.folder}/runs/*/lease/*.json")

    def _kill_in_the_middle_of(self, kind: str) -> bool:
        """The writer's process is in the name of the unfinished file: it is held, then all are killed."""
        pattern = {"checkpoint": ".run-*/checkpoints-*.unfinished", "table": ".run-*/results-*.unfinished"}[kind]
        skipped = self.random.randrange(6)
        while self._driver.poll() is None:
            time.sleep(0.001)  # nothing tells of another process's unfinished file
            for name in glob(f"{self.folder}/runs/*/{pattern}"):  # pathlib's stumbles over folders that vanish
                path, found = Path(name), re.search(r"\.(\d+)-\w+\.unfinished$", name)
                assert found is not None
                writer = [process for process in self._tree() if process.pid == int(found[1])]
                if not _send(writer, signal.SIGSTOP):
                    continue
                if path.exists() and (skipped := skipped - 1) < 0:
                    _send(self._tree())
                    assert path.exists()
                    return True
                _send(writer, signal.SIGCONT)
        return False

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._driver, *self._driver.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _one(self, title: str) -> list[psutil.Process]:
        found = []
        for process in self._tree()[1:]:
            try:
                name = process.cmdline()[0]
            except (psutil.Error, IndexError):  # it has ended since
                continue
            if name.startswith(title) or name.endswith(f"/{title}"):
                found.append(process)
        return [self.random.choice(found)] if found else []


def _send(processes: list[psutil.Process], signum: signal.Signals = signal.SIGKILL) -> int:
    """Send a signal; returns how many processes got it."""
    sent = 0
    for process in processes:
        try:
            process.send_signal(signum)
        except psutil.NoSuchProcess:
            continue
        sent += 1
    return sent


@pytest.mark.parametrize(
    ("kills", "kinds", "setups"),
    [
        pytest.param(8, VICTIMS, [ARGUMENTS], marks=pytest.mark.interruptions),
        pytest.param(50, MORE_VICTIMS, [ARGUMENTS, THREE_WORKERS], marks=pytest.mark.soak),
    ],
    ids=["8", "50"],
)
def test_no_kill_changes_a_number(
    kills: int,
    kinds: tuple[str, ...],
    setups: list[list[str]],
    reference_run: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    """Prints what it did; `DWF_CHAOS_SEED` draws the same instants again.

    Args:
        kills: how many, of all kinds in turn.
        kinds: of victims.
        setups: the arguments of one job after the other, in turn.
        reference_run: the first setup's run.
        tmp_path: where the jobs' folders are.
    """
    seed = int(os.environ.get("DWF_CHAOS_SEED", time.time_ns() % 10**6))
    print(f"\nDWF_CHAOS_SEED={seed}")
    chance = random.Random(seed)
    quiet = [reference_run[0], *(_quiet(tmp_path / f"quiet-{n}", setups[n]) for n in range(1, len(setups)))]
    victims = (list(kinds) * kills)[:kills]
    killed: Counter[str] = Counter()
    rounds = starts = 0
    unhindered = 0.0
    began = time.monotonic()
    while victims:  # one job after the other, until all are killed
        folder = tmp_path / str(rounds)
        folder.mkdir()
        setup = rounds % len(setups)
        chaos = Chaos(folder, setups[setup], chance, victims)
        chaos.run()
        (results,) = (folder / "runs").iterdir()
        assert_same(results, quiet[setup])
        assert not list(results.rglob("*.unfinished"))
        assert "Traceback" not in chaos.log, chaos.log
        status = Status.read(store_of(quiet[setup]))
        assert status is not None
        unhindered += status.seconds
        killed.update(chaos.killed)
        rounds, starts = rounds + 1, starts + chaos.starts
    lost = (time.monotonic() - began - unhindered) / kills
    survived = ", ".join(f"{count} {victim}" for victim, count in killed.items())
    print(
        f"{kills} kills survived ({survived}) in {rounds} jobs, {starts - rounds} restarts, "
        f"{lost:.1f} s lost per kill (a quiet job takes {unhindered / rounds:.0f} s), 0 differences, 0 tracebacks"
    )
    assert killed.total() == kills


def _quiet(folder: Path, arguments: list[str]) -> Path:
    """The experiment's folder of a run that nothing disturbs."""
    folder.mkdir()
    result = Launch(folder)(*arguments)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])
