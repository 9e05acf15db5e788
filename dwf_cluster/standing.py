"""How the experiments of a run stand: told to everyone with each heartbeat, for as long as this process holds them."""

from __future__ import annotations

import platform
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from dwf_cluster import plan
from dwf_cluster.cluster.control import Claim
from dwf_cluster.cluster.failures import one_line
from dwf_cluster.cluster.ray import Ended, Note, Started
from dwf_cluster.data.sources import Sizes
from dwf_cluster.experiment import STAGES, Experiment
from dwf_cluster.store import StorageFailed, tables
from dwf_cluster.store.lease import Held, Lease
from dwf_cluster.store.status import HEARTBEAT, State, Status, now


class Standing:
    """How the experiments of a run stand.

    Attributes:
        failures: jobs that have failed, and why.
        ended: how many jobs have come to their end.
    """

    def __init__(self, leases: Mapping[Experiment, Lease], sizes: Sizes, again: str) -> None:
        self.failures: list[tuple[plan.Job, str]] = []
        self.ended = 0
        self._leases, self._sizes, self._again = leases, sizes, again
        self._all = {e: Counter({s: len(plan.jobs(e, s, sizes)) for s in STAGES}) for e in leases}
        self.count()
        self._before = {e: Status.read(lease.store) for e, lease in leases.items()}
        self._started, self._clock = now(), time.monotonic()
        self._over = threading.Event()
        self._lost = ""

    def count(self) -> None:
        """See what the store does not hold yet."""
        self._left = {
            e: Counter({s: len(jobs) for s, jobs in plan.unfinished(e, lease.store, self._sizes).items()})
            for e, lease in self._leases.items()
        }

    @property
    def is_lost(self) -> bool:
        """Whether the experiments are no longer this process's to run."""
        return bool(self._lost)

    def update(self, event: Started | Claim | Ended | Note | None) -> None:
        """Take what `Cluster.run` yields."""
        if isinstance(event, Ended) and event.state == "failed":
            self.failures.append((event.job, event.reason))
        elif isinstance(event, Ended) and event.state == "done":
            self.ended += 1
            self._left[event.job.experiment][event.job.stage] -= 1

    @contextmanager
    def told(self) -> Iterator[Standing]:
        """Tell that the experiments are running while the body runs, and at its end what has come of them.

        Raises:
            Held: if somebody has taken one of them over, or may have, as the store took no heartbeat.
            StorageFailed: if the store does not take the last word.
        """
        for experiment in self._leases:
            self._write(experiment, "running")
        thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        thread.start()
        error: BaseException | None = None
        try:
            yield self
        except BaseException as caught:
            error = caught
            raise
        finally:
            self._over.set()
            thread.join()
            if self._lost:
                raise Held(self._lost) from error
            if not isinstance(error, StorageFailed):  # else it would not take a last word either
                self._end(error)

    def _beat(self) -> None:
        while not self._over.wait(HEARTBEAT):
            try:
                for experiment in self._leases:
                    self._write(experiment, "running")
            except (Held, StorageFailed) as error:
                self._lost = str(error)
                return

    def _end(self, error: BaseException | None) -> None:
        fault = "" if self.failures or not isinstance(error, Exception) else one_line(error)
        for experiment in self._leases:
            failed = any(job.experiment == experiment for job, _ in self.failures)
            complete = not any(self._left[experiment].values())
            self._write(experiment, "done" if complete else "failed" if failed or fault else "stopped", fault)

    def _write(self, experiment: Experiment, state: State, fault: str = "") -> None:
        lease, before = self._leases[experiment], self._before[experiment]
        if lease.is_lost():
            raise Held(f"{experiment.folder} was taken over by another run, as this one was silent for too long")
        reasons = [f"stage {j.stage}, {j.name}: {reason}" for j, reason in self.failures if j.experiment == experiment]
        rows = before.rows if before else {}
        Status(
            run=lease.number,
            state=state,
            host=platform.node(),
            job=lease.holder.job,
            started=self._started,
            heartbeat=now(),
            seconds=round((before.seconds if before else 0.0) + time.monotonic() - self._clock, 1),
            stages={s: (count - self._left[experiment][s], count) for s, count in self._all[experiment].items()},
            reason="\n".join(reasons) or fault,
            resume=self._again,
            rows=rows if state == "running" else tables.count(lease.store),
        ).write(lease.store)
