"""The progress of a run on the console: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dwf_cluster.cluster.control import Claim
from dwf_cluster.cluster.events import Connected, Ended, Epoch, Event, Finished, Note, Planned, Queued, Started
from dwf_cluster.plan.jobs import STAGES, Job

_SHOWN_JOBS = 16
"""With more trainings than this, the table shows only running jobs."""

_ENDED = ("done", "failed", "stopped")


class Progress:
    """Prints the events of a run.

    Args:
        names: of the experiments, if there are several: `{experiment.folder: "seed 3"}`.
        console: to print on.
    """

    def __init__(self, names: Mapping[str, str], console: Console) -> None:
        self._names = names
        self._console = console
        self._live: Live | None = None
        self._states: dict[Job, str] = {}
        self._rows: dict[Job, Mapping[str, Any]] = {}  # the newest of each training
        self._time_left = TimeLeft({})

    def __call__(self, event: Event) -> None:
        """Print an event."""
        match event:
            case Planned():
                self._show_plan(event)
            case Connected(dashboard, token_file) if dashboard:
                self._print_line(
                    f"Ray dashboard: {dashboard} (token authentication is on; paste what `cat {token_file}` "
                    "prints when it asks)"
                )
            case Queued():
                self._begin(event)
            case Started(job):
                self._states[job] = "running"
            case Claim(job=(_, name)) if event.share:
                self._print_unless_live(f"{name}: worker {event.worker} on {event} (process {event.process})")
            case Epoch():
                self._show_epoch(event)
            case Ended():
                self._show_end(event)
            case Finished() if self._live:
                self._live.stop()
                self._live = None
            case Note(text):
                self._print_line(text)

    def _show_plan(self, event: Planned) -> None:
        for stage in STAGES:
            count = sum(job.stage == stage for job in event.jobs)
            if stage in event.stages:
                self._print_line(f"{stage}: {f'{count} to do' if count else 'done already, skipped'}")

    def _begin(self, event: Queued) -> None:
        """Show these jobs, in a table on a terminal."""
        self._states, self._rows, self._time_left = dict.fromkeys(event.jobs, "waiting"), {}, TimeLeft(event.seconds)
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=2)
            self._live.start(refresh=True)

    def _print_line(self, line: str) -> None:
        """One line of its own, however long."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _print_unless_live(self, line: str) -> None:
        if self._live is None:
            self._print_line(line)

    def _title(self, job: Job) -> str:
        """A job's display name: its experiment's name, if there are several, and its own."""
        return f"{self._names.get(job.folder, '')} {job.name}".lstrip()

    def _show_epoch(self, event: Epoch) -> None:
        job, row = event.job, event.row
        line = f"{self._title(job)}: {epoch_line(row, job.training.epochs)}"
        self._rows[job] = row
        self._time_left.trained(job, row["epoch"], event.is_replayed)
        if not event.is_replayed:
            self._print_unless_live(line)

    def _show_end(self, event: Ended) -> None:
        job = event.job
        self._states[job] = event.state
        self._time_left.ended(job)
        is_copied = bool(job.copy_of) and event.state == "done"
        if is_copied and not job.is_training:
            return  # thousands, without work
        for note in event.notes:
            self._print_line(f"warning: {note}")
        took = f" in {event.seconds:.1f} s" if event.seconds else ""
        outcome = event.reason or (f"copied from {job.copy_of}" if is_copied else event.state + took)
        self._print_unless_live(f"{self._title(job)}: {outcome} ({self._ended_count} of {len(self._states)})")

    @property
    def _ended_count(self) -> int:
        return sum(state in _ENDED for state in self._states.values())

    def _table(self) -> Table:
        seconds, basis = self._time_left.seconds, self._time_left.basis
        about = "" if seconds is None else f", about {_duration(seconds)} left ({basis})"
        title = f"{self._ended_count} of {len(self._states)} done{about}"
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for heading in ("job", "state"):
            table.add_column(heading)
        for heading in ("epoch", "loss", "clean", "PGD probe", "images/s", "time left"):
            table.add_column(heading, justify="right")
        trainings = sum(job.is_training for job in self._states)
        for job, state in list(self._states.items()):
            if state == "running" or (job.is_training and trainings <= _SHOWN_JOBS):
                table.add_row(self._title(job), state, *(self._training_cells(job) if job.is_training else ()))
        return table

    def _training_cells(self, job: Job) -> tuple[str, ...]:
        row, epochs = self._rows.get(job), job.training.epochs
        return _cells(row, epochs) if row else (f"0/{epochs}", "", "", "", "", "")


class TimeLeft:
    """Estimates how long a run still takes: as planned and, once work is done, in proportion to the time that it took.

    A running training counts by its epochs; a running evaluation counts when it has ended. The estimate is rough: not
    all GPUs or CPUs are busy all the time, and attacks cost less on images that they fool early.

    Args:
        planned: `Queued.seconds` of the run; it begins now.
    """

    def __init__(self, planned: Mapping[Job, float]) -> None:
        self._began = time.monotonic()
        self._whole, self._remaining = dict(planned), dict(planned)
        self._done = 0.0

    def trained(self, job: Job, epoch: int, is_replayed: bool) -> None:
        """Count the epochs of a training until this one; replayed ones took this run no time."""
        self._reduce(job, self._whole.get(job, 0.0) * (1 - epoch / job.training.epochs), is_replayed)

    def ended(self, job: Job) -> None:
        """Count the rest of a job."""
        self._reduce(job, 0.0, is_free=False)

    def _reduce(self, job: Job, remaining: float, is_free: bool) -> None:
        if job in self._remaining:
            self._done += 0.0 if is_free else self._remaining[job] - remaining
            self._remaining[job] = remaining

    @property
    def seconds(self) -> float | None:
        """Seconds; None without a plan."""
        if not self._whole:
            return None
        factor = (time.monotonic() - self._began) / self._done if self._done else 1.0
        return factor * sum(list(self._remaining.values()))

    @property
    def basis(self) -> str:
        """What the estimate rests on."""
        return "estimated from the work done so far" if self._done else "as planned; see --dry-run"


def epoch_line(row: Mapping[str, Any], epochs: int) -> str:
    """A row of `metrics` as one line of text."""
    epoch, loss, clean, robust, speed, time_left = _cells(row, epochs)
    return f"epoch {epoch}, loss {loss}, clean {clean}, PGD probe {robust}, {speed} images/s, {time_left} left"


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
