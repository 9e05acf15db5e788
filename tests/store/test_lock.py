"""The lock of an experiment: one run at a time; another run takes over only when the owner is dead."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from dwf_cluster.store import LockLost, Store, lock
from dwf_cluster.store.lock import ExperimentLocked, Owner
from dwf_cluster.store.status import Status, now

from .. import PATIENCE


def _write_lock(store: Store, number: int, **changed: object) -> None:
    owner = Owner.current().model_dump() | changed
    store.create(f"lease/{number:05d}.json", json.dumps(owner).encode())


def _write_heartbeat(store: Store, run: int, state: str = "running", seconds_ago: float = 0.0) -> None:
    heartbeat = (datetime.now(timezone.utc) - timedelta(seconds=seconds_ago)).isoformat()
    Status.model_validate_json(
        json.dumps(
            {
                "run": run,
                "state": state,
                "host": "n1",
                "job": "",
                "started": now(),
                "heartbeat": heartbeat,
                "seconds": 1.5,
                "stages": {"experts": [1, 3]},
                "reason": "",
                "resume": "",
                "rows": {},
            }
        )
    ).write(store)


def _never_wait(seconds: float) -> None:
    raise AssertionError("waited, although it is certain whether the owner is alive")


ELSEWHERE = {"host": "n7", "machine": "n7 of another cluster"}


def test_a_new_experiment_is_not_locked_until_a_run_acquires_it(store: Store) -> None:
    assert not lock.is_locked(store)
    acquired = lock.acquire(store, _never_wait)
    assert acquired.number == 1
    assert not acquired.is_lost()
    assert lock.is_locked(store)


def test_the_error_of_a_second_run_names_the_owners_host_process_job_and_start(store: Store) -> None:
    _write_lock(store, 1, **ELSEWHERE, job="4711", since="2026-11-23T12:00:00+00:00", pid=99)
    _write_heartbeat(store, 1, seconds_ago=7)
    for acquire in (lock.fail_if_locked, lock.acquire):
        with pytest.raises(ExperimentLocked) as refused:
            acquire(store)
        assert str(refused.value) == (
            f"{store.folder} is being run by n7 (process 99, SLURM job 4711) since 2026-11-23T12:00:00+00:00, "
            "last heartbeat 7 s ago"
        )


def test_a_finished_run_can_be_replaced_at_once(store: Store) -> None:
    _write_lock(store, 1, **ELSEWHERE)
    for state in ("done", "failed", "stopped"):
        _write_heartbeat(store, 1, state)
        assert lock.final_state(store) == state
        assert not lock.is_locked(store)
    assert lock.acquire(store, _never_wait).number == 2
    assert lock.final_state(store) is None


def test_a_dead_run_of_this_machine_can_be_replaced_at_once(store: Store) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    _write_lock(store, 1, pid=process.pid)
    _write_heartbeat(store, 1)
    assert lock.acquire(store, _never_wait).number == 2


def test_a_lock_for_another_process_is_owned_until_that_process_ends(store: Store) -> None:
    """A sweep's trial locks for its driver: a killed driver can be restarted before the trial notices its death."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as driver:
        assert lock.acquire(store, pid=driver.pid).number == 1
        with pytest.raises(ExperimentLocked, match=rf"\(process {driver.pid}\)"):
            lock.acquire(store)
        driver.kill()
    assert lock.acquire(store, _never_wait).number == 2


def test_a_new_process_with_the_dead_owners_number_is_not_the_owner(store: Store) -> None:
    _write_lock(store, 1, began="long ago")
    _write_heartbeat(store, 1)
    assert lock.acquire(store, _never_wait).number == 2


def test_a_requeued_slurm_job_replaces_its_earlier_run_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _write_lock(store, 1, **ELSEWHERE, job="12", life="1")
    _write_heartbeat(store, 1)
    assert lock.is_locked(store)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert lock.acquire(store, _never_wait).number == 2


@pytest.mark.parametrize("alive", [True, False])
def test_an_owner_without_heartbeats_on_another_machine_is_replaced_unless_one_comes(store: Store, alive: bool) -> None:
    _write_lock(store, 1, **ELSEWHERE, since="2026-01-01T00:00:00+00:00")
    _write_heartbeat(store, 1, seconds_ago=300)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if alive:
            _write_heartbeat(store, 1, seconds_ago=290)

    if alive:
        with pytest.raises(ExperimentLocked):
            lock.acquire(store, wait)
    else:
        assert lock.acquire(store, wait).number == 2
    assert waited == [20.0]


def test_a_replaced_owner_sees_that_its_lock_is_lost(store: Store) -> None:
    first = lock.acquire(store)
    _write_lock(store, 2, **ELSEWHERE)
    assert first.is_lost()


