"""A run of experiments, or of a sweep of them, from the first job to the last merged table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from dwf_cluster.cluster.driver import Cluster
from dwf_cluster.cluster.events import Connected, Listener, Listeners, Planned
from dwf_cluster.data import corruption_files, sources
from dwf_cluster.defences.registry import OWN_MODEL, WEIGHTS
from dwf_cluster.evaluation.registry import SUITES
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline.stages import Connection, pending_jobs, repair_status
from dwf_cluster.pipeline.sweep import Sweep
from dwf_cluster.pipeline.trial_table import TrialTable
from dwf_cluster.plan import jobs
from dwf_cluster.plan.jobs import STAGES
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import Store, lock


@dataclass(frozen=True)
class Run:
    """The environment of a run: everything that it needs besides the experiments.

    Attributes:
        storage: URL below which each experiment has its folder.
        data_folder: where downloaded data sets are.
        connect: context manager of the Ray cluster to run on; entered only if jobs are pending.
        emit: called with every event, from one thread at a time. Its first exception becomes a warning.
        stopping: whether the run is to stop: then trainings save what they have.
        resume_command: for people.
    """

    storage: str
    data_folder: Path
    connect: Callable[[], AbstractContextManager[Cluster]]
    emit: Listener
    stopping: Callable[[], bool]
    resume_command: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "emit", Listeners({"listener": self.emit}))

    def experiments(self, experiments: Sequence[Experiment], stages: Sequence[str]) -> None:
        """Run the given stages of experiments on one data set.

        Raises:
            InvalidInput, DataUnavailable: before anything is written.
            RayNotStarted, ExperimentLocked, StorageFailed, StageFailed, Interrupted: see `Connection.run_stages`.
        """
        if self._plan(experiments, stages):
            with self.connected(experiments, seed_names(experiments)) as connection:
                connection.run_stages(experiments, stages, self.emit, self.stopping)

    def sweep(self, sweep: Sweep) -> TrialTable:
        """Run a sweep to its end; a trial that fails does not stop the others. Errors as for `experiments`."""
        table = TrialTable(sweep, self.storage)
        trials = [trial for trial in sweep.trials if not table.is_stopped_early(trial)]
        experiments = [trial.experiment for trial in trials]
        if self._plan(experiments, STAGES):
            with self.connected(experiments, sweep.names) as connection:
                from dwf_cluster.pipeline.trials import Trials  # imports Ray Tune, which takes seconds

                Trials(sweep, trials, table, connection, self.emit, self.stopping).run()
        else:
            table = TrialTable(sweep, self.storage)  # shards may have been merged
            table.write()
        return table

    @contextmanager
    def connected(self, experiments: Sequence[Experiment], names: Mapping[str, str]) -> Iterator[Connection]:
        """Load the data set and connect to Ray while the body runs.

        Args:
            experiments: on one data set.
            names: display names of the experiments, by their folders; a single experiment has none.

        Raises:
            InvalidInput, DataUnavailable: before anything is written.
            RayNotStarted: if Ray does not start.
            ExperimentLocked: if another run owns one of the experiments.
        """
        for experiment in experiments:
            lock.fail_if_locked(experiment.store(self.storage))
        data = experiments[0].data
        images = sources.load(data, self.data_folder)
        if severities := {severity for experiment in experiments for severity in experiment.corruption_files}:
            corrupted = corruption_files.read(images, data, self.data_folder, severities)
            images = replace(images, corrupted=corrupted)
        for experiment in experiments:
            _check_classes(experiment, images.classes)
            _check_weights(experiment, experiment.store(self.storage), images)
        if data.test_examples is not None and any(experiment.given for experiment in experiments):
            whole = sources.load(data.model_copy(update={"test_examples": None}), self.data_folder)
            images = replace(images, whole_test=(whole.x_test, whole.y_test))
        with self.connect() as cluster:
            self.emit(Connected(cluster.dashboard, cluster.token_file))
            storage = Store(self.storage, "").url  # absolute: trials have working directories of their own
            sizes, reference = sources.sizes(data), cluster.share(images)
            yield Connection(storage, cluster, sizes, reference, names, self.resume_command, os.getpid())

    def _plan(self, experiments: Sequence[Experiment], stages: Sequence[str]) -> bool:
        """Report the pending jobs and return whether there are any; if there are none, repair the status."""
        for experiment in experiments:
            check_trainable(experiment)
        stores = {experiment: experiment.store(self.storage) for experiment in experiments}
        sizes = sources.sizes(experiments[0].data) if experiments else None
        pending = pending_jobs(stores, stages, sizes) if sizes else []
        used = (stage for stage in stages if sizes and any(jobs.jobs(e, stage, sizes) for e in experiments))
        self.emit(Planned(tuple(used), tuple(pending)))
        if sizes and not pending:
            repair_status(stores, sizes, self.resume_command, os.getpid())
        return bool(pending)


def seed_names(experiments: Sequence[Experiment]) -> dict[str, str]:
    """Display names of experiments that differ in their seeds, by their folders; empty for a single one."""
    return {e.folder: f"seed {e.seed}" for e in experiments} if len(experiments) > 1 else {}


def check_trainable(experiment: Experiment) -> None:
    """Fail if the defended model cannot be trained, because it is a user's own."""
    if experiment.defence == OWN_MODEL:
        raise InvalidInput(
            f"defence: {OWN_MODEL!r} cannot be used: allowed are methods that train a model; `dwf evaluate` measures a "
            "model of your own"
        )


def _check_weights(experiment: Experiment, store: Store, images: sources.Images) -> None:
    """Fail if given weights that are not in the store yet cannot be loaded; their accuracy is not tested here."""
    for spec in experiment.models:
        if spec.method == WEIGHTS and not jobs.is_trained(spec, store):
            from dwf_cluster.defences import weights  # imports torch, which a run without them does not need here

            weights.load(spec, weights.build(spec, images.format, {}))


def _check_classes(experiment: Experiment, classes: int) -> None:
    """Fail if a suite needs more classes than the images have."""
    for name in experiment.suites(experiment.defended):
        if classes < (needed := SUITES[name].classes):
            raise InvalidInput(
                f"evaluation.beyond: {name!r} cannot be used: it needs {needed} classes, the images have {classes}"
            )
