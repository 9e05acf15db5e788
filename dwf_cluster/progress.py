"""What a person watches: a live table on a terminal, plain lines elsewhere. It reads what the store holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dwf_cluster.cluster.control import Claim
from dwf_cluster.cluster.ray import Ended, Started
from dwf_cluster.experiment import STAGES
from dwf_cluster.plan import Job
from dwf_cluster.store import Store, tables

if TYPE_CHECKING:
    from dwf_cluster.cluster.ray import Cluster

_SHOWN_JOBS = 16
"""Of more jobs than this only those are shown that run."""


class Progress:
    """Tells a person, or a log, how a run is getting on.

    Args:
        names: of the experiments, if there are several: `{experiment.folder: "seed 3"}`.
        storage: URL below which they have their folders.
        console: where to tell.

    Attributes:
        heard: is given each row of `metrics` as it comes, with the experiment's folder, and when watching begins
            those that are there.
    """

    def __init__(
        self,
        names: Mapping[str, str],
        storage: str,
        console: Console,
    ) -> None:
        self._names = names
        self._storage = storage
        self._console = console
        self.heard: Callable[[str, Mapping[str, Any]], None] = lambda folder, row: None
        self._states: dict[Job, str] = {}
        self._metrics: dict[Job, dict[str, Any]] = {}
        self._live: Live | None = None

    def say(self, line: str) -> None:
        """One line of its own."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def title(self, job: Job) -> str:
        """What a person calls a job: its name and, if there are several experiments, which."""
        return f"{self._names.get(job.folder, '')} {job.name}".lstrip()

    def planned(self, stages: Sequence[str], todo: Sequence[Job]) -> None:
        """Say what there is to do."""
        for stage in STAGES:
            count = sum(job.stage == stage for job in todo)
            if stage in stages:
                self.say(f"{stage}: {f'{count} to do' if count else 'done already, skipped'}")

    def started(self, cluster: Cluster) -> None:
        """Say where to look on."""
        if not cluster.dashboard:
            return
        self.say(
            f"Ray dashboard: {cluster.dashboard} (token authentication is on; paste what `cat "
            f"{cluster.token_file}` prints when it asks)"
        )

    @contextmanager
    def watching(self, jobs: Sequence[Job]) -> Iterator[None]:
        """Show these jobs while the body runs."""
        self._states, self._metrics = dict.fromkeys(jobs, "waiting"), {}
        for job in jobs:  # what an interrupted run has left
            for row in self._rows(job, "metrics", job.model) if job.stage != "evaluate" else ():
                self._metrics[job] = row
                self.heard(job.folder, row)
        if not self._console.is_terminal:
            yield
            return
        with Live(get_renderable=self._table, console=self._console, refresh_per_second=2) as self._live:
            yield
        self._live = None

    def update(self, event: Started | Claim | Ended | None) -> None:
        """Take what `Cluster.run` yields."""
        if isinstance(event, Started):
            self._states[event.job] = "running"
        elif isinstance(event, Claim):
            if event.share:
                self._plain(f"{event.job[1]}: worker {event.worker} on {event}")
        elif isinstance(event, Ended):
            job = event.job
            self._look(job)
            self._states[job] = event.state
            ended = sum(state in ("done", "failed", "stopped") for state in self._states.values())
            rows = self._rows(job, "jobs", job.file)
            took = [f" in {row['seconds']:.1f} s" for row in rows if row["seconds"]]
            for note in [] if job.origin else [n for row in rows if row["note"] for n in row["note"].splitlines()]:
                self.say(f"warning: {note}")
            done = f"copied from {job.origin}" if job.origin and event.state == "done" else event.state + "".join(took)
            if job.origin and job.stage == "evaluate" and not event.reason:
                return  # thousands, of no work
            what = event.reason or done
            self._plain(f"{self.title(job)}: {what} ({ended} of {len(self._states)})")
        else:
            for job, state in self._states.items():
                if state == "running":
                    self._look(job)

    def _look(self, job: Job) -> None:
        """Tell of the epochs of a training that have ended since it was last looked at."""
        if job.stage == "evaluate":
            return
        seen = self._metrics.get(job, {}).get("epoch", 0)
        for row in self._rows(job, "metrics", job.model):
            if row["epoch"] > seen:
                self._metrics[job] = row
                self.heard(job.folder, row)
                if job.origin:
                    continue  # others' epochs were told as they came
                self._plain(f"{self.title(job)}: {epoch_line(row, job.experiment.training(job.stage).epochs)}")

    def _rows(self, job: Job, table: str, file: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = tables.read(Store(self._storage, job.folder), table, [file]).to_pylist()
        return rows

    def _plain(self, line: str) -> None:
        if self._live is None:
            self.say(line)

    def _table(self) -> Table:
        ended = sum(state in ("done", "failed", "stopped") for state in self._states.values())
        table = Table(title=f"{ended} of {len(self._states)} done", title_justify="left", box=None, pad_edge=False)
        for heading in ("job", "state"):
            table.add_column(heading)
        for heading in ("epoch", "loss", "clean", "PGD probe", "images/s", "time left"):
            table.add_column(heading, justify="right")
        trainings = sum(job.stage != "evaluate" for job in self._states)
        for job, state in self._states.items():
            if state == "running" or (job.stage != "evaluate" and trainings <= _SHOWN_JOBS):
                table.add_row(self.title(job), state, *(self._cells(job) if job.stage != "evaluate" else ()))
        return table

    def _cells(self, job: Job) -> tuple[str, ...]:
        row, epochs = self._metrics.get(job), job.experiment.training(job.stage).epochs
        return _cells(row, epochs) if row else (f"0/{epochs}", "", "", "", "", "")


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """What a person reads of a row of `metrics`."""
    epoch, loss, clean, robust, speed, left = _cells(row, epochs)
    return f"epoch {epoch}, loss {loss}, clean {clean}, PGD probe {robust}, {speed} images/s, {left} left"


def _cells(row: Mapping[str, Any], epochs: int) -> tuple[str, ...]:
    """Epoch, loss, clean and robust accuracy, images/s and time left."""
    return (
        f"{row['epoch']}/{epochs}",
        f"{row['loss']:.3f}",
        f"{row['clean_accuracy']:.1%}",
        f"{row['probe_pgd_accuracy']:.1%}",
        f"{row['images_per_second']:.0f}",
        _duration((epochs - row["epoch"]) * row["seconds"]),
    )


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
