"""A sweep: experiments that vary some fields of one, on Ray Tune, and what they come to, in one table.

First the experts of all trials: of those that are the same, one is trained. Then a Tune trial for each experiment: its
joint stage, and what its mixture is worth. Then what is left to evaluate, of the same once. What the store holds is
skipped, so a sweep that was interrupted, or has got more trials, goes on.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from dwf_cluster.cluster.driver import Cluster
from dwf_cluster.cluster.failures import one_line
from dwf_cluster.cluster.tune import run_trials
from dwf_cluster.console.progress import Progress, epoch_line
from dwf_cluster.data import sources
from dwf_cluster.experiment import Experiment, build
from dwf_cluster.pipeline.run import Interrupted, Pipeline, StageFailed, jobs_left, opened, tell_last_word
from dwf_cluster.plan import jobs
from dwf_cluster.plan.jobs import STAGES
from dwf_cluster.plan.resources import allocate
from dwf_cluster.settings import InvalidInput, to_text
from dwf_cluster.store import StorageFailed, Store, tables
from dwf_cluster.store.lock import ExperimentLocked

MOST = 1000
"""Trials of one sweep."""

STOPPED_EARLY = "stopped early"
"""State of a trial that ASHA has ended."""

_NOT_VARIED = ("data.", "preset", "seed", "checkpoint_minutes")
"""Fields that cannot be: all trials share one data set, seeds have a word of their own, the last changes no number."""


@dataclass(frozen=True)
class Trial:
    """One experiment of a sweep.

    Attributes:
        varied: its values of the fields that the sweep varies, by their dotted names, and its seed.
        experiment: all of it.
    """

    varied: Mapping[str, Any]
    experiment: Experiment

    @property
    def name(self) -> str:
        """What it varies, as people read it: `pgd.steps=10 seed=3`."""
        return " ".join(f"{field}={to_text(value)}" for field, value in self.varied.items())


@dataclass(frozen=True)
class Sweep:
    """Experiments that differ in the fields that are varied, and in nothing else.

    Attributes:
        trials: the experiments.
        asha: whether trials that fall behind are stopped early.
    """

    trials: tuple[Trial, ...]
    asha: bool

    @property
    def folder(self) -> str:
        """Of the sweep's own files, below the storage URL; the same trials have the same."""
        signatures = sorted(trial.experiment.signature for trial in self.trials)
        digest = hashlib.sha256(json.dumps([signatures, self.asha]).encode()).hexdigest()
        return f"sweeps/{self.trials[0].experiment.preset}-{digest[:10]}"


def sweep(
    preset: str,
    assignments: Sequence[str],
    varied: Sequence[str],
    seeds: Sequence[int | None],
    samples: int | None,
    asha: bool,
) -> Sweep:
    """The sweep that a command line asks for: each combination of values, or some drawn at random, with each seed.

    Args:
        preset, assignments: what all trials have, as for `experiment.build`.
        varied: `dotted.field=value`; a field that is given several times takes each of the values.
        seeds: of each combination; None: the preset's.
        samples: draw so many combinations, always the same; None: all.
        asha: whether trials that fall behind are stopped early.

    Raises:
        InvalidInput: for the first value that cannot be used.
    """
    values: dict[str, list[str]] = {}
    for assignment in varied:
        field, separator, text = (part.strip() for part in assignment.partition("="))
        if not separator:
            raise InvalidInput(f"--sweep: {assignment!r} is not of the form dotted.field=value")
        if field.startswith(_NOT_VARIED):
            raise InvalidInput(f"--sweep: {field!r} cannot be varied: allowed is any field but data.*, and seeds=0..4")
        values.setdefault(field, []).append(text)
    combinations = math.prod(map(len, values.values()))
    chosen: Iterable[int] = range(combinations)
    if samples and samples < combinations:
        chosen = sorted(random.Random(0).sample(range(combinations), samples))
    if min(samples or combinations, combinations) * len(seeds) > MOST:
        raise InvalidInput(
            f"--sweep: {combinations} combinations with {len(seeds)} seeds cannot be run: allowed are 1 to {MOST} "
            "trials; --samples draws some"
        )
    trials = []
    for combination in chosen:
        drawn, left = dict[str, str](), combination
        for field in reversed(values):
            left, place_of_value = divmod(left, len(values[field]))
            drawn[field] = values[field][place_of_value]
        experiment = build(preset, None, [*assignments, *(f"{field}={drawn[field]}" for field in values)])
        fields = {field: functools.reduce(getattr, field.split("."), experiment) for field in values}
        for seed in seeds:
            seeded = experiment if seed is None else experiment.model_copy(update={"seed": seed})
            trials.append(Trial(fields | ({} if seed is None else {"seed": seed}), seeded))
    names: dict[str, str] = {}
    for trial in trials:
        if trial.experiment.folder in names:
            same = names[trial.experiment.folder], trial.name
            raise InvalidInput(f"--sweep: {same[0]!r} and {same[1]!r} cannot both be run: they are the same experiment")
        names[trial.experiment.folder] = trial.name
    return Sweep(tuple(trials), asha)


