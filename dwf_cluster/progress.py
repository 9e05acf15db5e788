"""What a person watches: a live table on a terminal, plain lines elsewhere. It reads what the store holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dwf_cluster.experiment import Experiment
from dwf_cluster.plan import Job
from dwf_cluster.store import Store, tables

if TYPE_CHECKING:
    from dwf_cluster.cluster.ray import Cluster

_SHOWN_JOBS = 16
"""A stage of more jobs than this shows only those that run."""


class Progress:
    """Tells a person, or a log, how an experiment is getting on."""

    def __init__(self, experiment: Experiment, store: Store, console: Console) -> None:
        self._experiment = experiment
        self._store = store
        self._console = console
        self._states: dict[Job, str] = {}
        self._metrics: dict[Job, dict[str, Any]] = {}
        self._attempts: dict[Job, int] = {}
        self._live: Live | None = None

    def say(self, line: str) -> None:
        """One line of its own."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def planned(self, todo: dict[str, list[Job]]) -> None:
        """Say what there is to do."""
        for stage, jobs in todo.items():
            self.say(f"{stage}: {f'{len(jobs)} to do' if jobs else 'done already, skipped'}")

    def started(self, cluster: Cluster) -> None:
        """Say where to look on."""
        self.say(
            f"Ray dashboard: {cluster.dashboard} (token authentication is on; paste what `cat "
            f"{cluster.token_file}` prints when it asks)"
        )

    @contextmanager
    def watching(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Show these jobs while the body runs."""
        self._states, self._metrics, self._attempts = dict.fromkeys(jobs, "waiting"), {}, {}
        for job in jobs:  # what an interrupted run has left
            self._attempts[job] = sum(row["attempts"] for row in self._rows("jobs", job.file))
            for row in self._rows("metrics", job.model) if job.stage != "evaluate" else ():
                self._metrics[job] = row
        if not jobs or not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._table, console=self._console, refresh_per_second=2) as self._live:
            yield
        self._live = None

    def update(self, event: tuple[Job, str | None] | None) -> None:
        """Take what `Cluster.run` yields: an ended job, or None to look at the store again."""
        if event:
            job, reason = event
            self._look(job)
            self._states[job] = "failed" if reason else "done"
            ended = sum(state in ("done", "failed") for state in self._states.values())
            took = "".join(f" in {row['seconds']:.1f} s" for row in self._rows("jobs", job.file) if row["seconds"])
            self._plain(f"{job.name}: {reason or f'done{took}'} ({ended} of {len(self._states)})")
            return
        for job, state in self._states.items():
            if state in ("waiting", "running"):
                self._look(job)

    def _look(self, job: Job) -> None:
        if self._states[job] == "waiting":
            if not any(row["attempts"] > self._attempts[job] for row in self._rows("jobs", job.file)):
                return
            self._states[job] = "running"
        if job.stage == "evaluate":
            return
        seen = self._metrics.get(job, {}).get("epoch", 0)
        for row in self._rows("metrics", job.model):
            if row["epoch"] > seen:
                self._metrics[job] = row
                epoch, loss, clean, robust, speed, left = self._cells(job)
                self._plain(
                    f"{job.name}: epoch {epoch}, loss {loss}, clean {clean}, PGD probe {robust}, {speed} images/s, "
                    f"{left} left"
                )

    def _rows(self, table: str, file: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = tables.read(self._store, table, [file]).to_pylist()
        return rows

    def _plain(self, line: str) -> None:
        if self._live is None:
            self.say(line)

    def _table(self) -> Table:
        ended = sum(state in ("done", "failed") for state in self._states.values())
        table = Table(title=f"{ended} of {len(self._states)} done", title_justify="left", box=None, pad_edge=False)
        for heading in ("job", "state"):
            table.add_column(heading)
        training = any(job.stage != "evaluate" for job in self._states)
        for heading in ("epoch", "loss", "clean", "PGD probe", "images/s", "time left") if training else ():
            table.add_column(heading, justify="right")
        for job, state in self._states.items():
            if len(self._states) > _SHOWN_JOBS and state != "running":
                continue
            table.add_row(job.name, state, *self._cells(job) if training else ())
        return table

    def _cells(self, job: Job) -> list[str]:
        """Epoch, loss, clean and robust accuracy, images/s and time left, as of the last epoch that was seen."""
        row, epochs = self._metrics.get(job), self._experiment.training(job.stage).epochs
        if row is None:
            return [f"0/{epochs}", "", "", "", "", ""]
        return [
            f"{row['epoch']}/{epochs}",
            f"{row['loss']:.3f}",
            f"{row['clean_accuracy']:.1%}",
            f"{row['probe_pgd_accuracy']:.1%}",
            f"{row['images_per_second']:.0f}",
            _duration((epochs - row["epoch"]) * row["seconds"]),
        ]


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
