"""The status of a run's experiments: a tally of their jobs, and heartbeats that write it to the store."""

from __future__ import annotations

import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from dwf_cluster.cluster.control import Claim
from dwf_cluster.cluster.events import Ended, Note, Started
from dwf_cluster.cluster.failures import error_summary
from dwf_cluster.data.registry import Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan import jobs
from dwf_cluster.plan.jobs import STAGES
from dwf_cluster.store import LockLost, StorageFailed, Store, tables
from dwf_cluster.store.lock import ExperimentLocked, Lock
from dwf_cluster.store.status import HEARTBEAT, State, Status, now

_THREADS = 64
"""Threads that write heartbeats: of 1,000 experiments each has 16, or about 50 operations of the store in sequence."""


class Tally:
    """How many jobs of each experiment are done, and which have failed in this run.

    Attributes:
        failures: jobs that have failed, and why.
        ended: number of jobs that this run has done.
    """

    def __init__(self, stores: Mapping[Experiment, Store], sizes: Sizes) -> None:
        self.failures: list[tuple[jobs.Job, str]] = []
        self.ended = 0
        self._stores, self._sizes = stores, sizes
        self._pending: dict[Experiment, Counter[str]] = {}
        self._all: dict[Experiment, Counter[str]] = {}

    def count(self) -> None:
        """Count the jobs whose results the store has, and those that are pending."""
        _each(self._count, self._stores)

    def update(self, event: Started | Claim | Ended | Note | None) -> None:
        """Count an event of `Cluster.run`."""
        if isinstance(event, Ended) and event.state == "failed":
            self.failures.append((event.job, event.reason))
        elif isinstance(event, Ended) and event.state == "done":
            self.ended += 1
            self._pending[event.job.experiment][event.job.stage] -= 1

    def is_complete(self, experiment: Experiment) -> bool:
        """Whether all jobs of an experiment are done; not before `count`."""
        return experiment in self._pending and not any(self._pending[experiment].values())

    def stages(self, experiment: Experiment) -> dict[str, tuple[int, int]] | None:
        """For each stage, the number of finished jobs and of all jobs; None before `count`."""
        if experiment not in self._pending:
            return None
        pending = self._pending[experiment]
        return {stage: (count - pending[stage], count) for stage, count in self._all[experiment].items()}

    def reasons(self, experiment: Experiment) -> list[str]:
        """A line for each failed job of an experiment."""
        return [f"stage {j.stage}, {j.name}: {reason}" for j, reason in self.failures if j.experiment == experiment]

    def _count(self, experiment: Experiment) -> None:
        pending = jobs.pending(experiment, self._stores[experiment], self._sizes)
        every = {stage: len(jobs.jobs(experiment, stage, self._sizes)) for stage in STAGES}
        self._all[experiment] = Counter(every)
        self._pending[experiment] = Counter({stage: len(pending[stage]) for stage in STAGES})  # last: see `stages`


class Heartbeats:
    """Threads that write the status of experiments, so that other machines see that their run is alive.

    Args:
        locks: of the experiments, which this process or the run that it works for owns.
        tally: of the experiments' jobs.
        resume_command: for people.
    """

    def __init__(self, locks: Mapping[Experiment, Lock], tally: Tally, resume_command: str) -> None:
        self._locks, self._tally, self._resume_command = locks, tally, resume_command
        self._before: dict[Experiment, Status | None] = {}
        self._writing = {experiment: threading.Lock() for experiment in locks}
        self._final: set[Experiment] = set()
        self._started, self._clock = now(), time.monotonic()
        self._over = threading.Event()
        self._lost: Exception | None = None

    def fail_if_lost(self) -> None:
        """Raise if this run no longer owns the experiments.

        Raises:
            ExperimentLocked: if a later run has taken one of them over, or may have, as the store took no heartbeat.
        """
        if self._lost:
            raise ExperimentLocked(str(self._lost)) from self._lost

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Write `running` and heartbeats while the body runs, and at its end the final state of each experiment.

        Heartbeats continue until the final states are written, since that takes long for many experiments.

        Raises:
            ExperimentLocked: as `fail_if_lost`.
            StorageFailed: if the store does not take the final states.
        """
        _each(self._begin, self._locks)
        experiments, count = list(self._locks), min(_THREADS, len(self._locks))
        threads = [
            threading.Thread(target=self._beat, args=(experiments[i::count],), name="heartbeat", daemon=True)
            for i in range(count)
        ]
        for thread in threads:
            thread.start()
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
            raise
        finally:
            try:
                if not self._lost and not isinstance(error, StorageFailed):  # else it would not take a final state
                    _each(lambda experiment: self._end(experiment, error), self._locks)
            finally:
                self._over.set()
                for thread in threads:
                    thread.join()
            self.fail_if_lost()

    def _begin(self, experiment: Experiment) -> None:
        self._before[experiment] = Status.read(self._locks[experiment].store)
        self._write(experiment, "running")

    def _beat(self, experiments: Sequence[Experiment]) -> None:
        pause = HEARTBEAT
        while not self._over.wait(pause):
            began = time.monotonic()
            for experiment in experiments:
                try:
                    with self._writing[experiment]:
                        if experiment not in self._final:
                            self._write(experiment, "running")
                except (ExperimentLocked, StorageFailed) as error:
                    self._lost = error
                    return
            pause = max(0.0, began + HEARTBEAT - time.monotonic())

    def _end(self, experiment: Experiment, error: BaseException | None) -> None:
        has_failures = bool(self._tally.failures)  # the failed jobs are the reason, not the exception that lists them
        fault = "" if has_failures or not isinstance(error, Exception) else error_summary(error)
        state: State = "stopped"
        if self._tally.is_complete(experiment):
            state = "done"
        elif fault or self._tally.reasons(experiment):
            state = "failed"
        store = self._locks[experiment].store
        rows = tables.count(store)
        with self._writing[experiment]:
            self._final.add(experiment)
            self._write(experiment, state, fault, rows)
        store.end_run()

    def _write(
        self, experiment: Experiment, state: State, fault: str = "", rows: Mapping[str, int] | None = None
    ) -> None:
        lock, before = self._locks[experiment], self._before[experiment]
        stages = self._tally.stages(experiment)
        if stages is None:  # not counted yet
            stages = before.stages if before else {}
        status = Status(
            run=lock.number,
            state=state,
            host=platform.node(),
            job=lock.owner.job,
            started=self._started,
            heartbeat=now(),
            seconds=round((before.seconds if before else 0.0) + time.monotonic() - self._clock, 1),
            stages=stages,
            reason="\n".join(self._tally.reasons(experiment)) or fault,
            resume=self._resume_command,
            rows=dict(rows if rows is not None else before.rows if before else {}),
        )
        try:
            status.write(lock.store)
        except LockLost as error:
            raise lock.loss() from error


def _each(action: Callable[[Experiment], None], experiments: Iterable[Experiment]) -> None:
    """Call a function for every experiment, several at a time; the first error is raised when all calls have ended."""
    with ThreadPoolExecutor(_THREADS) as threads:
        futures = [threads.submit(action, experiment) for experiment in experiments]
    for future in futures:
        future.result()