class TrialTable:
    """What has become of each trial of a sweep: `trials.parquet`, below the sweep's folder."""

    FILE = "trials.parquet"

    def __init__(self, sweep: Sweep, storage: str) -> None:
        """See what the store holds."""
        self._sweep, self._store = sweep, Store(storage, sweep.folder)
        self._rows = {trial.name: self._row(trial) for trial in sweep.trials}
        for row in self._before():
            if row.get("state") == STOPPED_EARLY and row.get("trial") in self._rows:
                self.note(row["trial"], STOPPED_EARLY)
        for trial in sweep.trials:
            if found := results(trial.experiment, trial.experiment.store(storage)):
                self.note(trial.name, "done", found)

    def note(self, trial: str, state: str, found: Mapping[str, float] | None = None) -> None:
        """Take how a trial stands, and its results."""
        self._rows[trial] |= {"state": state, **(found or {})}

    def is_stopped_early(self, trial: Trial) -> bool:
        """Whether ASHA has stopped it, in this run or before."""
        return bool(self._rows[trial.name]["state"] == STOPPED_EARLY)

    def write(self) -> None:
        """Put the table in its allocate."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.rows), buffer, compression="zstd")
        self._store.write(self.FILE, buffer.getvalue())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row a trial; a result that it does not have is None."""
        names = dict.fromkeys(name for row in self._rows.values() for name in row)
        return [{name: row.get(name) for name in names} for row in self._rows.values()]

    @property
    def path(self) -> str:
        """Where the table is."""
        return self._store.path(self.FILE)

    def _before(self) -> list[dict[str, Any]]:
        content = self._store.read(self.FILE)
        try:
            return pq.read_table(io.BytesIO(content), use_threads=False).to_pylist() if content else []
        except pa.ArrowException:
            raise StorageFailed(f"{self.path}: not the Parquet file that was to_text; remove it") from None

    @staticmethod
    def _row(trial: Trial) -> dict[str, Any]:
        experiment = trial.experiment
        varied = {f: to_text(v) if isinstance(v, tuple) else v for f, v in trial.varied.items() if f != "seed"}
        return {
            "trial": trial.name,
            "state": "waiting",
            "experiment": experiment.signature,
            "folder": experiment.folder,
            "preset": experiment.preset,
            "seed": experiment.seed,
            **varied,
        }


def results(experiment: Experiment, store: Store) -> dict[str, float]:
    """Accuracy (0..1) of the defended model in each column, by the column's title; empty before all of them exist."""
    columns = experiment.columns
    keys, defended = list(columns[0].settings), experiment.defended.name
    rows = tables.read(store, "evaluations").to_pylist()
    accuracies = {tuple(row[key] for key in keys): row["accuracy"] for row in rows if row["model"] == defended}
    places = {column.title.replace("\n", " ").strip(): tuple(column.settings.values()) for column in columns}
    if not accuracies.keys() >= set(places.values()):
        return {}
    return {title: accuracies[place] for title, place in places.items()}


def headline(found: Mapping[str, float]) -> dict[str, float]:
    """Of a trial's results those that fit on a line: clean, the longest PGD, with restarts, adaptive."""
    *_, longest = ["", *(title for title in found if title.startswith("pgd "))]
    return {t: a for t, a in found.items() if t in ("clean", longest) or t.startswith(("restarts ", "adaptive "))}


def run(
    sweep: Sweep,
    storage: str,
    connect: Callable[[], AbstractContextManager[Cluster]],
    data_folder: Path,
    progress: Progress,
    stopping: Callable[[], bool],
    again: str,
) -> TrialTable:
    """Run a sweep to its end; arguments and errors as of `pipeline.run`.

    A trial that fails keeps no other from its end.
    """
    outcome = TrialTable(sweep, storage)
    trials = [trial for trial in sweep.trials if not outcome.is_stopped_early(trial)]
    stores = {trial.experiment: trial.experiment.store(storage) for trial in trials}
    sizes = sources.sizes(sweep.trials[0].experiment.data)
    todo = jobs_left(stores, STAGES, sizes)
    progress.planned(STAGES, todo)
    if not todo:
        tell_last_word(stores, sizes, progress, again)
        outcome = TrialTable(sweep, storage)  # that may have merged shards
        outcome.write()
        return outcome
    with opened(list(stores), storage, connect, data_folder, progress, stopping, again) as pipeline:
        failures: list[str] = []
        _stages(pipeline, [trial.experiment for trial in trials], ("experts",), progress, failures)
        trained = [t for t in trials if not jobs.pending(t.experiment, stores[t.experiment], sizes)["experts"]]
        for trial in trials:
            if trial not in trained:
                outcome.note(trial.name, "failed")
        try:
            _trials(sweep, trained, pipeline, progress, outcome, failures)
        finally:
            outcome.write()
        if stopping():
            raise Interrupted
        ended = [trial.experiment for trial in trained if results(trial.experiment, stores[trial.experiment])]
        _stages(pipeline, ended, STAGES, progress, failures)
    if failures:
        raise StageFailed("\n".join(failures))
    return outcome


