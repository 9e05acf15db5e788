"""Running a sweep on Ray Tune.

First the experts of all trials: of equal ones, one is trained. Then the joint stage of each experiment and the
evaluation of its defended model, as trials of Ray Tune: one for each experiment or, with ASHA, one for each setting and
all of its seeds. Then the remaining evaluations, equal ones once. Jobs whose results the store has are skipped, so a
sweep that was interrupted, or has more trials than before, resumes.

ASHA judges settings, not seeds: it compares the means over the seeds of a setting at equal epochs, and stops all of its
seeds together. If it stopped single seeds, the mean of those that are left would be too high, and their standard
deviation too small. Seeds rarely train all at once, so each pauses after the epochs at which ASHA compares.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dwf_cluster.cluster.events import Ended, Epoch, Event, Listener, Note
from dwf_cluster.cluster.failures import error_summary
from dwf_cluster.cluster.tune import METRIC, OUTCOMES, TIME, run_trials, rungs
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline.stages import Connection, Interrupted, StageFailed, pending_jobs, repair_status
from dwf_cluster.pipeline.sweep import Sweep, Trial
from dwf_cluster.pipeline.trial_table import STOPPED_EARLY, TrialTable, headline, results
from dwf_cluster.plan import jobs
from dwf_cluster.plan.jobs import EVALUATE, EXPERTS, JOINT, STAGES, Job
from dwf_cluster.plan.resources import allocate
from dwf_cluster.store import StorageFailed, Store, tables
from dwf_cluster.store.lock import ExperimentLocked


class Trials:
    """The trials of a sweep while they run.

    Args:
        sweep: whose trials.
        trials: those that ASHA has not stopped before.
        table: is kept up to date, and written when a trial ends.
        connection: to run on.
        emit: called with every event.
        stopping: whether the run is to stop.
    """

    def __init__(
        self,
        sweep: Sweep,
        trials: Sequence[Trial],
        table: TrialTable,
        connection: Connection,
        emit: Listener,
        stopping: Callable[[], bool],
    ) -> None:
        self._sweep, self._trials, self._table = sweep, trials, table
        self._connection, self._emit, self._stopping = connection, emit, stopping
        self._failures: list[str] = []
        self._running: dict[str, Job] = {}  # the joint training of each experiment, by its folder
        self._groups: dict[str, list[Trial]] = {}  # the trials of the sweep in each trial of Tune, by its name
        self._has_asked_to_stop = False

    def run(self) -> None:
        """Run all stages.

        Raises:
            StageFailed: if jobs or trials failed, after all others have ended.
            Interrupted: if the run was asked to stop.
        """
        stores = self._connection.stores([trial.experiment for trial in self._trials])
        self._run_stages(list(stores), (EXPERTS,))
        trained = []
        for trial in self._trials:
            pending = jobs.pending(trial.experiment, stores[trial.experiment], self._connection.sizes)
            if pending[EXPERTS]:
                self._table.record(trial.name, "failed")
            else:
                trained.append(trial)
        try:
            self._run_trials(trained)
        finally:
            self._table.write()
        if self._stopping():
            raise Interrupted
        evaluated = [t for t in trained if results(t.experiment, stores[t.experiment])]
        self._run_stages([t.experiment for t in evaluated], STAGES)
        self._complete(evaluated)
        if self._failures:
            raise StageFailed("\n".join(self._failures))

    def _run_stages(self, experiments: Sequence[Experiment], stages: Sequence[str]) -> None:
        """Run the pending jobs of some stages, if there are any; keep the failures."""
        connection = self._connection
        if pending_jobs(connection.stores(experiments), stages, connection.sizes):
            try:
                connection.run_stages(experiments, stages, self._emit, self._stopping)
            except StageFailed as error:
                self._failures += str(error).splitlines()

    def _complete(self, trials: Sequence[Trial]) -> None:
        """Add results that came last: the worst case counts images that are made on the other models."""
        connection = self._connection
        stores = connection.stores([trial.experiment for trial in trials])
        repair_status(stores, connection.sizes, connection.resume_command, connection.pid)
        for trial in trials:
            self._table.record(trial.name, "done", results(trial.experiment, stores[trial.experiment]))
        self._table.write()

    def _run_trials(self, trials: Sequence[Trial]) -> None:
        """Joint stage and evaluation of each defended model, as trials of Ray Tune."""
        connection = self._connection
        stores = connection.stores([trial.experiment for trial in trials])
        pending = pending_jobs(stores, STAGES, connection.sizes)
        folders = {job.folder for job in pending if job.model == job.experiment.defended.name}
        folders |= {e.folder for e, store in stores.items() if not results(e, store)}  # shards that are not merged
        if not folders:
            return
        asha = self._sweep.asha
        for trial in trials:
            # With ASHA also settings that are done: it compares the others with them.
            if asha or trial.experiment.folder in folders:
                name = trial.setting if asha else trial.name
                self._groups.setdefault(name or trial.experiment.preset, []).append(trial)
        running = [trial.experiment for group in self._groups.values() for trial in group]
        self._running = {experiment.folder: self._joint(experiment) for experiment in running}
        seeds = len(next(iter(self._sweep.settings.values()))) if asha else 1
        joint = self._running[running[0].folder]
        resources = connection.cluster.resources
        at_once = int(resources.slots / allocate([joint], resources)[joint].slots / seeds)
        epochs = max(experiment.defended.training.epochs for experiment in running)
        run_trials(
            list(self._groups),
            _Work(self._groups, seeds, tuple(rungs(epochs)) if seeds > 1 else (), connection),
            concurrent=1 + max(1, at_once),  # at least two: while one is evaluated, another trains
            asha_epochs=epochs if asha else None,
            on_report=self._on_report,
            on_end=self._on_end,
            on_step=self._pass_on_stop,
        )

    def _joint(self, experiment: Experiment) -> Job:
        """The training of an experiment's defended model; without parents, it is one of the experts' stage."""
        model, stage = experiment.defended.name, JOINT if experiment.defended.parents else EXPERTS
        return next(job for job in jobs.jobs(experiment, stage, self._connection.sizes) if job.model == model)

    def _on_report(self, name: str, report: Mapping[str, Any]) -> None:
        self._emit(Epoch(self._running[report["folder"]], report["row"], is_replayed=report["replayed"]))

    def _on_end(self, name: str, report: Mapping[str, Any] | None, fault: str) -> None:
        for trial in self._groups[name]:
            accuracies = results(trial.experiment, trial.experiment.store(self._connection.storage))
            if report:
                state, reason = report[OUTCOMES][trial.name]
            elif accuracies:
                state, reason = "done", ""
            elif fault:
                state, reason = "failed", fault
            else:
                state, reason = "stopped" if self._stopping() else STOPPED_EARLY, ""
            self._failures.extend(f"trial {trial.name}: {line}" for line in reason.splitlines())
            named = self._table.record(trial.name, state, accuracies)
            shown = "".join(f", {column} {accuracy:.1%}" for column, accuracy in headline(named).items())
            self._emit(Note(f"{trial.name}: {reason or state}{shown}"))
        self._table.write()

    def _pass_on_stop(self) -> None:
        """Ask the trials to stop, once, if the run is to stop."""
        if self._stopping() and not self._has_asked_to_stop:
            self._has_asked_to_stop = True
            self._connection.cluster.stop(self._running)


@dataclass(frozen=True)
class _Work:
    """The work of a trial of Tune, in a separate process.

    Attributes:
        groups: the trials of the sweep that each trial of Tune runs together, by its name.
        seeds: number of trials of a complete group; ASHA does not judge the others.
        rungs: epochs after which the trainings of a group wait for each other.
        connection: to run on.
    """

    groups: Mapping[str, Sequence[Trial]]
    seeds: int
    rungs: Sequence[int]
    connection: Connection

    def __call__(
        self, name: str, report: Callable[[Mapping[str, Any]], None], stopping: Callable[[], bool]
    ) -> Mapping[str, Any]:
        """Train and evaluate the defended models of a group.

        Returns:
            The mean after the last epoch, and the outcome of each trial: its state, and why it failed.
        """
        connection, trials = self.connection, self.groups[name]
        stores = connection.stores([trial.experiment for trial in trials])
        model = trials[0].experiment.defended
        epochs = _Epochs([trial.experiment.folder for trial in trials], self.seeds, model.training.epochs, report)
        for experiment, store in stores.items():
            for row in tables.read(store, "metrics", [model.name]).to_pylist():
                epochs.add(experiment.folder, row, is_replayed=True)

        def is_stopped() -> bool:  # a group's experiments are stopped together
            return stopping() or connection.cluster.is_stopped(trials[0].experiment.folder)

        try:
            self._run(stores, epochs, is_stopped)
            state, reason = "failed", ""
        except Interrupted:
            state, reason = "stopped", ""
        except (StorageFailed, ExperimentLocked) as error:
            state, reason = "failed", str(error)
        except Exception as error:  # of any class: Tune would run it again, and again
            state, reason = "failed", error_summary(error)

        def outcome(experiment: Experiment) -> tuple[str, str]:
            if lines := epochs.failures.get(experiment.folder):
                return "failed", "\n".join(lines)
            return ("done", "") if results(experiment, stores[experiment]) else (state, reason)

        return {**epochs.mean, OUTCOMES: {trial.name: outcome(trial.experiment) for trial in trials}}

    def _run(self, stores: Mapping[Experiment, Store], epochs: _Epochs, is_stopped: Callable[[], bool]) -> None:
        """Run the pending jobs of a group. A seed that fails does not stop the others; `epochs` has the reason."""
        # ASHA does not judge a group that lacks seeds, so its trainings do not wait for each other.
        pauses = self.rungs if len(stores) == self.seeds else ()
        phases: list[tuple[tuple[str, ...], int | None]] = [((JOINT,), epoch) for epoch in pauses]
        # In the first of these calls no evaluation starts after a training has failed.
        phases += [((JOINT, EVALUATE), None), ((EVALUATE,), None)]
        for stages, until in phases:
            remaining = [
                experiment
                for experiment, store in stores.items()
                if experiment.folder not in epochs.failures
                and (until is None or epochs.trained(experiment.folder) < min(until, epochs.count))
                and not results(experiment, store)
            ]
            if not remaining or (until and epochs.failures):
                continue
            if is_stopped():
                raise Interrupted
            try:
                model = remaining[0].defended.name
                self.connection.run_stages(remaining, stages, epochs.receive, is_stopped, model, until)
            except StageFailed:
                continue


class _Epochs:
    """Reports each epoch of a group's trainings, and the mean of their probes once all of them have reached an epoch.

    The mean after the last epoch is only in `mean`: a trial that has nothing left to train is not stopped early.

    Args:
        folders: of the group's experiments.
        seeds: number of experiments of a complete group; of others no mean is reported.
        count: number of all epochs.
        report: called with `folder`, `row` (of `metrics`), `replayed` (whether nothing new was trained), and with
            `tune.TIME` and `tune.METRIC` if there is a new mean.

    Attributes:
        count: number of all epochs.
        mean: the newest `tune.TIME` and `tune.METRIC`; epoch 0 before there is one.
        failures: a line for each failed job, by the experiment's folder.
    """

    def __init__(
        self, folders: Sequence[str], seeds: int, count: int, report: Callable[[Mapping[str, Any]], None]
    ) -> None:
        self._probes: dict[str, dict[int, float]] = {folder: {} for folder in folders}
        self._seeds, self.count, self._report = seeds, count, report
        self.mean: Mapping[str, Any] = {TIME: 0, METRIC: 0.0}
        self.failures: dict[str, list[str]] = {}

    def receive(self, event: Event) -> None:
        """Handle an event of the group's jobs."""
        if isinstance(event, Epoch):
            self.add(event.job.folder, event.row, event.is_replayed)
        elif isinstance(event, Ended) and event.state == "failed":
            line = f"stage {event.job.stage}, {event.job.name}: {event.reason}"
            self.failures.setdefault(event.job.folder, []).append(line)

    def trained(self, folder: str) -> int:
        """The newest epoch of an experiment's training; 0 before the first."""
        return max(self._probes[folder], default=0)

    def add(self, folder: str, row: Mapping[str, Any], is_replayed: bool) -> None:
        """Take a row of `metrics`, if it is new."""
        epoch, probes = row["epoch"], self._probes[folder]
        if epoch <= self.trained(folder):
            return
        probes[epoch] = row["probe_pgd_accuracy"]
        # The note at the trial's end says more than a line for the last epoch.
        report = {"folder": folder, "row": row, "replayed": is_replayed or epoch == self.count}
        reached = [other[epoch] for other in self._probes.values() if epoch in other]
        if len(reached) == self._seeds:
            self.mean = {TIME: epoch, METRIC: fmean(reached)}
            if epoch < self.count:
                report |= self.mean
        self._report(report)
