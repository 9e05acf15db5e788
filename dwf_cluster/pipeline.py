"""The paper's section 4: pre-train the experts, train them jointly behind the gate, attack them all.

What the store holds already is skipped; what was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from dwf_cluster import plan
from dwf_cluster.cluster.placement import place
from dwf_cluster.cluster.ray import Cluster, Ended
from dwf_cluster.data import sources
from dwf_cluster.data.sources import Sizes
from dwf_cluster.experiment import STAGES, Experiment, InvalidInput
from dwf_cluster.grid import AUTOATTACK_CLASSES, CHECKS
from dwf_cluster.progress import Progress
from dwf_cluster.store import Store, shards


class StageFailed(RuntimeError):
    """A stage that did not end well. Its text has a line for each job that failed: stage, job, reason."""


class Interrupted(RuntimeError):
    """The run was asked to stop, and did; nothing is lost."""


def run(
    experiments: Sequence[Experiment],
    storage: str,
    connect: Callable[[], AbstractContextManager[Cluster]],
    stages: Sequence[str],
    data_folder: Path,
    progress: Progress,
    stopping: Callable[[], bool],
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

    Raises:
        InvalidInput, DataUnavailable: before anything is written.
        StageFailed: after all has ended that did not need what failed.
        Interrupted: if `stopping` became true before all was done.
    """
    data = experiments[0].data
    sizes = sources.sizes(data)
    todo: list[plan.Job] = []
    for stage in STAGES:
        # Phase 1, algorithms 1 and 2: every expert on its own. Phase 2, algorithm 3: experts and gate, end to end.
        # Table 3: every model under every attack. What a job needs (`Job.needs`) is what keeps this order.
        for experiment in experiments:
            todo += plan.unfinished(experiment, Store(storage, experiment.folder), stages, sizes).get(stage, [])
    progress.planned(stages, todo)
    try:
        if not todo:
            return
        images = sources.load(data, data_folder)
        _refuse_too_few_classes(experiments[0], images.classes)
        with connect() as cluster:
            _write_down(experiments, storage)
            progress.started(cluster)
            everything = [job for e in experiments for stage in STAGES for job in plan.jobs(e, stage, sizes)]
            places = place(everything, cluster.resources)
            failures = []
            with progress.watching(todo):
                for event in cluster.run(todo, places, storage, cluster.share(images), progress.title, stopping):
                    progress.update(event)
                    if isinstance(event, Ended) and event.state == "failed":
                        failures.append(f"stage {event.job.stage}, {progress.title(event.job)}: {event.reason}")
        if failures:
            raise StageFailed("\n".join(failures))
        if stopping() and not all(job.is_done(Store(storage, job.folder)) for job in todo):
            raise Interrupted
    finally:
        for experiment in experiments:
            _merge(experiment, Store(storage, experiment.folder), stages, sizes)


def _refuse_too_few_classes(experiment: Experiment, classes: int) -> None:
    if "autoattack" in experiment.evaluation.beyond and classes < AUTOATTACK_CLASSES:
        raise InvalidInput(
            f"evaluation.beyond: 'autoattack' cannot be used: it needs {AUTOATTACK_CLASSES} classes, "
            f"the images have {classes}"
        )


def _write_down(experiments: Sequence[Experiment], storage: str) -> None:
    """Say beside the results what they are results of."""
    for experiment in experiments:
        store = Store(storage, experiment.folder)
        try:
            store.write("experiment.json", experiment.to_json().encode())
        except OSError as error:
            raise InvalidInput(f"--storage: {store.url!r} cannot be written: {error.strerror or error}") from None


def _merge(experiment: Experiment, store: Store, stages: Sequence[str], sizes: Sizes) -> None:
    """Put together what the slices of the test set came to, for each model and family that is complete."""
    slices: dict[str, list[plan.Job]] = {}
    for job in plan.jobs(experiment, "evaluate", sizes) if "evaluate" in stages else ():
        if job.family != CHECKS:
            slices.setdefault(job.merged_file, []).append(job)
    for file, jobs in slices.items():
        shards.merge(store, file, [job.file for job in sorted(jobs, key=lambda job: job.first)])
