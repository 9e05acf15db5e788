"""What the experiments of a run have come to, and their heartbeats while this process runs them."""

from __future__ import annotations

import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from dwf_cluster.cluster.control import Claim
from dwf_cluster.cluster.events import Ended, Note, Started
from dwf_cluster.cluster.failures import one_line
from dwf_cluster.data.registry import Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan import jobs
from dwf_cluster.plan.jobs import STAGES
from dwf_cluster.store import LockLost, StorageFailed, tables
from dwf_cluster.store.lock import ExperimentLocked, Lock
from dwf_cluster.store.status import HEARTBEAT, State, Status, now

_THREADS = 64
"""That write heartbeats: of 1,000 experiments each has 16, or 50 operations of the store one after the other."""


class Standing:
    """The jobs of a run's experiments, counted, and their status in the store.

    Attributes:
        stores: of the experiments, fenced.
        failures: jobs that have failed, and why.
        ended: how many jobs have come to their end.
    """

    def __init__(self, leases: Mapping[Experiment, Lock], sizes: Sizes, again: str) -> None:
        self.stores = {experiment: lease.store for experiment, lease in leases.items()}
        self.failures: list[tuple[jobs.Job, str]] = []
        self.ended = 0
        self._leases, self._sizes, self._again = leases, sizes, again
        self._left: dict[Experiment, Counter[str]] = {}
        self._all: dict[Experiment, Counter[str]] = {}
        self._before: dict[Experiment, Status | None] = {}
        self._writing = {experiment: threading.Lock() for experiment in leases}
        self._final: set[Experiment] = set()
        self._started, self._clock = now(), time.monotonic()
        self._over = threading.Event()
        self._lost: Exception | None = None

    def count(self) -> None:
        """Count the jobs whose results the store does not have."""
        self._each(self._count)

    def fail_if_lost(self) -> None:
        """Raise if the experiments are no longer this process's to run.

        Raises:
            ExperimentLocked: if a later run has taken one of them over, or may have, as the store took no heartbeat.
        """
        if self._lost:
            raise ExperimentLocked(str(self._lost)) from self._lost

    def update(self, event: Started | Claim | Ended | Note | None) -> None:
        """Take what `Cluster.run` yields."""
        if isinstance(event, Ended) and event.state == "failed":
            self.failures.append((event.job, event.reason))
        elif isinstance(event, Ended) and event.state == "done":
            self.ended += 1
            self._left[event.job.experiment][event.job.stage] -= 1

    @contextmanager
    def told(self) -> Iterator[Standing]:
        """Write `running` and heartbeats while the body runs, and at its end the final state of each experiment.

        Heartbeats go on until the final state is written, since that takes long for many experiments.

        Raises:
            ExperimentLocked: as `fail_if_lost`.
            StorageFailed: if the store does not take the final states.
        """
        self._each(self._begin)
        experiments, count = list(self._leases), min(_THREADS, len(self._leases))
        threads = [
            threading.Thread(target=self._beat, args=(experiments[i::count],), name="heartbeat", daemon=True)
            for i in range(count)
        ]
        for thread in threads:
            thread.start()
        error: BaseException | None = None
        try:
            yield self
        except BaseException as caught:
            error = caught
            raise
        finally:
            try:
                if not self._lost and not isinstance(error, StorageFailed):  # else it would not take a final state
                    self._each(lambda experiment: self._end(experiment, error))
            finally:
                self._over.set()
                for thread in threads:
                    thread.join()
            self.fail_if_lost()

    def _each(self, action: Callable[[Experiment], None]) -> None:
        """Do something for every experiment, several at a time; the first error is raised when all have ended."""
        with ThreadPoolExecutor(_THREADS) as threads:
            futures = [threads.submit(action, experiment) for experiment in self._leases]
        for future in futures:
            future.result()

    def _begin(self, experiment: Experiment) -> None:
        self._before[experiment] = Status.read(self._leases[experiment].store)
        self._write(experiment, "running")

    def _count(self, experiment: Experiment) -> None:
        left = jobs.pending(experiment, self._leases[experiment].store, self._sizes)
        self._left[experiment] = Counter({stage: len(jobs) for stage, jobs in left.items()})
        self._all[experiment] = Counter({s: len(jobs.jobs(experiment, s, self._sizes)) for s in STAGES})

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
        fault = "" if self.failures or not isinstance(error, Exception) else one_line(error)
        failed = any(job.experiment == experiment for job, _ in self.failures)
        complete = experiment in self._left and not any(self._left[experiment].values())
        lease = self._leases[experiment]
        rows = tables.count(lease.store)
        with self._writing[experiment]:
            self._final.add(experiment)
            self._write(experiment, "done" if complete else "failed" if failed or fault else "stopped", fault, rows)
        lease.store.end_run()

    def _write(
        self, experiment: Experiment, state: State, fault: str = "", rows: Mapping[str, int] | None = None
    ) -> None:
        lease, before = self._leases[experiment], self._before[experiment]
        reasons = [f"stage {j.stage}, {j.name}: {reason}" for j, reason in self.failures if j.experiment == experiment]
        if experiment in self._all:
            counts, left = self._all[experiment], self._left[experiment]
            stages = {stage: (count - left[stage], count) for stage, count in counts.items()}
        else:  # not counted yet
            stages = before.stages if before else {}
        status = Status(
            run=lease.number,
            state=state,
            host=platform.node(),
            job=lease.owner.job,
            started=self._started,
            heartbeat=now(),
            seconds=round((before.seconds if before else 0.0) + time.monotonic() - self._clock, 1),
            stages=stages,
            reason="\n".join(reasons) or fault,
            resume=self._again,
            rows=dict(rows if rows is not None else before.rows if before else {}),
        )
        try:
            status.write(lease.store)
        except LockLost as error:
            raise lease.loss() from error
