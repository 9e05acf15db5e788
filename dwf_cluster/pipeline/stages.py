"""The paper's section 4 on a Ray cluster: pre-train the experts, train them jointly behind the gate, attack them all.

Jobs whose results are in the store are skipped; interrupted ones resume from their last checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from dwf_cluster.cluster.driver import Cluster
from dwf_cluster.cluster.events import Listener
from dwf_cluster.data.registry import Sizes
from dwf_cluster.evaluation import merge
from dwf_cluster.evaluation.registry import CHECKS
from dwf_cluster.evaluation.worst_case import WorstCaseFile
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline.epochs import JobEvents
from dwf_cluster.pipeline.heartbeat import Heartbeats, Tally
from dwf_cluster.plan import jobs
from dwf_cluster.plan.jobs import EVALUATE, STAGES, Job
from dwf_cluster.plan.resources import allocate
from dwf_cluster.plan.schedule import Allocation
from dwf_cluster.plan.speeds import Speeds
from dwf_cluster.store import LockLost, Store, lock


class StageFailed(RuntimeError):
    """Jobs failed. Its text has a line for each: stage, job, reason."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and stopped; nothing is lost."""


@dataclass(frozen=True)
class Connection:
    """Shared by all jobs of a run once it has a Ray cluster. It can be pickled, for the trials of a sweep.

    Attributes:
        storage: absolute URL below which each experiment has its folder.
        cluster: where the jobs run.
        sizes: of the data set.
        images: Ray's reference to a `data.sources.Images`.
        names: display names of the experiments, by their folders; a single experiment has none.
        resume_command: for people.
        pid: of the driver's process, which owns the locks: trials of a sweep act on its behalf.
    """

    storage: str
    cluster: Cluster
    sizes: Sizes
    images: Any
    names: Mapping[str, str]
    resume_command: str
    pid: int

    def stores(self, experiments: Sequence[Experiment]) -> dict[Experiment, Store]:
        """Where these experiments are stored."""
        return {experiment: experiment.store(self.storage) for experiment in experiments}

    def title(self, job: Job) -> str:
        """A job's display name, also in Ray's dashboard: its experiment's name, if it has one, and its own."""
        return f"{self.names.get(job.folder, '')} {job.name}".lstrip()

    def run_stages(
        self,
        experiments: Sequence[Experiment],
        stages: Sequence[str],
        emit: Listener,
        stopping: Callable[[], bool],
        model: str | None = None,
        until: int | None = None,
    ) -> None:
        """Run the pending jobs of some stages; of jobs with equal results, one runs and the others copy it.

        Args:
            experiments: on one data set.
            stages: some of `plan.jobs.STAGES`.
            emit: called with every event, from one thread at a time.
            stopping: whether the run is to stop.
            model: run only the jobs of this one; None: of all.
            until: trainings pause after this epoch; a later call resumes them. None: they end.

        Raises:
            ExperimentLocked: if another run owns one of the experiments, or takes it over; then all jobs have been
                cancelled.
            StorageFailed: if the store fails; the files in it are whole.
            StageFailed: if jobs failed, after all others have ended that do not depend on them.
            Interrupted: if `stopping` became true before all jobs were done.
        """
        stores = self.stores(experiments)
        every = [job for e in experiments for stage in STAGES for job in jobs.jobs(e, stage, self.sizes)]
        every = jobs.deduplicate(every)
        allocations = allocate(every, self.cluster.resources)
        with acquired(stores, self.sizes, self.resume_command, self.pid) as (fenced, tally, heartbeats):
            pending = [
                replace(job, until=until)
                for job in pending_jobs(stores, stages, self.sizes)
                if model in (None, job.model)
            ]
            for experiment, store in fenced.items():
                merge.forget(store, _stale_files(job for job in pending if job.experiment == experiment))
            by_folder = {experiment.folder: store for experiment, store in stores.items()}
            plan = functools.partial(self._planned_seconds, every, pending, allocations)
            with JobEvents(by_folder, self.title, emit).following(pending, plan) as job_events:
                writable = {experiment.folder: store for experiment, store in fenced.items()}
                events = self.cluster.run(pending, allocations, writable, self.images, self.title, stopping)
                with closing(events):  # which cancels what still runs
                    for event in events:
                        heartbeats.fail_if_lost()
                        job_events.update(event)
                        tally.update(event)
            if failures := [f"stage {j.stage}, {self.title(j)}: {reason}" for j, reason in tally.failures]:
                raise StageFailed("\n".join(failures))
            if stopping() and tally.ended < len(pending):
                raise Interrupted

    def _planned_seconds(
        self, every: Sequence[Job], pending: Sequence[Job], allocations: Mapping[Job, Allocation]
    ) -> dict[Job, float]:
        """`Queued.seconds` of the pending jobs, from `every` job of their experiments."""
        speeds, slots = Speeds(every, allocations, self.storage), self.cluster.resources.slots
        return {job: speeds.seconds(job, allocations[job]) * allocations[job].slots / slots for job in pending}


