"""The paper's section 4: pre-train the experts, train them jointly behind the gate, attack them all.

Jobs whose results are in the store are skipped; interrupted ones resume from their last checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dwf_cluster.cluster.driver import Cluster
from dwf_cluster.console.progress import Progress
from dwf_cluster.data import sources
from dwf_cluster.data.registry import Sizes
from dwf_cluster.evaluation import merge
from dwf_cluster.evaluation.registry import CHECKS, SUITES
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline.heartbeat import Standing
from dwf_cluster.plan import jobs
from dwf_cluster.plan.jobs import STAGES
from dwf_cluster.plan.resources import allocate
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import LockLost, Store, lock


class StageFailed(RuntimeError):
    """Jobs failed. Its text has a line for each: stage, job, reason."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and stopped; nothing is lost."""


@dataclass(frozen=True)
class Pipeline:
    """What stages run with.

    Attributes:
        storage: URL below which each experiment has its folder.
        cluster: where the jobs run.
        sizes: of the data set.
        images: reference to a `data.sources.Images`.
        stopping: says whether the run is to stop.
        again: the command that resumes the run, for people.
        pid: of the driver's process, which owns the locks: trials of a sweep act on its behalf.
    """

    storage: str
    cluster: Cluster
    sizes: Sizes
    images: Any
    stopping: Callable[[], bool]
    again: str
    pid: int

    def run(
        self,
        experiments: Sequence[Experiment],
        stages: Sequence[str],
        progress: Progress,
        model: str | None = None,
    ) -> None:
        """Run the given stages of experiments on one data set; of jobs with equal results, one runs.

        Args:
            experiments: decide the numbers.
            stages: some of `experiment.STAGES`.
            progress: is given every event.
            model: run only the jobs of this one; None: of all.

        Raises:
            Held: if another run owns one of the experiments, or took it over; then all jobs have been cancelled.
            StorageFailed: if the store fails; the files in it are whole.
            StageFailed: if jobs failed, after all others have ended that do not depend on them.
            Interrupted: if `stopping` became true before all jobs were done.
        """
        stores = {experiment: experiment.store(self.storage) for experiment in experiments}
        everything = [job for e in experiments for stage in STAGES for job in jobs.jobs(e, stage, self.sizes)]
        allocations = allocate(jobs.deduplicate(everything, ()), self.cluster.resources)
        with _held(stores, self.sizes, progress, self.again, self.pid) as standing:
            todo = [job for job in jobs_left(stores, stages, self.sizes) if model in (None, job.model)]
            for experiment, store in standing.stores.items():
                merge.forget(store, {job.evaluation_file for job in todo if job.experiment == experiment})
            with progress.watching(todo):
                fenced = {experiment.folder: store for experiment, store in standing.stores.items()}
                events = self.cluster.run(todo, allocations, fenced, self.images, progress.title, self.stopping)
                with closing(events):  # which cancels what still runs
                    for event in events:
                        standing.fail_if_lost()
                        progress.update(event)
                        standing.update(event)
            if failures := [f"stage {j.stage}, {progress.title(j)}: {reason}" for j, reason in standing.failures]:
                raise StageFailed("\n".join(failures))
            if self.stopping() and standing.ended < len(todo):
                raise Interrupted


@contextmanager
def opened(
    experiments: Sequence[Experiment],
    storage: str,
    connect: Callable[[], AbstractContextManager[Cluster]],
    data_folder: Path,
    progress: Progress,
    stopping: Callable[[], bool],
    again: str,
) -> Iterator[Pipeline]:
    """The pipeline for experiments on one data set, while the body runs.

    Args:
        experiments: that it will run.
        connect: context manager of the Ray cluster to run on.
        data_folder: where downloaded data sets lie.
        storage, progress, stopping, again: as in `Pipeline`.

    Raises:
        InvalidInput, DataUnavailable: before anything is written.
        Held: if another run owns one of the experiments.
    """
    for experiment in experiments:
        lock.fail_if_locked(experiment.store(storage))
    data = experiments[0].data
    images = sources.load(data, data_folder)
    for experiment in experiments:
        _refuse_too_few_classes(experiment, images.classes)
    with connect() as cluster:
        progress.started(cluster)
        where = Store(storage, "").url  # absolute: trials have working directories of their own
        yield Pipeline(where, cluster, sources.sizes(data), cluster.share(images), stopping, again, os.getpid())


