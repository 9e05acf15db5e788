"""The paper's section 4: pre-train the experts, train them jointly behind the gate, attack them all.

What the store holds already is skipped; what was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path

from dwf_cluster import plan
from dwf_cluster.cluster.placement import place
from dwf_cluster.cluster.ray import Cluster
from dwf_cluster.data import sources
from dwf_cluster.data.sources import Sizes
from dwf_cluster.experiment import STAGES, Experiment, InvalidInput
from dwf_cluster.grid import AUTOATTACK_CLASSES, CHECKS
from dwf_cluster.progress import Progress
from dwf_cluster.standing import Standing
from dwf_cluster.store import Store, checkpoints, lease, shards


class StageFailed(RuntimeError):
    """A stage that did not end well. Its text has a line for each job that failed: stage, job, reason."""


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop, and did; nothing is lost."""


def run(
    experiments: Sequence[Experiment],
    storage: str,
    connect: Callable[[], AbstractContextManager[Cluster]],
    stages: Sequence[str],
    data_folder: Path,
    progress: Progress,
    stopping: Callable[[], bool],
    again: str,
) -> None:
    """Run the given stages of experiments that differ in their seeds only.

    Args:
        experiments: decide the numbers.
        storage: URL below which each has its folder, that holds what is done and takes what comes out.
        connect: gives the Ray to run on, while the body of its `with` runs.
        stages: some of `experiment.STAGES`.
        data_folder: where downloaded data sets lie.
        progress: is told what happens.
        stopping: says whether the run is to stop.
        again: the command that resumes the run, for people.

    Raises:
        InvalidInput, DataUnavailable: before anything is written.
        Held: if somebody else runs one of the experiments.
        StorageFailed: if the store does not do what it must; what it holds is whole.
        StageFailed: after all has ended that did not need what failed.
        Interrupted: if `stopping` became true before all was done.
    """
    data = experiments[0].data
    sizes = sources.sizes(data)
    stores = {experiment: Store(storage, experiment.folder) for experiment in experiments}
    todo = _todo(stores, stages, sizes)
    progress.planned(stages, todo)
    if not todo:
        with _held(_untold(stores, sizes), sizes, progress, again):  # by runs that were killed before their last word
            return
    for store in stores.values():
        lease.refuse_held(store)
    images = sources.load(data, data_folder)
    _refuse_too_few_classes(experiments[0], images.classes)
    with connect() as cluster:
        everything = [job for e in experiments for stage in STAGES for job in plan.jobs(e, stage, sizes)]
        places = place(everything, cluster.resources)
        with _held(stores, sizes, progress, again) as standing:
            progress.started(cluster)
            todo = _todo(stores, stages, sizes)  # now that nobody else changes it
            shared = cluster.share(images)
            with progress.watching(todo):
                for event in cluster.run(
                    todo, places, storage, shared, progress.title, lambda: stopping() or standing.is_lost
                ):
                    progress.update(event)
                    standing.update(event)
            if failures := [f"stage {j.stage}, {progress.title(j)}: {reason}" for j, reason in standing.failures]:
                raise StageFailed("\n".join(failures))
            if stopping() and standing.ended < len(todo):
                raise Interrupted


def _todo(stores: Mapping[Experiment, Store], stages: Sequence[str], sizes: Sizes) -> list[plan.Job]:
    """What is to be done.

    Phase 1, algorithms 1 and 2: every expert on its own. Phase 2, algorithm 3: experts and gate, end to end.
    Table 3: every model under every attack. What a job needs (`Job.needs`) is what keeps this order.
    """
    jobs = chain(*(plan.select(plan.unfinished(e, store, sizes), stages) for e, store in stores.items()))
    return sorted(jobs, key=lambda job: STAGES.index(job.stage))


def _untold(stores: Mapping[Experiment, Store], sizes: Sizes) -> dict[Experiment, Store]:
    """The experiments that nobody runs, and whose last word is not how they stand."""
    untold = {}
    for experiment, store in stores.items():
        word = lease.last_word(store)
        complete = not any(plan.unfinished(experiment, store, sizes).values())
        if not lease.is_held(store) and (word is None or (word == "done") != complete):
            untold[experiment] = store
    return untold


@contextmanager
def _held(stores: Mapping[Experiment, Store], sizes: Sizes, progress: Progress, again: str) -> Iterator[Standing]:
    """Hold experiments while the body runs: nobody else does. At its end, put together what it came to."""
    leases = {}
    for experiment, store in stores.items():
        store.check()
        leases[experiment] = lease.take(store)
        store.sweep()
        store.write("experiment.json", experiment.to_json().encode())  # what the results are results of
    with Standing(leases, sizes, again).told() as standing:
        for experiment, store in stores.items():
            for model in plan.models(experiment):
                if line := checkpoints.discard_damaged(store, model):
                    progress.say(f"warning: {line}")
        standing.count()
        try:
            yield standing
        except (StageFailed, Interrupted):
            _merge(stores, sizes)
            raise
        _merge(stores, sizes)


def _refuse_too_few_classes(experiment: Experiment, classes: int) -> None:
    if "autoattack" in experiment.evaluation.beyond and classes < AUTOATTACK_CLASSES:
        raise InvalidInput(
            f"evaluation.beyond: 'autoattack' cannot be used: it needs {AUTOATTACK_CLASSES} classes, "
            f"the images have {classes}"
        )


def _merge(stores: Mapping[Experiment, Store], sizes: Sizes) -> None:
    """Put together what the slices of the test set came to, for each model and family that is complete."""
    for experiment, store in stores.items():
        slices: dict[str, list[plan.Job]] = {}
        for job in plan.jobs(experiment, "evaluate", sizes):
            if job.family != CHECKS:
                slices.setdefault(job.merged_file, []).append(job)
        shards.merge(store, {f: [j.file for j in sorted(js, key=lambda j: j.first)] for f, js in slices.items()})