def pending_jobs(stores: Mapping[Experiment, Store], stages: Sequence[str], sizes: Sizes) -> list[Job]:
    """The jobs of the given stages that are not done, in the order of the stages, deduplicated.

    Phase 1, algorithms 1 and 2: every expert on its own. Phase 2, algorithm 3: experts and gate, end to end.
    Table 3: every model under every attack. `Job.inputs` keeps this order.

    Args:
        stores: of the experiments.
        stages: some of `plan.jobs.STAGES`.
        sizes: of the data set.

    Raises:
        InvalidInput: if a given stage needs one that is neither given nor done.
    """
    by_stage = {experiment: jobs.pending(experiment, store, sizes) for experiment, store in stores.items()}
    selected = [job for waiting in by_stage.values() for job in jobs.select(waiting, stages)]
    pending = {job for waiting in by_stage.values() for listed in waiting.values() for job in listed}
    done = (job for e in stores for stage in STAGES for job in jobs.jobs(e, stage, sizes) if job not in pending)
    return jobs.deduplicate(sorted(selected, key=lambda job: STAGES.index(job.stage)), done)


def repair_status(stores: Mapping[Experiment, Store], sizes: Sizes, resume_command: str, pid: int) -> None:
    """Finish the bookkeeping of killed runs: merge shards, write the final state."""
    with acquired(stale_experiments(stores, sizes), sizes, resume_command, pid):
        return


def stale_experiments(stores: Mapping[Experiment, Store], sizes: Sizes) -> dict[Experiment, Store]:
    """The experiments that no run owns, and whose final state is missing or wrong, or whose shards are not merged."""
    stale = {}
    for experiment, store in stores.items():
        state = lock.final_state(store)
        is_complete = not any(jobs.pending(experiment, store, sizes).values())
        unmerged = merge.unmerged(store, _shards(experiment, sizes), _worst_cases(experiment, sizes))
        if not lock.is_locked(store) and (state is None or (state == "done") != is_complete or unmerged):
            stale[experiment] = store
    return stale


@contextmanager
def acquired(
    stores: Mapping[Experiment, Store], sizes: Sizes, resume_command: str, pid: int
) -> Iterator[tuple[dict[Experiment, Store], Tally, Heartbeats]]:
    """Own the locks of experiments and report their status while the body runs, then merge their shards.

    Yields:
        Stores that write only while the locks are owned, the tally of the jobs, and the heartbeats.

    Raises:
        ExperimentLocked: if another run owns one of them, or takes it over.
    """

    def acquire(experiment: Experiment) -> lock.Lock:
        stores[experiment].preflight()
        acquired_lock = lock.acquire(stores[experiment], pid=pid)
        try:
            acquired_lock.store.write("experiment.json", experiment.to_json().encode())
        except LockLost as error:
            raise acquired_lock.loss() from error
        return acquired_lock

    # All at once: for each, it may take twenty seconds to see that its former owner is dead.
    with ThreadPoolExecutor(max(1, len(stores))) as threads:
        locks = dict(zip(stores, threads.map(acquire, stores), strict=True))
    fenced = {experiment: acquired_lock.store for experiment, acquired_lock in locks.items()}
    tally = Tally(fenced, sizes)
    heartbeats = Heartbeats(locks, tally, resume_command)
    with heartbeats.reporting():
        tally.count()
        try:
            yield fenced, tally, heartbeats
        except (StageFailed, Interrupted):
            _merge(fenced, sizes)
            raise
        _merge(fenced, sizes)


def _merge(stores: Mapping[Experiment, Store], sizes: Sizes) -> None:
    """Merge the shards of each model and suite whose shards are all done, then the worst case of each model."""
    for experiment, store in stores.items():
        merge.merge(store, _shards(experiment, sizes), _worst_cases(experiment, sizes))


def _shards(experiment: Experiment, sizes: Sizes) -> dict[str, list[str]]:
    """For each file of `evaluations` the files of its shards, in the order of the test set."""
    shards: dict[str, list[str]] = {}
    for job in _attacks(experiment, sizes):
        shards.setdefault(job.evaluation_file, []).append(job.file)
    return shards


def _worst_cases(experiment: Experiment, sizes: Sizes) -> list[WorstCaseFile]:
    """The worst case of each model: over its own attacks, then over the images that were made on other models."""
    attacks = _attacks(experiment, sizes)
    worst = []
    for spec in experiment.models:
        suites = experiment.suites(spec)
        own = sorted((job for job in attacks if job.model == spec.name), key=lambda job: suites.index(str(job.suite)))
        transferred = [job for job in attacks if job.tests_transfer and job.model != spec.name]
        files = tuple(job.file for job in (*own, *transferred))
        worst.append(WorstCaseFile(spec.name, experiment.threats, files))
    return worst


def _attacks(experiment: Experiment, sizes: Sizes) -> list[Job]:
    """The jobs that fill the columns of the result table, in the order of the test set."""
    attacks = (job for job in jobs.jobs(experiment, EVALUATE, sizes) if job.suite != CHECKS)
    return sorted(attacks, key=lambda job: job.first)


def _stale_files(pending: Iterable[Job]) -> set[str]:
    """The files of `evaluations` that pending jobs of an experiment make invalid."""
    stale = set()
    for job in pending:
        if job.stage == EVALUATE and job.suite != CHECKS:
            models = job.experiment.names if job.tests_transfer else (job.model,)
            stale |= {job.evaluation_file, *(WorstCaseFile(model).file for model in models)}
    return stale
