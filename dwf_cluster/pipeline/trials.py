"""Running a sweep on Ray Tune.

First the experts of all trials: of equal ones, one is trained. Then a Tune trial for each experiment: its joint stage
and the evaluation of its defended model. Then the remaining evaluations, equal ones once. Jobs whose results the store
has are skipped, so a sweep that was interrupted, or has more trials than before, resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dwf_cluster.cluster.events import Epoch, Event, Listener, Note
from dwf_cluster.cluster.failures import error_summary
from dwf_cluster.cluster.tune import run_trials
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline.stages import Connection, Interrupted, StageFailed, pending_jobs, repair_status
from dwf_cluster.pipeline.sweep import Trial
from dwf_cluster.pipeline.trial_table import STOPPED_EARLY, TrialTable, headline, results
from dwf_cluster.plan import jobs
from dwf_cluster.plan.jobs import EVALUATE, EXPERTS, JOINT, STAGES, Job
from dwf_cluster.plan.resources import allocate
from dwf_cluster.store import StorageFailed, tables
from dwf_cluster.store.lock import ExperimentLocked


class Trials:
    """The trials of a sweep while they run.

    Args:
        asha: whether trials that fall behind are stopped early.
        trials: those that ASHA has not stopped before.
        table: is kept up to date, and written when a trial ends.
        connection: to run on.
        emit: called with every event.
        stopping: whether the run is to stop.
    """

    def __init__(
        self,
        asha: bool,
        trials: Sequence[Trial],
        table: TrialTable,
        connection: Connection,
        emit: Listener,
        stopping: Callable[[], bool],
    ) -> None:
        self._asha, self._trials, self._table = asha, trials, table
        self._connection, self._emit, self._stopping = connection, emit, stopping
        self._failures: list[str] = []
        self._running: dict[str, Job] = {}  # the joint training of each trial, by the trial's name
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
        # With ASHA also trials that are done: it compares the others with them.
        chosen = {t.name: t.experiment for t in trials if self._asha or t.experiment.folder in folders}
        self._running = {name: self._joint(experiment) for name, experiment in chosen.items()}
        joint = next(iter(self._running.values()))
        resources = connection.cluster.resources
        at_once = int(resources.slots / allocate([joint], resources)[joint].slots)
        epochs = max(experiment.defended.training.epochs for experiment in chosen.values())
        run_trials(
            list(chosen),
            _Work(chosen, connection),
            concurrent=1 + max(1, at_once),  # at least two: while one is evaluated, another trains
            asha_epochs=epochs if self._asha else None,
            on_report=self._on_report,
            on_end=self._on_end,
            on_step=self._pass_on_stop,
        )

    def _joint(self, experiment: Experiment) -> Job:
        """The training of an experiment's defended model; without parents, it is one of the experts' stage."""
        model, stage = experiment.defended.name, JOINT if experiment.defended.parents else EXPERTS
        return next(job for job in jobs.jobs(experiment, stage, self._connection.sizes) if job.model == model)

    def _on_report(self, trial: str, report: Mapping[str, Any]) -> None:
        self._emit(Epoch(self._running[trial], report, is_replayed=report["replayed"]))

    def _on_end(self, trial: str, report: Mapping[str, Any] | None, fault: str) -> None:
        state = report["state"] if report else "failed" if fault else STOPPED_EARLY
        reason = fault or (report or {}).get("reason", "")
        self._failures.extend(f"trial {trial}: {line}" for line in reason.splitlines())
        if state == STOPPED_EARLY and self._stopping():
            state = "stopped"
        accuracies = report.get("results") if report else None
        if report and report["epoch"]:
            self._emit(Epoch(self._running[trial], report, is_replayed=True))  # the note below says more
        self._table.record(trial, state, accuracies)
        self._table.write()
        shown = "".join(f", {title} {accuracy:.1%}" for title, accuracy in headline(accuracies or {}).items())
        self._emit(Note(f"{trial}: {reason or state}{shown}"))

    def _pass_on_stop(self) -> None:
        """Ask the trials to stop, once, if the run is to stop."""
        if self._stopping() and not self._has_asked_to_stop:
            self._has_asked_to_stop = True
            self._connection.cluster.stop(job.folder for job in self._running.values())


@dataclass(frozen=True)
class _Work:
    """The work of a trial, in a separate process.

    Attributes:
        experiments: of the trials, by the trials' names.
        connection: to run on.
    """

    experiments: Mapping[str, Experiment]
    connection: Connection

    def __call__(
        self, trial: str, report: Callable[[Mapping[str, Any]], None], stopping: Callable[[], bool]
    ) -> Mapping[str, Any]:
        """Train and evaluate the defended model of a trial; the last epoch is part of the last report."""
        connection, experiment = self.connection, self.experiments[trial]
        model, store = experiment.defended, experiment.store(connection.storage)
        epochs = _Epochs(model.training.epochs, report)
        for row in tables.read(store, "metrics", [model.name]).to_pylist():
            epochs.add(row, is_replayed=True)

        def is_stopped() -> bool:
            return stopping() or connection.cluster.is_stopped(experiment.folder)

        if is_stopped():
            return {**epochs.last, "state": "stopped"}
        try:
            connection.run_stages([experiment], (JOINT, EVALUATE), epochs.receive, is_stopped, model.name)
        except Interrupted:
            return {**epochs.last, "state": "stopped"}
        except (StageFailed, StorageFailed, ExperimentLocked) as error:
            return {**epochs.last, "state": "failed", "reason": str(error)}
        except Exception as error:  # of any class: Tune would run it again, and again
            return {**epochs.last, "state": "failed", "reason": error_summary(error)}
        return {**epochs.last, "state": "done", "results": results(experiment, store)}


class _Epochs:
    """Reports each epoch of a trial's joint stage but the last, which the trial's last report contains.

    Args:
        count: of all epochs.
        report: called with each row of `metrics`, and whether an earlier run trained it.

    Attributes:
        last: the newest row; epoch 0 before there is one.
    """

    def __init__(self, count: int, report: Callable[[Mapping[str, Any]], None]) -> None:
        self._count, self._report = count, report
        self.last: Mapping[str, Any] = {"epoch": 0, "probe_pgd_accuracy": 0.0}

    def receive(self, event: Event) -> None:
        """Handle an event of the trial's jobs."""
        if isinstance(event, Epoch):
            self.add(event.row, event.is_replayed)

    def add(self, row: Mapping[str, Any], is_replayed: bool) -> None:
        """Take a row of `metrics`, if it is new."""
        if row["epoch"] > self.last["epoch"]:
            self.last = row
            if row["epoch"] < self._count:
                self._report({**row, "replayed": is_replayed})
