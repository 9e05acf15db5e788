"""Events of running jobs, completed from the store: epochs of trainings, seconds and notes of jobs that have ended."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from dwf_cluster.cluster.control import Claim
from dwf_cluster.cluster.events import Ended, Epoch, Finished, Listener, Note, Queued, Started, warning
from dwf_cluster.plan.jobs import Job
from dwf_cluster.store import Store, tables

_LAST_SECONDS = 10.0
"""How long after the last job the store is still read for epochs that have not been reported."""


class JobEvents:
    """Reports jobs to a listener while they run.

    A separate thread reads the store and calls the listener, so a slow or damaged store neither delays a job nor
    ends the run. The first failure is a warning.

    Args:
        stores: of the experiments, by their folders.
        title: returns the display name of a job.
        emit: called with every event, in the order of `update`.
    """

    def __init__(self, stores: Mapping[str, Store], title: Callable[[Job], str], emit: Listener) -> None:
        self._stores, self._title, self._emit = stores, title, emit
        self._epochs: dict[Job, int] = {}
        self._running: set[Job] = set()
        self._unreadable: set[Job] = set()
        self._has_warned = self._look_waits = False
        self._deadline = math.inf

    @contextmanager
    def following(self, jobs: Sequence[Job], plan: Callable[[], Mapping[Job, float]] = dict) -> Iterator[JobEvents]:
        """Report these jobs while the body runs, beginning with the epochs of earlier runs.

        Args:
            jobs: about to run.
            plan: returns `Queued.seconds`; it may read the store.
        """
        self._emit(Queued(tuple(jobs), self._planned(plan)))
        try:
            for job in jobs:  # before any job starts, so that no new epoch is taken for an old one
                self._read_epochs(job, is_replayed=True)
            with ThreadPoolExecutor(1, "job-events") as self._thread:
                try:
                    yield self
                finally:
                    self._deadline = time.monotonic() + _LAST_SECONDS
        finally:
            self._emit(Finished())

    def update(self, event: Started | Claim | Ended | Note | None) -> None:
        """Handle an event of `Cluster.run`; return at once. None: read the epochs of running trainings."""
        if event is None and self._look_waits:
            return
        self._look_waits |= event is None
        self._thread.submit(self._follow, event)

    def _follow(self, event: Started | Claim | Ended | Note | None) -> None:
        if event is None:
            self._look_waits = False
            for job in self._running:
                self._read_epochs(job)
        elif isinstance(event, Ended):
            self._running.discard(event.job)
            self._unreadable.discard(event.job)
            self._read_epochs(event.job)
            self._emit(self._completed(event))
        else:
            if isinstance(event, Started):
                self._running.add(event.job)
            self._emit(event)

    def _planned(self, plan: Callable[[], Mapping[Job, float]]) -> Mapping[Job, float]:
        try:
            return plan()
        except Exception as error:  # a store that does not answer, or a file that holds anything
            self._has_warned = True
            self._emit(warning("progress", error))
            return {}

    def _read_epochs(self, job: Job, is_replayed: bool = False) -> None:
        """Report the epochs of a training that have ended since the last call."""
        if not job.is_training or job in self._unreadable:
            return
        try:
            for row in self._rows(job, "metrics", job.model):
                if row["epoch"] > self._epochs.get(job, 0):
                    self._epochs[job] = row["epoch"]
                    self._emit(Epoch(job, row, is_replayed or bool(job.copy_of)))
        except Exception as error:  # a store that does not answer, or a file that holds anything
            # Not read again before its end: a store that does not answer for a minute ends the job itself.
            self._unreadable.add(job)
            self._warn(job, error)

    def _completed(self, event: Ended) -> Ended:
        """The event with seconds and notes from the job's row; a copy's row is that of the job that it copies."""
        if event.job.copy_of:
            return event
        try:
            row: dict[str, Any] = next(iter(self._rows(event.job, "jobs", event.job.file)), {})
            return replace(event, seconds=row.get("seconds"), notes=tuple((row.get("note") or "").splitlines()))
        except Exception as error:  # as in `_read_epochs`
            self._warn(event.job, error)
            return event

    def _rows(self, job: Job, table: str, file: str) -> list[dict[str, Any]]:
        if time.monotonic() > self._deadline:
            return []
        rows: list[dict[str, Any]] = tables.read(self._stores[job.folder], table, [file]).to_pylist()
        return rows

    def _warn(self, job: Job, error: Exception) -> None:
        if not self._has_warned:
            self._has_warned = True
            self._emit(warning("progress", error, self._title(job)))
