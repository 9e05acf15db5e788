"""One runs an experiment at a time; another takes over only when that one is dead."""

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


def _write(store: Store, number: int, **changed: object) -> None:
    holder = Owner.current().model_dump() | changed
    store.create(f"lease/{number:05d}.json", json.dumps(holder).encode())


def _beat(store: Store, run: int, state: str = "running", seconds_ago: float = 0.0) -> None:
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


def _unreachable(seconds: float) -> None:
    raise AssertionError("waited where the answer is plain")


ELSEWHERE = {"host": "n7", "machine": "n7 of another cluster"}


def test_nobody_holds_a_new_experiment_and_its_taker_does(store: Store) -> None:
    assert not lock.is_locked(store)
    mine = lock.acquire(store, _unreachable)
    assert mine.number == 1
    assert not mine.is_lost()
    assert lock.is_locked(store)


def test_who_comes_second_is_told_who_holds_it_since_when_and_as_which_job(store: Store) -> None:
    _write(store, 1, **ELSEWHERE, job="4711", since="2026-11-23T12:00:00+00:00", pid=99)
    _beat(store, 1, seconds_ago=7)
    for refuse in (lock.fail_if_locked, lock.acquire):
        with pytest.raises(ExperimentLocked) as held:
            refuse(store)
        assert str(held.value) == (
            f"{store.folder} is being run by n7 (process 99, SLURM job 4711) since 2026-11-23T12:00:00+00:00, "
            "last heartbeat 7 s ago"
        )


def test_one_that_has_said_its_last_word_is_followed_at_once(store: Store) -> None:
    _write(store, 1, **ELSEWHERE)
    for state in ("done", "failed", "stopped"):
        _beat(store, 1, state)
        assert lock.final_state(store) == state
        assert not lock.is_locked(store)
    assert lock.acquire(store, _unreachable).number == 2
    assert lock.final_state(store) is None


def test_a_dead_process_of_this_machine_is_followed_at_once(store: Store) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    _write(store, 1, pid=process.pid)
    _beat(store, 1)
    assert lock.acquire(store, _unreachable).number == 2