def run(
    experiments: Sequence[Experiment],
    stages: Sequence[str],
    storage: str,
    connect: Callable[[], AbstractContextManager[Cluster]],
    data_folder: Path,
    progress: Progress,
    stopping: Callable[[], bool],
    again: str,
) -> None:
    """Run the given stages of experiments; arguments and errors as of `opened` and `Pipeline.run`."""
    stores = {experiment: experiment.store(storage) for experiment in experiments}
    sizes = sources.sizes(experiments[0].data)
    todo = jobs_left(stores, stages, sizes)
    progress.planned(stages, todo)
    if todo:
        with opened(experiments, storage, connect, data_folder, progress, stopping, again) as pipeline:
            pipeline.run(experiments, stages, progress)
    else:
        tell_last_word(stores, sizes, progress, again)


def jobs_left(stores: Mapping[Experiment, Store], stages: Sequence[str], sizes: Sizes) -> list[jobs.Job]:
    """What is to be done.

    Phase 1, algorithms 1 and 2: every expert on its own. Phase 2, algorithm 3: experts and gate, end to end.
    Table 3: every model under every attack. What a job needs (`Job.inputs`) is what keeps this order.

    Raises:
        InvalidInput: if a given stage needs one that is neither given nor done.
    """
    unfinished = {e: jobs.pending(e, store, sizes) for e, store in stores.items()}
    todo = [job for left in unfinished.values() for job in jobs.select(left, stages)]
    left = {job for stage in unfinished.values() for jobs in stage.values() for job in jobs}
    done = (job for e in stores for stage in STAGES for job in jobs.jobs(e, stage, sizes) if job not in left)
    return jobs.deduplicate(sorted(todo, key=lambda job: STAGES.index(job.stage)), done)


def tell_last_word(stores: Mapping[Experiment, Store], sizes: Sizes, progress: Progress, again: str) -> None:
    """Finish the bookkeeping of killed runs: merge shards, write the final state."""
    with _held(_untold(stores, sizes), sizes, progress, again, os.getpid()):
        return


def _untold(stores: Mapping[Experiment, Store], sizes: Sizes) -> dict[Experiment, Store]:
    """The experiments that no run owns, and whose final state is missing or wrong, or whose shards are not merged."""
    stale = {}
    for experiment, store in stores.items():
        state = lock.final_state(store)
        complete = not any(jobs.pending(experiment, store, sizes).values())
        unmerged = merge.unmerged(store, _shards(experiment, sizes))
        if not lock.is_locked(store) and (state is None or (state == "done") != complete or unmerged):
            stale[experiment] = store
    return stale


@contextmanager
def _held(
    stores: Mapping[Experiment, Store], sizes: Sizes, progress: Progress, again: str, pid: int
) -> Iterator[Standing]:
    """Own the locks of experiments while the body runs, then merge the shards of their evaluations.

    Raises:
        Held: if another run owns one of them, or takes it over.
    """

    def acquire(experiment: Experiment) -> lock.Lock:
        stores[experiment].preflight()
        taken = lock.acquire(stores[experiment], pid=pid)
        try:
            taken.store.write("experiment.json", experiment.to_json().encode())
        except LockLost as error:
            raise taken.loss() from error
        return taken

    # All at once: for each, it may take twenty seconds to see that its former owner is dead.
    with ThreadPoolExecutor(max(1, len(stores))) as threads:
        leases = dict(zip(stores, threads.map(acquire, stores), strict=True))
    with Standing(leases, sizes, again).told() as standing:
        stores = standing.stores
        standing.count()
        try:
            yield standing
        except (StageFailed, Interrupted):
            _merge(stores, sizes)
            raise
        _merge(stores, sizes)


def _refuse_too_few_classes(experiment: Experiment, classes: int) -> None:
    for name in experiment.suites(experiment.defended):
        if classes < (needed := SUITES[name].classes):
            raise InvalidInput(
                f"evaluation.beyond: {name!r} cannot be used: it needs {needed} classes, the images have {classes}"
            )


def _merge(stores: Mapping[Experiment, Store], sizes: Sizes) -> None:
    """Put together what the slices of the test set came to, for each model and family that is complete."""
    for experiment, store in stores.items():
        merge.merge(store, _shards(experiment, sizes))


def _shards(experiment: Experiment, sizes: Sizes) -> dict[str, list[str]]:
    """For each file of `evaluations` the files of its shards, in the order of the test set."""
    slices: dict[str, list[jobs.Job]] = {}
    for job in jobs.jobs(experiment, "evaluate", sizes):
        if job.suite != CHECKS:
            slices.setdefault(job.evaluation_file, []).append(job)
    return {file: [job.file for job in sorted(jobs, key=lambda job: job.first)] for file, jobs in slices.items()}
