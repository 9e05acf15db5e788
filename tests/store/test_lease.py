"""One runs an experiment at a time; another takes over only when that one is dead."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone

import pytest

from dwf_cluster.store import Store, lease
from dwf_cluster.store.lease import Held, Holder
from dwf_cluster.store.status import Status, now


def _write(store: Store, number: int, **changed: object) -> None:
    holder = Holder.me().model_dump() | changed
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
    assert not lease.is_held(store)
    mine = lease.take(store, _unreachable)
    assert mine.number == 1
    assert not mine.is_lost()
    assert lease.is_held(store)


def test_who_comes_second_is_told_who_holds_it_since_when_and_as_which_job(store: Store) -> None:
    _write(store, 1, **ELSEWHERE, job="4711", since="2026-11-23T12:00:00+00:00", pid=99)
    _beat(store, 1, seconds_ago=7)
    for refuse in (lease.refuse_held, lease.take):
        with pytest.raises(Held) as held:
            refuse(store)
        assert str(held.value) == (
            f"{store.folder} is being run by n7 (process 99, SLURM job 4711) since 2026-11-23T12:00:00+00:00, "
            "last heartbeat 7 s ago"
        )


def test_one_that_has_said_its_last_word_is_followed_at_once(store: Store) -> None:
    _write(store, 1, **ELSEWHERE)
    for state in ("done", "failed", "stopped"):
        _beat(store, 1, state)
        assert lease.last_word(store) == state
        assert not lease.is_held(store)
    assert lease.take(store, _unreachable).number == 2
    assert lease.last_word(store) is None


def test_a_dead_process_of_this_machine_is_followed_at_once(store: Store) -> None:
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    _write(store, 1, pid=process.pid)
    _beat(store, 1)
    assert lease.take(store, _unreachable).number == 2


def test_who_holds_it_for_another_process_holds_it_as_long_as_that_lives(store: Store) -> None:
    """A sweep's trial for its driver: killed, the driver can be begun again while the trial has not yet noticed."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as driver:
        assert lease.take(store, pid=driver.pid).number == 1
        with pytest.raises(Held, match=rf"\(process {driver.pid}\)"):
            lease.take(store)
        driver.kill()
    assert lease.take(store, _unreachable).number == 2


def test_a_process_that_has_only_the_number_of_the_dead_one_does_not_count(store: Store) -> None:
    _write(store, 1, began="long ago")
    _beat(store, 1)
    assert lease.take(store, _unreachable).number == 2


def test_an_earlier_life_of_the_same_slurm_job_is_dead(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    _write(store, 1, **ELSEWHERE, job="12", life="1")
    _beat(store, 1)
    assert lease.is_held(store)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert lease.take(store, _unreachable).number == 2


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
        with pytest.raises(Held):
            lease.take(store, wait)
    else:
        assert lease.take(store, wait).number == 2
    assert waited == [20.0]


def test_one_that_was_thought_dead_learns_that_it_has_lost(store: Store) -> None:
    first = lease.take(store)
    _write(store, 2, **ELSEWHERE)
    assert first.is_lost()


def test_a_lease_that_nobody_can_read_is_nobodys(store: Store) -> None:
    for number, content in enumerate((b"", b"{}", b"[" * 100_000, b'{"host": 1}', b"\xff"), start=1):
        store.write(f"lease/{number:05d}.json", content)
        assert not lease.is_held(store)
    assert lease.take(store).number == 6
    assert store.names("lease") == ["00005.json", "00006.json"]


def test_a_listing_that_is_behind_hides_nobody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(store, 1, began="long ago")
    behind = store.names("lease")
    _write(store, 2, **ELSEWHERE)
    monkeypatch.setattr(Store, "names", lambda store, folder: behind)
    assert lease.is_held(store)
    with pytest.raises(Held, match="n7"):
        lease.take(store, _unreachable)


def _take(store: Store, go: object, answers: object) -> None:
    go.wait()  # type: ignore[attr-defined]
    try:
        answers.put(lease.take(store).number)  # type: ignore[attr-defined]
    except Held as held:
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
    told = [answers.get(timeout=60) for _ in processes]
    gate.close()
    for process in processes:
        process.join()
    assert [answer for answer in told if answer == 1] == [1]
    (pid,) = {process.pid for process in processes if all(f"process {process.pid}" in t for t in told if t != 1)}
    assert pid != os.getpid()


def test_two_experiments_do_not_touch_each_other(store: Store) -> None:
    taken: Callable[[Store], lease.Lease] = lease.take
    taken(store)
    before = {name: store.read(f"lease/{name}") for name in store.names("lease")}
    other = Store(store.url, "digits-seed1-0123456789")
    assert taken(other).number == 1
    assert {name: store.read(f"lease/{name}") for name in store.names("lease")} == before