def test_who_holds_it_for_another_process_holds_it_as_long_as_that_lives(store: Store) -> None:
    """A sweep's trial for its driver: killed, the driver can be begun again while the trial has not yet noticed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as driver:
        assert lock.acquire(store, pid=driver.pid).number == 1
        with pytest.raises(ExperimentLocked, match=rf"\(process {driver.pid}\)"):
            lock.acquire(store)
        driver.kill()
    assert lock.acquire(store, _unreachable).number == 2


def test_a_process_that_has_only_the_number_of_the_dead_one_does_not_count(store: Store) -> None:
    _write(store, 1, began="long ago")
    _beat(store, 1)
    assert lock.acquire(store, _unreachable).number == 2


def test_an_earlier_life_of_the_same_slurm_job_is_dead(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _write(store, 1, **ELSEWHERE, job="12", life="1")
    _beat(store, 1)
    assert lock.is_locked(store)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert lock.acquire(store, _unreachable).number == 2


@pytest.mark.parametrize("beats", [True, False])
def test_one_on_another_machine_is_dead_when_it_is_silent_while_we_look_whatever_the_clocks_say(
    store: Store, beats: bool
) -> None:
    _write(store, 1, **ELSEWHERE, since="2026-01-01T00:00:00+00:00")
    _beat(store, 1, seconds_ago=300)
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if beats:
            _beat(store, 1, seconds_ago=290)

    if beats:
        with pytest.raises(ExperimentLocked):
            lock.acquire(store, wait)
    else:
        assert lock.acquire(store, wait).number == 2
    assert waited == [20.0]


def test_one_that_was_thought_dead_learns_that_it_has_lost(store: Store) -> None:
    first = lock.acquire(store)
    _write(store, 2, **ELSEWHERE)
    assert first.is_lost()


UNREADABLE = [b"", b"{}", b"[" * 100_000, b'{"host": 1}', b"\xff"]


@pytest.mark.parametrize("content", UNREADABLE, ids=range(len(UNREADABLE)))
def test_an_unreadable_lock_is_taken_only_if_no_heartbeat_comes(store: Store, content: bytes) -> None:
    store.write("lease/00003.json", content)
    assert not lock.is_locked(store)
    waited: list[float] = []
    with pytest.raises(
        ExperimentLocked, match=r"run by a run whose lock lease/00003\.json cannot be read, last heartbeat"
    ):
        lock.acquire(store, lambda seconds: _beat(store, 3, seconds_ago=300))
    assert lock.acquire(store, waited.append).number == 4
    assert waited == [20.0]


def test_an_unreadable_lock_of_a_run_that_beats_is_refused_at_once(store: Store) -> None:
    store.write("lease/00003.json", b"of another version")
    _beat(store, 3, seconds_ago=1)
    assert lock.is_locked(store)
    for refuse in (lock.fail_if_locked, lambda store: lock.acquire(store, _unreachable)):
        with pytest.raises(ExperimentLocked, match="cannot be read, last heartbeat 1 s ago"):
            refuse(store)


@pytest.mark.parametrize("content", UNREADABLE, ids=range(len(UNREADABLE)))
def test_an_unreadable_lock_of_a_run_that_has_ended_is_taken_at_once(store: Store, content: bytes) -> None:
    store.write("lease/00003.json", content)
    _beat(store, 3, "stopped")
    assert lock.acquire(store, _unreachable).number == 4


@pytest.mark.parametrize("hours", [2, -2])
def test_a_dead_owner_whose_clock_differed_is_taken_over_after_one_look(store: Store, hours: int) -> None:
    ahead = (datetime.now(timezone.utc) + timedelta(hours=hours)).isoformat()
    _write(store, 1, **ELSEWHERE, since=ahead)
    waited: list[float] = []
    assert lock.acquire(store, waited.append).number == 2  # it never came to its first heartbeat
    _write(store, 3, **ELSEWHERE, since=ahead)
    _beat(store, 3, seconds_ago=-3600 * hours)
    assert lock.acquire(store, waited.append).number == 4
    assert waited == [20.0, 20.0]


@pytest.mark.parametrize("higher", [2, 3, 7])
def test_any_higher_number_means_that_the_lock_is_lost(store: Store, higher: int) -> None:
    mine = lock.acquire(store)
    assert not mine.is_lost()
    _write(store, higher, **ELSEWHERE)
    assert mine.is_lost()


def test_a_process_that_was_paused_before_it_created_its_lock_gets_no_number_a_second_time(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four others take turns between its look at the locks and its attempt to create the next one."""
    numbers: list[int] = []
    create = Store.create

    def paused(self: Store, name: str, content: bytes) -> bool:
        monkeypatch.setattr(Store, "create", create)
        for _ in range(4):
            numbers.append(lock.acquire(store, pid=_dead()).number)
        _beat(store, numbers[-1], "stopped")
        return self.create(name, content)

    monkeypatch.setattr(Store, "create", paused)
    mine = lock.acquire(store, _unreachable)
    assert [*numbers, mine.number] == [1, 2, 3, 4, 5]
    assert not mine.is_lost()


def _dead() -> int:
    """Number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    return process.pid


def test_a_run_that_was_paused_before_it_made_its_folder_finds_that_it_is_lost(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run removes the folders of those before it; this one makes its own only after that."""
    begin = Store.begin_run
    others: list[lock.Lock] = []

    def paused(self: Store) -> None:
        monkeypatch.setattr(Store, "begin_run", begin)
        store.remove("lease/00001.json")
        _write(store, 1, began="long ago")  # else it is this process, alive
        others.append(lock.acquire(store))
        self.begin_run()

    monkeypatch.setattr(Store, "begin_run", paused)
    with pytest.raises(ExperimentLocked, match=f"process {os.getpid()}"):
        lock.acquire(store, _unreachable)
    assert [other.number for other in others] == [2]
    assert sorted(os.listdir(store.root)) == [".run-00002", "lease"]