UNREADABLE = [b"", b"{}", b"[" * 100_000, b'{"host": 1}', b"\xff"]


@pytest.mark.parametrize("content", UNREADABLE, ids=range(len(UNREADABLE)))
def test_an_unreadable_lock_is_replaced_only_if_no_heartbeat_comes(store: Store, content: bytes) -> None:
    store.write("lease/00003.json", content)
    assert not lock.is_locked(store)
    waited: list[float] = []
    with pytest.raises(
        ExperimentLocked, match=r"run by a run whose lock lease/00003\.json cannot be read, last heartbeat"
    ):
        lock.acquire(store, lambda seconds: _write_heartbeat(store, 3, seconds_ago=300))
    assert lock.acquire(store, waited.append).number == 4
    assert waited == [20.0]


def test_an_unreadable_lock_with_a_recent_heartbeat_is_respected_at_once(store: Store) -> None:
    store.write("lease/00003.json", b"of another version")
    _write_heartbeat(store, 3, seconds_ago=1)
    assert lock.is_locked(store)
    for acquire in (lock.fail_if_locked, lambda store: lock.acquire(store, _never_wait)):
        with pytest.raises(ExperimentLocked, match="cannot be read, last heartbeat 1 s ago"):
            acquire(store)


@pytest.mark.parametrize("content", UNREADABLE, ids=range(len(UNREADABLE)))
def test_an_unreadable_lock_of_a_finished_run_is_replaced_at_once(store: Store, content: bytes) -> None:
    store.write("lease/00003.json", content)
    _write_heartbeat(store, 3, "stopped")
    assert lock.acquire(store, _never_wait).number == 4


@pytest.mark.parametrize("hours", [2, -2])
def test_a_dead_owner_with_another_clock_is_replaced_after_one_wait(store: Store, hours: int) -> None:
    ahead = (datetime.now(timezone.utc) + timedelta(hours=hours)).isoformat()
    _write_lock(store, 1, **ELSEWHERE, since=ahead)
    waited: list[float] = []
    assert lock.acquire(store, waited.append).number == 2  # the owner died before its first heartbeat
    _write_lock(store, 3, **ELSEWHERE, since=ahead)
    _write_heartbeat(store, 3, seconds_ago=-3600 * hours)
    assert lock.acquire(store, waited.append).number == 4
    assert waited == [20.0, 20.0]


@pytest.mark.parametrize("higher", [2, 3, 7])
def test_a_lock_of_any_higher_number_means_that_the_lock_is_lost(store: Store, higher: int) -> None:
    acquired = lock.acquire(store)
    assert not acquired.is_lost()
    _write_lock(store, higher, **ELSEWHERE)
    assert acquired.is_lost()


