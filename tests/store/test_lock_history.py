"""The lock under faults: several processes acquire it, send heartbeats and write; then their history is checked.

They are stopped and continued at random (SIGSTOP, SIGCONT), their clocks differ by up to an hour, and some answers of
the storage are lost. Every process logs what it does, with the machine's monotonic clock. The test asserts:

- no lock number has two owners;
- no write of an owner appears after `acquire` has returned to a later owner. On a disk this holds without exception; on
  S3 a PUT may be under way at that time, but the process must have read the locks before it.

`DWF_LOCK_SEED` repeats the same random faults.
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
HEARTBEAT_TIMEOUT = 0.4
"""Seconds, instead of ten and sixty."""

MIN_ACQUIRED, MIN_LOST, MIN_REPEATED = 14, 3, 3
"""Numbers of acquired locks, of locks lost to another process, and of lost answers that end the history."""

DATA = "data"


def test_on_a_disk_each_lock_has_one_owner_and_no_write_appears_late(tmp_path: Path) -> None:
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


def test_on_s3_no_write_begins_after_a_later_run_has_acquired_the_lock(s3: str, tmp_path: Path) -> None:
    history = _history(Store(s3, "digits-seed0-0123456789"), tmp_path)
    for write, begun, acquired in history.late():
        assert begun < acquired, f"{write} began after a later run had acquired the lock"


@dataclass
class _History:
    """The logged events, in order of time, and the files of the storage at the end."""

    events: list[dict[str, Any]]
    files: set[str]

    def late(self) -> Iterator[tuple[str, float, float]]:
        """Files that appeared after a later run acquired the lock: name, begin of the last write, time of acquiring."""
        begun = {event["file"]: event["begun"] for event in self.events if event["what"] == "writes"}
        for event in self.events:
            if event["what"] == "acquired":
                for name in self.files - set(event["files"]):
                    if int(name[:5]) < event["run"]:
                        yield name, begun[name], event["time"]


def _history(store: Store, folder: Path) -> _History:
    """Run the processes until enough has happened; assert that each lock has one owner."""
    seed = int(os.environ.get("DWF_LOCK_SEED", time.time_ns() % 10**6))
    print(f"\nDWF_LOCK_SEED={seed}")
    chance = random.Random(seed)
    context = multiprocessing.get_context("spawn")
    finished = context.Event()
    logs = [folder / f"{number}.jsonl" for number in range(PROCESSES)]
    processes = [context.Process(target=_process, args=(store, log, seed + i, finished)) for i, log in enumerate(logs)]
    for log, process in zip(logs, processes, strict=True):
        log.touch()
        process.start()
    deadline, events = time.monotonic() + PATIENCE, list[dict[str, Any]]()
    try:
        counts: Counter[str] = Counter()
        while counts["acquired"] < MIN_ACQUIRED or counts["lost"] < MIN_LOST or counts["repeats"] < MIN_REPEATED:
            assert time.monotonic() < deadline, f"not enough has happened: {counts}"
            assert all(process.is_alive() for process in processes)
            victim = chance.choice(processes)
            assert victim.pid is not None
            os.kill(victim.pid, signal.SIGSTOP)
            time.sleep(chance.uniform(0.1, 6 * HEARTBEAT_TIMEOUT))  # the length of the fault is random
            os.kill(victim.pid, signal.SIGCONT)
            time.sleep(chance.uniform(0, HEARTBEAT_TIMEOUT))
            events = [json.loads(line) for log in logs for line in log.read_text().splitlines() if line.endswith("}")]
            counts = Counter(event["what"] for event in events)
        finished.set()
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


def _process(store: Store, log: Path, seed: int, finished: Any) -> None:
    """Acquire the lock, write and send heartbeats until it is lost or released, again and again."""
    chance = random.Random(seed)
    with open(log, "ab", buffering=0) as file:

        def note(event: str, **details: Any) -> None:
            file.write((json.dumps({"what": event, "time": time.monotonic(), **details}) + "\n").encode())

        _patch(store, chance, note)
        while not finished.is_set():
            try:
                acquired = lock.acquire(store)
            except ExperimentLocked:
                finished.wait(chance.uniform(0, HEARTBEAT))
                continue
            note("acquired", run=acquired.number, files=store.names(DATA))
            try:
                _use(acquired, chance, finished)
            except LockLost:
                note("lost", run=acquired.number)


def _use(acquired: lock.Lock, chance: random.Random, finished: Any) -> None:
    for number in range(chance.randrange(5, 60)):
        acquired.store.write(f"{DATA}/{acquired.number:05d}-{number:05d}", os.urandom(chance.choice((10, 100_000))))
        _status(acquired.number, "running").write(acquired.store)
        if finished.wait(chance.uniform(0, HEARTBEAT)):
            break
    if chance.random() < 0.5:  # otherwise its heartbeats just end
        _status(acquired.number, "stopped").write(acquired.store)
        acquired.store.end_run()


def _status(run: int, state: Any) -> Status:
    time = lock.now()
    return Status(
        run=run, state=state, host="", job="", started=time, heartbeat=time, seconds=0, stages={}, reason="", resume="",
        rows={},
    )  # fmt: skip


def _patch(store: Store, chance: random.Random, note: Callable[..., None]) -> None:
    """Shorten the times, give this process its own machine and clock, log its writes, lose answers."""
    patch, offset = pytest.MonkeyPatch(), timedelta(seconds=chance.uniform(-3600, 3600))

    def now() -> str:
        return (datetime.now(timezone.utc) + offset).isoformat()

    patch.setattr(lock, "HEARTBEAT", HEARTBEAT)
    patch.setattr(lock, "HEARTBEAT_TIMEOUT", HEARTBEAT_TIMEOUT)
    patch.setattr(lock, "_machine", lambda: f"machine {os.getpid()}")
    patch.setattr(lock, "now", now)
    patch.setattr(lock, "age", lambda time: status.age(time) + offset.total_seconds())
    put = Store._put

    def logged(self: Store, name: str, content: bytes, exclusive: bool) -> None:
        begun, refused = time.monotonic(), False
        try:
            put(self, name, content, exclusive)
        except LockLost:  # a repeat of a write whose answer was lost: it has sent nothing
            refused = True
            raise
        finally:
            if name.startswith(DATA) and not refused:
                note("writes", file=name.rpartition("/")[2], begun=begun)

    patch.setattr(Store, "_put", logged)

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
        patch.setattr(store.files, "pipe_file", lossy(store.files.pipe_file))  # fsspec caches one per process
