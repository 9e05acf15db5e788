"""The lock under faults: many processes take it, beat and write, and what they did is checked afterwards.

They are stopped and continued at random (SIGSTOP, SIGCONT), their clocks differ by up to an hour, and answers of the
store are lost on the way. Every process writes down what it did, with the machine's monotonic clock. Asserted is:

- no number of a lock has two owners;
- nothing that an owner has written appears after a later one's `take` has returned. On a disk that is so without
  exception; on S3 a PUT may be under way, and then the look at the locks before it must have begun before that.

`DWF_LOCK_SEED` draws the same faults again.
"""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import fsspec
import pytest

from dwf_cluster.store import LockLost, Store, lock, status
from dwf_cluster.store.lock import ExperimentLocked
from dwf_cluster.store.status import Status

from .. import PATIENCE
from ..s3 import S3

PROCESSES = 4
HEARTBEAT = 0.1
SILENCE = 0.4
"""Seconds, in place of ten and sixty."""

TAKEN, LOST, REPEATED = 14, 3, 3
"""So many locks must have been taken, lost to another process and had their answers lost before the history ends."""

DATA = "data"


def test_of_a_disk_the_history_has_one_owner_a_number_and_no_late_write(tmp_path: Path) -> None:
    history = _history(Store(str(tmp_path / "runs"), "digits-seed0-0123456789"), tmp_path)
    late = list(history.late())
    assert late == []


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = S3()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    fsspec.filesystem("s3").clear_instance_cache()
    server.start()
    yield f"s3://{server.BUCKET}/history"
    server.remove()


def test_on_s3_no_late_write_was_begun_after_another_had_taken_over(s3: str, tmp_path: Path) -> None:
    history = _history(Store(s3, "digits-seed0-0123456789"), tmp_path)
    for write, looked, acquired in history.late():
        assert looked < acquired, f"{write} looked at the locks after a later run had taken over"


@dataclass
class _History:
    """What the processes wrote down, in the order of time, and what the store has at the end."""

    events: list[dict[str, Any]]
    files: set[str]

    def late(self) -> Iterator[tuple[str, float, float]]:
        """Files that appeared after a later run had taken the lock: name, last look at the locks, time of that."""
        looked = {event["file"]: event["time"] for event in self.events if event["what"] == "looks"}
        for event in self.events:
            if event["what"] == "acquired":
                for name in self.files - set(event["files"]):
                    if int(name[:5]) < event["run"]:
                        yield name, looked[name], event["time"]


def _history(store: Store, folder: Path) -> _History:
    """Let processes go at the store until enough has happened; check the owners."""
    seed = int(os.environ.get("DWF_LOCK_SEED", time.time_ns() % 10**6))
    print(f"\nDWF_LOCK_SEED={seed}")
    chance = random.Random(seed)
    context = multiprocessing.get_context("spawn")
    over = context.Event()
    logs = [folder / f"{number}.jsonl" for number in range(PROCESSES)]
    processes = [context.Process(target=_process, args=(store, log, seed + i, over)) for i, log in enumerate(logs)]
    for log, process in zip(logs, processes, strict=True):
        log.touch()
        process.start()
    deadline, events = time.monotonic() + PATIENCE, list[dict[str, Any]]()
    try:
        counts: Counter[str] = Counter()
        while counts["acquired"] < TAKEN or counts["lost"] < LOST or counts["repeats"] < REPEATED:
            assert time.monotonic() < deadline, f"not enough has happened: {counts}"
            assert all(process.is_alive() for process in processes)
            victim = chance.choice(processes)
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGSTOP)
            time.sleep(chance.uniform(0.1, 6 * SILENCE))  # the fault is drawn
            os.kill(victim.pid, signal.SIGCONT)
            time.sleep(chance.uniform(0, SILENCE))
            events = [json.loads(line) for log in logs for line in log.read_text().splitlines() if line.endswith("}")]
            counts = Counter(event["what"] for event in events)
        over.set()
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    events = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    counts = Counter(event["what"] for event in events)
    print(", ".join(f"{count} {what}" for what, count in counts.items()))
    owners = Counter(event["run"] for event in events if event["what"] == "acquired")
    assert set(owners.values()) == {1}
    locks = [int(name[:5]) for name in store.names("lease")]
    assert locks == list(range(1, len(locks) + 1))
    return _History(sorted(events, key=lambda event: event["time"]), set(store.names(DATA)))


def _process(store: Store, log: Path, seed: int, over: Any) -> None:
    """Take the lock, write and beat until it is lost or given back, again and again."""
    chance = random.Random(seed)
    with open(log, "ab", buffering=0) as file:

        def note(what: str, **more: Any) -> None:
            file.write((json.dumps({"what": what, "time": time.monotonic(), **more}) + "\n").encode())

        _patch(store, chance, note)
        while not over.is_set():
            try:
                mine = lock.acquire(store)
            except ExperimentLocked:
                over.wait(chance.uniform(0, HEARTBEAT))
                continue
            note("acquired", run=mine.number, files=store.names(DATA))
            try:
                _own(mine, chance, over)
            except LockLost:
                note("lost", run=mine.number)


def _own(mine: lock.Lock, chance: random.Random, over: Any) -> None:
    for number in range(chance.randrange(5, 60)):
        mine.store.write(f"{DATA}/{mine.number:05d}-{number:05d}", os.urandom(chance.choice((10, 100_000))))
        _status(mine.number, "running").write(mine.store)
        if over.wait(chance.uniform(0, HEARTBEAT)):
            break
    if chance.random() < 0.5:  # else it falls silent
        _status(mine.number, "stopped").write(mine.store)
        mine.store.end_run()


def _status(run: int, state: Any) -> Status:
    time = lock.now()
    return Status(
        run=run, state=state, host="", job="", started=time, heartbeat=time, seconds=0, stages={}, reason="", resume="",
        rows={},
    )  # fmt: skip


def _patch(store: Store, chance: random.Random, note: Callable[..., None]) -> None:
    """Shorter times, a machine and a clock of its own, a look at the locks that is noted, answers that are lost."""
    patch, offset = pytest.MonkeyPatch(), timedelta(seconds=chance.uniform(-3600, 3600))

    def now() -> str:
        return (datetime.now(timezone.utc) + offset).isoformat()

    patch.setattr(lease, "HEARTBEAT", HEARTBEAT)
    patch.setattr(lease, "SILENCE", SILENCE)
    patch.setattr(lease, "_machine", lambda: f"machine {os.getpid()}")
    patch.setattr(lease, "now", now)
    patch.setattr(lease, "age", lambda time: status.age(time) + offset.total_seconds())
    put = Store._put

    def noted(self: Store, name: str, content: bytes, exclusive: bool) -> None:
        if name.startswith(DATA):
            note("looks", file=name.rpartition("/")[2])
        put(self, name, content, exclusive)

    patch.setattr(Store, "_put", noted)

    def lossy(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = function(*arguments, **options)
            if chance.random() < 0.1:
                note("repeats")
                raise OSError(errno.EIO, "the answer was lost")
            return result

        return call

    if store.is_local:
        for name in ("replace", "link", "rename"):
            patch.setattr(os, name, lossy(getattr(os, name)))
    else:
        patch.setattr(store.files, "pipe_file", lossy(store.files.pipe_file))  # fsspec keeps one for the whole process
