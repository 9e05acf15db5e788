"""Heartbeats of a thousand experiments are in time, and all former owners are checked at once.

No clock is used: the operations of the store are counted.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec import AbstractFileSystem

from dwf_cluster.data.registry import Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline import heartbeat, stages
from dwf_cluster.pipeline.heartbeat import Heartbeats, Tally
from dwf_cluster.presets import build
from dwf_cluster.store import Store, files, lock, tables
from dwf_cluster.store.lock import ExperimentLocked, Lock, Owner
from dwf_cluster.store.status import HEARTBEAT, Status

from .. import PATIENCE
from ..conftest import TINY

EXPERIMENTS, LATENCY, LIMIT = 1000, 0.07, 15.0
"""Experiments of one run, seconds of an operation of S3, most seconds between two heartbeats."""

SIZES = Sizes(96, 40, (1, 8, 8))
URL = "counted://root"


class Counted(AbstractFileSystem):
    """An object store in memory that counts the operations of each thread."""

    protocol = "counted"
    objects: ClassVar[dict[str, dict[str, bytes]]] = {}
    operations: ClassVar[Counter[int]] = Counter()
    beats: ClassVar[dict[str, list[tuple[int, int]]]] = {}
    changed = threading.Condition()

    def _count(self) -> None:
        self.operations[threading.get_ident()] += 1

    def cat_file(self, path: str, **options: Any) -> bytes:
        self._count()
        folder, _, name = path.rpartition("/")
        try:
            return self.objects[folder][name]
        except KeyError:
            raise FileNotFoundError(path) from None

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: Any) -> None:
        self._count()
        folder, _, name = path.rpartition("/")
        with self.changed:
            objects = self.objects.setdefault(folder, {})
            if mode == "create" and name in objects:
                raise FileExistsError(path)
            objects[name] = value
            if name == Status.FILE:
                thread = threading.get_ident()
                self.beats.setdefault(folder.rpartition("/")[2], []).append((thread, self.operations[thread]))
                self.changed.notify_all()

    def ls(self, path: str, detail: bool = False, **options: Any) -> list[str]:
        self._count()
        if path not in self.objects:
            raise FileNotFoundError(path)
        return [f"{path}/{name}" for name in list(self.objects[path])]

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._count()
        folder, _, name = path.rpartition("/")
        del self.objects[folder][name]

    @classmethod
    def wait_for(cls, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds; it is checked at each heartbeat."""
        with cls.changed:
            assert cls.changed.wait_for(condition, timeout=PATIENCE)


@pytest.fixture(autouse=True)
def _counted() -> Iterator[None]:
    fsspec.register_implementation("counted", Counted, clobber=True)
    yield
    for record in (Counted.objects, Counted.operations, Counted.beats):
        record.clear()


@pytest.fixture(scope="module")
def experiments() -> list[Experiment]:
    return [build("digits", seed, TINY) for seed in range(EXPERIMENTS)]


def test_a_thousand_experiments_have_heartbeats_in_time_until_each_final_state_is_written(
    experiments: list[Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "HEARTBEAT", 0.01)
    locks = {e: Lock(Store(URL, e.folder, run=1), 1, Owner.current()) for e in experiments}
    tally = Tally({e: owned.store for e, owned in locks.items()}, SIZES)

    def fewest_heartbeats() -> int:
        return min(len(Counted.beats[e.folder]) for e in experiments)

    def count(store: Store) -> dict[str, int]:
        """Take as long as two more heartbeats of this experiment."""
        known = len(Counted.beats[store.folder])
        Counted.wait_for(lambda: len(Counted.beats[store.folder]) >= known + 2)
        return {"metrics": 7}

    monkeypatch.setattr(tables, "count", count)
    with Heartbeats(locks, tally, "the command").reporting():
        Counted.wait_for(lambda: fewest_heartbeats() >= 3)
        tally.count()

    operations = defaultdict(list)
    for experiment in experiments:
        _first, *running, _final = Counted.beats[experiment.folder]
        for (thread, before), (same, after) in itertools.pairwise(running):
            assert thread == same
            operations[thread].append(after - before)
    assert len(operations) <= files._CONNECTIONS
    assert HEARTBEAT + LATENCY * max(map(max, operations.values())) <= LIMIT
    for store in (owned.store for owned in locks.values()):
        status = Status.read(store)
        assert status is not None
        assert (status.state, status.rows, status.stages["experts"]) == ("stopped", {"metrics": 7}, (0, 3))


def test_a_run_that_loses_an_experiment_names_the_new_owner_and_ends_the_others_properly(
    experiments: list[Experiment],
) -> None:
    lost, other = experiments[:2]
    locks = {e: lock.acquire(e.store(URL)) for e in (lost, other)}
    tally = Tally({e: owned.store for e, owned in locks.items()}, SIZES)
    successor = Owner.current().model_copy(update={"host": "n7", "pid": 4711, "since": "2026-11-23T12:00:00+00:00"})

    def run() -> None:
        with Heartbeats(locks, tally, "the command").reporting():
            tally.count()
            Store(URL, lost.folder).create("lease/00002.json", successor.model_dump_json().encode())

    with pytest.raises(ExperimentLocked) as error:
        run()
    assert str(error.value) == (
        f"{lost.folder} was taken over by n7 (process 4711) since 2026-11-23T12:00:00+00:00: "
        "this run sent no heartbeat for too long"
    )
    states = [status.state for e in (lost, other) if (status := Status.read(locks[e].store))]
    assert states == ["running", "stopped"]


def test_owners_without_heartbeats_are_checked_in_parallel(
    experiments: list[Experiment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each check waits until all others have begun."""
    stores = {e: e.store(URL) for e in experiments[:100]}
    silent = Owner.current().model_copy(update={"machine": "another", "since": "2026-01-01T00:00:00+00:00"})
    for store in stores.values():
        store.create("lease/00001.json", silent.model_dump_json().encode())
    together, acquire = threading.Barrier(len(stores), timeout=PATIENCE), lock.acquire
    monkeypatch.setattr(lock, "acquire", lambda store, pid: acquire(store, lambda seconds: together.wait(), pid))
    with stages.acquired(stores, SIZES, "the command", os.getpid()) as (fenced, _, _):
        assert {store.run for store in fenced.values()} == {2}
