"""The outcome of the trials of a sweep: one row each, in `trials.parquet`."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dwf_cluster.evaluation.column import Column, titled
from dwf_cluster.evaluation.registry import WORST_CASE
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline.sweep import Sweep, Trial
from dwf_cluster.settings import to_text
from dwf_cluster.store import StorageFailed, Store, tables

STOPPED_EARLY = "stopped early"
"""State of a trial that ASHA has ended."""


class TrialTable:
    """State and results of each trial of a sweep: `trials.parquet`, in the sweep's folder."""

    FILE = "trials.parquet"

    def __init__(self, sweep: Sweep, storage: str) -> None:
        """Read the table in the store, if there is one."""
        self._store = Store(storage, sweep.folder)
        self._names = column_names(trial.experiment for trial in sweep.trials)
        self._rows = {trial.name: self._row(trial) for trial in sweep.trials}
        for row in self._stored_rows():
            if row.get("state") == STOPPED_EARLY and row.get("trial") in self._rows:
                self.record(row["trial"], STOPPED_EARLY)
        for trial in sweep.trials:
            if accuracies := results(trial.experiment, trial.experiment.store(storage)):
                self.record(trial.name, "done", accuracies)

    def record(self, trial: str, state: str, accuracies: Mapping[Column, float] | None = None) -> dict[str, float]:
        """Set the state of a trial, and add its results; returns them by the names of their columns."""
        named = {self._names[column]: accuracy for column, accuracy in (accuracies or {}).items()}
        self._rows[trial] |= {"state": state, **named}
        return named

    def is_stopped_early(self, trial: Trial) -> bool:
        """Whether ASHA has stopped it, in this run or before."""
        return bool(self._rows[trial.name]["state"] == STOPPED_EARLY)

    def write(self) -> None:
        """Replace the table in the store."""
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(self.rows), buffer, compression="zstd")
        self._store.write(self.FILE, buffer.getvalue())

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each trial; a result that it does not have is None."""
        names = dict.fromkeys(name for row in self._rows.values() for name in row)
        return [{name: row.get(name) for name in names} for row in self._rows.values()]

    @property
    def path(self) -> str:
        """Path or URL of the table."""
        return self._store.path(self.FILE)

    def _stored_rows(self) -> list[dict[str, Any]]:
        content = self._store.read(self.FILE)
        try:
            return pq.read_table(io.BytesIO(content), use_threads=False).to_pylist() if content else []
        except pa.ArrowException:
            raise StorageFailed(f"{self.path}: not the Parquet file that was written; remove it") from None

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


def column_names(experiments: Iterable[Experiment]) -> dict[Column, str]:
    """A name on one line for each column of any of these experiments: of different columns, different names.

    Trials may be attacked in different balls or with different steps, as those of a sweep over `pgd.epsilon` without
    `evaluation.epsilon`: `pgd 40 @0.05` and `pgd 40 @0.15`.
    """
    columns = titled(column for experiment in experiments for column in experiment.columns)
    names = {column: " ".join(column.title.split()) for column in columns}
    same: dict[str, list[Column]] = {}
    for column, name in names.items():
        same.setdefault(name, []).append(column)
    for name, listed in same.items():
        values = {field: [column.settings[field] for column in listed] for field in listed[0].settings}
        different = [field for field in values if len(set(values[field])) > 1]
        for column in listed:
            names[column] = " ".join([name, *(_assigned(field, column.settings[field]) for field in different)])
    return names


def _assigned(field: str, value: Any) -> str:
    return f"{field}={f'{value:.6g}' if isinstance(value, float) else to_text(value)}"


def results(experiment: Experiment, store: Store) -> dict[Column, float]:
    """Accuracy (0..1) of the defended model in each column; empty before all of them exist.

    The worst case may still be missing: it counts images that are made on models that are evaluated later.
    """
    columns = {tuple(column.settings.values()): column for column in experiment.columns}
    keys, defended = list(experiment.columns[0].settings), experiment.defended.name
    rows = tables.read(store, "evaluations").to_pylist()
    accuracies = {tuple(row[key] for key in keys): row["accuracy"] for row in rows if row["model"] == defended}
    if not accuracies.keys() >= {values for values, column in columns.items() if column.attack != WORST_CASE}:
        return {}
    return {column: accuracies[values] for values, column in columns.items() if values in accuracies}


def headline(accuracies: Mapping[str, float]) -> dict[str, float]:
    """The results of a trial that fit on a line: clean, worst case, the longest PGD, with restarts, adaptive."""
    longest = max((int(title.split()[1]) for title in accuracies if title.startswith("pgd ")), default=0)
    first = [title for title in accuracies if title == "clean" or title.startswith(WORST_CASE)]
    starts = (f"pgd {longest} ", "restarts ", "adaptive ")  # at each epsilon
    others = [title for title in accuracies if f"{title} ".startswith(starts)]
    return {title: accuracies[title] for title in (*first, *others)}