def _stages(
    pipeline: Pipeline,
    experiments: Sequence[Experiment],
    stages: Sequence[str],
    progress: Progress,
    failures: list[str],
) -> None:
    """Run stages of experiments that have some of them left; what fails is noted."""
    stores = {experiment: experiment.store(pipeline.storage) for experiment in experiments}
    if jobs_left(stores, stages, pipeline.sizes):
        try:
            pipeline.run(experiments, stages, progress)
        except StageFailed as error:
            failures += str(error).splitlines()


def _trials(
    sweep: Sweep,
    trials: Sequence[Trial],
    pipeline: Pipeline,
    progress: Progress,
    outcome: TrialTable,
    failures: list[str],
) -> None:
    """Joint stage and evaluation of each mixture, as trials of Ray Tune."""
    stores = {trial.experiment: trial.experiment.store(pipeline.storage) for trial in trials}
    left = {
        job.folder for job in jobs_left(stores, STAGES, pipeline.sizes) if job.model == job.experiment.defended.name
    }
    left |= {e.folder for e, store in stores.items() if not results(e, store)}  # shards that are not merged
    if not left:
        return
    # Those that are done tell ASHA again how they fared.
    named = {trial.name: trial.experiment for trial in trials if sweep.asha or trial.experiment.folder in left}
    (joint,) = jobs.jobs(trials[0].experiment, "joint", pipeline.sizes)
    room = pipeline.cluster.resources.slots
    told = False

    def heard(name: str, report: Mapping[str, Any]) -> None:
        progress.heard(named[name].folder, report)
        if not report.get("replayed"):
            progress.say(f"{name} joint: {epoch_line(report, named[name].defended.training.epochs)}")

    def ended(name: str, report: Mapping[str, Any] | None, fault: str) -> None:
        state = report["state"] if report else "failed" if fault else STOPPED_EARLY
        reason = fault or (report or {}).get("reason", "")
        failures.extend(f"trial {name}: {line}" for line in reason.splitlines())
        if state == STOPPED_EARLY and pipeline.stopping():
            state = "stopped"
        found = report.get("results") if report else None
        if report and report["epoch"]:
            progress.heard(named[name].folder, report)
        outcome.note(name, state, found)
        outcome.write()
        shown = "".join(f", {title} {accuracy:.1%}" for title, accuracy in headline(found or {}).items())
        progress.say(f"{name}: {reason or state}{shown}")

    def tick() -> None:
        nonlocal told
        if pipeline.stopping() and not told:
            told = True
            pipeline.cluster.stop(experiment.folder for experiment in named.values())

    run_trials(
        list(named),
        _Work(named, replace(pipeline, stopping=bool)),
        # Two at least: while one is evaluated, another trains.
        1 + max(1, int(room / allocate([joint], pipeline.cluster.resources)[joint].slots)),
        max(experiment.defended.training.epochs for experiment in named.values()) if sweep.asha else None,
        heard,
        ended,
        tick,
    )


@dataclass(frozen=True)
class _Work:
    """What a trial does, in a process of its own.

    Attributes:
        experiments: of the trials, by their names.
        pipeline: that they run on; each sees for itself whether it is to stop.
    """

    experiments: Mapping[str, Experiment]
    pipeline: Pipeline

    def __call__(
        self, name: str, report: Callable[[Mapping[str, Any]], None], stopping: Callable[[], bool]
    ) -> Mapping[str, Any]:
        """Train and evaluate the mixture of one; the last epoch is reported with what comes of it."""
        experiment, cluster = self.experiments[name], self.pipeline.cluster
        store = experiment.store(self.pipeline.storage)
        last: Mapping[str, Any] = {"epoch": 0, "probe_pgd_accuracy": 0.0}

        def is_stopped() -> bool:
            return stopping() or cluster.is_stopped(experiment.folder)

        def heard(row: Mapping[str, Any], replayed: bool = False) -> None:
            nonlocal last
            if row["epoch"] > last["epoch"]:
                last = row
                if row["epoch"] < experiment.defended.training.epochs:
                    report({**row, "replayed": replayed})

        for row in tables.read(store, "metrics", [experiment.defended.name]).to_pylist():
            heard(row, replayed=True)
        if is_stopped():
            return {**last, "state": "stopped"}
        quiet = Progress({experiment.folder: name}, store.url, Console(quiet=True))
        quiet.heard = lambda folder, row: heard(row)
        try:
            replace(self.pipeline, stopping=is_stopped).run(
                [experiment], ("joint", "evaluate"), quiet, experiment.defended.name
            )
        except Interrupted:
            return {**last, "state": "stopped"}
        except (StageFailed, StorageFailed, ExperimentLocked) as error:
            return {**last, "state": "failed", "reason": str(error)}
        except Exception as error:  # of any class: Tune would run it again, and again
            return {**last, "state": "failed", "reason": one_line(error)}
        return {**last, "state": "done", "results": results(experiment, store)}
