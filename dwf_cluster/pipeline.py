"""The paper's section 4: pre-train the experts, train them jointly behind the gate, attack them all.

What the store holds already is skipped; what was interrupted goes on from its last epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dwf_cluster import plan
from dwf_cluster.cluster.placement import Resources
from dwf_cluster.cluster.ray import local
from dwf_cluster.data import sources
from dwf_cluster.data.sources import Sizes
from dwf_cluster.experiment import Experiment, InvalidInput
from dwf_cluster.grid import AUTOATTACK_CLASSES, CHECKS
from dwf_cluster.progress import Progress
from dwf_cluster.store import Store, shards


class StageFailed(RuntimeError):
    """A stage that did not end well. Its text has a line for each job that failed: stage, job, reason."""


def run(
    experiment: Experiment,
    store: Store,
    resources: Resources,
    stages: Sequence[str],
    data_folder: Path,
    progress: Progress,
) -> None:
    """Run the given stages of an experiment, in the paper's order.

    Args:
        experiment: decides the numbers.
        store: holds what is done, takes what comes out.
        resources: where it runs.
        stages: some of `experiment.STAGES`.
        data_folder: where downloaded data sets lie.
        progress: is told what happens.

    Raises:
        InvalidInput, DataUnavailable: before anything is written.
        StageFailed: after the other jobs of the stage have ended.
    """
    sizes = sources.sizes(experiment.data)
    todo = plan.unfinished(experiment, store, stages, sizes)
    progress.planned(todo)
    if not any(todo.values()):
        _merge(experiment, store, stages, sizes)  # killed before it came to that
        return
    images = sources.load(experiment.data, data_folder)
    if "autoattack" in experiment.evaluation.beyond and images.classes < AUTOATTACK_CLASSES:
        raise InvalidInput(
            f"evaluation.beyond: 'autoattack' cannot be used: it needs {AUTOATTACK_CLASSES} classes, "
            f"the images have {images.classes}"
        )
    try:
        store.write("experiment.json", experiment.to_json().encode())
    except OSError as error:
        raise InvalidInput(f"--storage: {store.url!r} cannot be written: {error.strerror or error}") from None
    with local(resources) as cluster:
        progress.started(cluster)
        data = cluster.share(images)

        def stage(name: str) -> None:
            jobs = todo.get(name, [])
            failures = []
            with progress.watching(jobs):
                for event in cluster.run(jobs, experiment, store, data):
                    progress.update(event)
                    if event and event[1]:
                        failures.append(f"stage {name}, {event[0].name}: {event[1]}")
            if failures:
                raise StageFailed("\n".join(failures))

        stage("experts")  # phase 1, algorithms 1 and 2: every expert on its own
        stage("joint")  # phase 2, algorithm 3: experts and gate, end to end
        try:
            stage("evaluate")  # table 3: every model under every attack
        finally:
            _merge(experiment, store, stages, sizes)


def _merge(experiment: Experiment, store: Store, stages: Sequence[str], sizes: Sizes) -> None:
    """Put together what the slices of the test set came to, for each model and family that is complete."""
    slices: dict[str, list[plan.Job]] = {}
    for job in plan.jobs(experiment, "evaluate", sizes) if "evaluate" in stages else ():
        if job.family != CHECKS:
            slices.setdefault(job.merged_file, []).append(job)
    for file, jobs in slices.items():
        shards.merge(store, file, [job.file for job in sorted(jobs, key=lambda job: job.first)])