def test_no_number_is_used_twice_if_a_process_pauses_before_it_creates_the_lock(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four other runs come and go after it has read the locks and before it creates the next one."""
    numbers: list[int] = []
    create = Store.create

    def paused(self: Store, name: str, content: bytes) -> bool:
        monkeypatch.setattr(Store, "create", create)
        for _ in range(4):
            numbers.append(lock.acquire(store, pid=_dead()).number)
        _write_heartbeat(store, numbers[-1], "stopped")
        return self.create(name, content)

    monkeypatch.setattr(Store, "create", paused)
    acquired = lock.acquire(store, _never_wait)
    assert [*numbers, acquired.number] == [1, 2, 3, 4, 5]
    assert not acquired.is_lost()


def _dead() -> int:
    """Number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    return process.pid


def test_a_run_paused_before_it_makes_its_folder_notices_that_its_lock_is_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run removes the folders of earlier runs; this one makes its folder only after that."""
    begin = Store.begin_run
    others: list[lock.Lock] = []

    def paused(self: Store) -> None:
        monkeypatch.setattr(Store, "begin_run", begin)
        store.remove("lease/00001.json")
        _write_lock(store, 1, began="long ago")  # otherwise the owner is this process, which is alive
        others.append(lock.acquire(store))
        self.begin_run()

    monkeypatch.setattr(Store, "begin_run", paused)
    with pytest.raises(ExperimentLocked, match=f"process {os.getpid()}"):
        lock.acquire(store, _never_wait)
    assert [other.number for other in others] == [2]
    assert sorted(os.listdir(store.root)) == [".run-00002", "lease"]


def test_a_replaced_run_can_neither_write_nor_create_nor_remove(store: Store) -> None:
    old = lock.acquire(store).store
    old.write("results/jobs/a.parquet", b"before")
    assert old.create("created", b"before")
    _write_lock(store, 2, began="long ago")
    new = lock.acquire(store).store
    before = _content(store)
    for attempt in (
        lambda: old.write("results/jobs/a.parquet", b"after"),
        lambda: old.write("results/jobs/b.parquet", b"after"),
        lambda: old.create("other", b"after"),
        lambda: old.remove("results/jobs/a.parquet"),
        lambda: old.remove("results"),
    ):
        with pytest.raises(LockLost, match="taken over by run 3: run 1 writes nothing more"):
            attempt()
    assert _content(store) == before
    new.write("results/jobs/a.parquet", b"after")
    new.remove("created")
    assert (store.read("results/jobs/a.parquet"), store.read("created")) == (b"after", None)


def _content(store: Store) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in Path(store.root).rglob("*") if path.is_file()}


@pytest.mark.parametrize("function", ["replace", "link", "rename"])
def test_a_replaced_run_cannot_finish_a_change_that_it_had_begun(
    store: Store, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """It is paused when the unfinished file is complete, right before the rename; meanwhile another run takes over."""
    old = lock.acquire(store).store
    old.write("file", b"before")
    _write_heartbeat(store, 1, "stopped")
    original = getattr(os, function)

    def paused(source: str, target: str) -> None:
        monkeypatch.setattr(os, function, original)
        assert lock.acquire(store).number == 2
        original(source, target)

    monkeypatch.setattr(os, function, paused)
    change: dict[str, Callable[[], object]] = {
        "replace": lambda: old.write("file", b"after"),
        "link": lambda: old.create("other", b"after"),
        "rename": lambda: old.remove("file"),
    }
    with pytest.raises(LockLost):
        change[function]()
    assert (store.read("file"), store.read("other")) == (b"before", None)


def test_a_run_cannot_write_after_its_end(store: Store) -> None:
    acquired = lock.acquire(store)
    acquired.store.end_run()
    with pytest.raises(LockLost, match="run 1 has ended"):
        acquired.store.write("file", b"content")
    assert os.listdir(store.root) == ["lease"]


def test_the_next_run_removes_unfinished_files_of_killed_runs(store: Store) -> None:
    killed = lock.acquire(store).store
    Path(store.root, ".run-00001", "results-jobs-a.parquet.7-ab.unfinished").write_bytes(b"half")
    killed.write("results/jobs/a.parquet", b"whole")
    Path(store.path("results/jobs/.b.parquet.7-ab.unfinished")).write_bytes(b"half of an older version's")
    _write_heartbeat(store, 1, "stopped")
    lock.acquire(store)
    assert sorted(os.listdir(store.root)) == [".run-00002", "lease", "results", "status.json"]
    assert os.listdir(store.path("results/jobs")) == ["a.parquet"]


def test_messages_about_an_owner_are_printable(store: Store) -> None:
    _write_lock(store, 1, **ELSEWHERE | {"host": "n7\x1b[2J"}, since=now())
    with pytest.raises(ExperimentLocked, match=r"is being run by n7\\x1b\[2J \(process"):
        lock.fail_if_locked(store)


def test_an_outdated_listing_does_not_hide_the_newest_lock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_lock(store, 1, began="long ago")
    outdated = store.names("lease")
    _write_lock(store, 2, **ELSEWHERE)
    monkeypatch.setattr(Store, "names", lambda store, folder: outdated)
    assert lock.is_locked(store)
    with pytest.raises(ExperimentLocked, match="n7"):
        lock.acquire(store, _never_wait)


def _acquire(store: Store, go: object, answers: object) -> None:
    go.wait()  # type: ignore[attr-defined]
    try:
        answers.put(lock.acquire(store).number)  # type: ignore[attr-defined]
    except ExperimentLocked as error:
        answers.put(str(error))  # type: ignore[attr-defined]
    go.wait_end()  # type: ignore[attr-defined]


class _Gate:
    """Starts all processes at once, and keeps the winner alive until all have answered."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._go, self._end = context.Event(), context.Event()
        self.wait, self.wait_end = self._go.wait, self._end.wait
        self.open, self.close = self._go.set, self._end.set


def test_exactly_one_of_four_simultaneous_processes_acquires_the_lock(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    gate, answers = _Gate(), context.Queue()
    processes = [context.Process(target=_acquire, args=(store, gate, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    gate.open()
    results = [answers.get(timeout=PATIENCE) for _ in processes]
    gate.close()
    for process in processes:
        process.join()
    assert results.count(1) == 1
    refusals = [result for result in results if result != 1]
    (pid,) = {process.pid for process in processes if all(f"process {process.pid}" in text for text in refusals)}
    assert pid != os.getpid()


def test_experiments_of_one_storage_have_separate_locks(store: Store) -> None:
    lock.acquire(store)
    before = {name: store.read(f"lease/{name}") for name in store.names("lease")}
    other = Store(store.url, "digits-seed1-0123456789")
    assert lock.acquire(other).number == 1
    assert {name: store.read(f"lease/{name}") for name in store.names("lease")} == before