def test_a_run_that_was_taken_over_writes_creates_and_removes_nothing(store: Store) -> None:
    old = lock.acquire(store).store
    old.write("results/jobs/a.parquet", b"before")
    assert old.create("created", b"before")
    _write(store, 2, began="long ago")
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
def test_a_run_that_is_paused_in_the_last_instant_before_a_change_does_not_make_it(
    store: Store, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """The file is written and synced, the locks are as they were; then it is paused, and another takes over."""
    old = lock.acquire(store).store
    old.write("file", b"before")
    _beat(store, 1, "stopped")
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


def test_nothing_is_written_for_a_run_after_its_end(store: Store) -> None:
    mine = lock.acquire(store)
    mine.store.end_run()
    with pytest.raises(LockLost, match="run 1 has ended"):
        mine.store.write("file", b"content")
    assert os.listdir(store.root) == ["lease"]


def test_the_next_run_sweeps_what_killed_ones_left(store: Store) -> None:
    killed = lock.acquire(store).store
    Path(store.root, ".run-00001", "results-jobs-a.parquet.7-ab.unfinished").write_bytes(b"half")
    killed.write("results/jobs/a.parquet", b"whole")
    Path(store.path("results/jobs/.b.parquet.7-ab.unfinished")).write_bytes(b"half of an older version's")
    _beat(store, 1, "stopped")
    lock.acquire(store)
    assert sorted(os.listdir(store.root)) == [".run-00002", "lease", "results", "status.json"]
    assert os.listdir(store.path("results/jobs")) == ["a.parquet"]


def test_messages_about_an_owner_contain_nothing_but_printable_characters(store: Store) -> None:
    _write(store, 1, **ELSEWHERE | {"host": "n7\x1b[2J"}, since=now())
    with pytest.raises(ExperimentLocked, match=r"is being run by n7\\x1b\[2J \(process"):
        lock.fail_if_locked(store)


def test_a_listing_that_is_behind_hides_nobody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(store, 1, began="long ago")
    behind = store.names("lease")
    _write(store, 2, **ELSEWHERE)
    monkeypatch.setattr(Store, "names", lambda store, folder: behind)
    assert lock.is_locked(store)
    with pytest.raises(ExperimentLocked, match="n7"):
        lock.acquire(store, _unreachable)


def _take(store: Store, go: object, answers: object) -> None:
    go.wait()  # type: ignore[attr-defined]
    try:
        answers.put(lock.acquire(store).number)  # type: ignore[attr-defined]
    except ExperimentLocked as held:
        answers.put(str(held))  # type: ignore[attr-defined]
    go.wait_end()  # type: ignore[attr-defined]


class _Gate:
    """Begins all at once, and keeps the winner alive until all have answered."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._go, self._end = context.Event(), context.Event()
        self.wait, self.wait_end = self._go.wait, self._end.wait
        self.open, self.close = self._go.set, self._end.set


def test_of_many_at_once_one_gets_it(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    gate, answers = _Gate(), context.Queue()
    processes = [context.Process(target=_take, args=(store, gate, answers)) for _ in range(4)]
    for process in processes:
        process.start()
    gate.open()
    told = [answers.get(timeout=PATIENCE) for _ in processes]
    gate.close()
    for process in processes:
        process.join()
    assert [answer for answer in told if answer == 1] == [1]
    (pid,) = {process.pid for process in processes if all(f"process {process.pid}" in t for t in told if t != 1)}
    assert pid != os.getpid()


def test_two_experiments_do_not_touch_each_other(store: Store) -> None:
    taken: Callable[[Store], lock.Lock] = lock.acquire
    taken(store)
    before = {name: store.read(f"lease/{name}") for name in store.names("lease")}
    other = Store(store.url, "digits-seed1-0123456789")
    assert taken(other).number == 1
    assert {name: store.read(f"lease/{name}") for name in store.names("lease")} == before
