"""What a person watches: a live table on a terminal, plain lines elsewhere. It reads what the store holds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from dwf_cluster.cluster.control import Claim
from dwf_cluster.cluster.events import Ended, Note, Started
from dwf_cluster.plan.jobs import STAGES, Job
from dwf_cluster.store import StorageFailed, Store, tables

if TYPE_CHECKING:
    from dwf_cluster.cluster.driver import Cluster

_SHOWN_JOBS = 16
"""Of more jobs than this only those are shown that run."""

_LAST_SECONDS = 10.0
"""How long after the end of a stage the store is still asked for what is left to tell."""


class Progress:
    """Tells a person, or a log, how a run is getting on. What goes wrong while it does is a warning, never a failure.

    The store is read in a thread of its own, so that a slow one does not hold up the scheduling of jobs.

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
        self._warned: set[str] = set()
        self._live: Live | None = None
        self._start([])

    def _start(self, jobs: Sequence[Job]) -> None:
        """Forget the jobs of earlier stages."""
        self._states: dict[Job, str] = dict.fromkeys(jobs, "waiting")
        self._metrics: dict[Job, dict[str, Any]] = {}
        self._unreadable: set[Job] = set()
        self._look_waits = False
        self._deadline = math.inf

    def say(self, line: str) -> None:
        """One line of its own."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def warn(self, channel: str, reason: str) -> None:
        """Say, once for each channel (progress, TensorBoard), what is missing from it; the run goes on."""
        if channel not in self._warned:
            self._warned.add(channel)
            self.say(f"warning: {channel}: {reason}; the run goes on")

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
        self._start(jobs)
        for job in jobs:
            self._look(job, left=True)
        with ExitStack() as stack:
            if self._console.is_terminal:
                self._live = Live(get_renderable=self._table, console=self._console, refresh_per_second=2)
                stack.callback(setattr, self, "_live", None)
                stack.enter_context(self._live)
            self._thread = stack.enter_context(ThreadPoolExecutor(1, "progress"))
            try:
                yield
            finally:
                self._deadline = time.monotonic() + _LAST_SECONDS

    def update(self, event: Started | Claim | Ended | Note | None) -> None:
        """Take what `Cluster.run` yields, while watching; returns at once."""
        if event is None and self._look_waits:
            return
        self._look_waits |= event is None
        self._thread.submit(self._follow, event)

    def _follow(self, event: Started | Claim | Ended | Note | None) -> None:
        try:
            self._tell(event)
        except Exception as error:  # of any class: what is only watched must not end a run
            self.warn("progress", _reason(error))

    def _tell(self, event: Started | Claim | Ended | Note | None) -> None:
        if isinstance(event, Started):
            self._states[event.job] = "running"
        elif isinstance(event, Note):
            self.say(event.text)
        elif isinstance(event, Claim):
            if event.share:
                self._plain(f"{event.job[1]}: worker {event.worker} on {event} (process {event.process})")
        elif isinstance(event, Ended):
            self._tell_end(event)
        else:
            self._look_waits = False
            for job, state in self._states.items():
                if state == "running":
                    self._look(job)

    def _tell_end(self, event: Ended) -> None:
        job = event.job
        self._unreadable.discard(job)
        self._look(job)
        self._states[job] = event.state
        if job.copy_of and not job.is_training and not event.reason:
            return  # thousands, of no work
        row = self._job_row(job)
        for note in (row.get("note") or "").splitlines() if not job.copy_of else ():
            self.say(f"warning: {note}")
        took = f" in {row['seconds']:.1f} s" if row.get("seconds") else ""
        ended = sum(state in ("done", "failed", "stopped") for state in self._states.values())
        what = event.reason or (f"copied from {job.copy_of}" if job.copy_of and event.state == "done" else "")
        self._plain(f"{self.title(job)}: {what or event.state + took} ({ended} of {len(self._states)})")

    def _job_row(self, job: Job) -> dict[str, Any]:
        """The row of a job in the table `jobs`; empty if it cannot be read."""
        try:
            return next(iter(self._rows(job, "jobs", job.file)), {})
        except Exception as error:  # as for `_look`
            self.warn("progress", f"{self.title(job)}: {_reason(error)}")
            return {}

    def _look(self, job: Job, left: bool = False) -> None:
        """Tell of the epochs of a training that have ended since it was last looked at.

        Args:
            job: of any stage.
            left: whether they are those that an interrupted run has left: these are not said.
        """
        if not job.is_training or job in self._unreadable:
            return
        seen = self._metrics.get(job, {}).get("epoch", 0)
        try:
            for row in self._rows(job, "metrics", job.model):
                if row["epoch"] > seen:
                    line = f"{self.title(job)}: {epoch_line(row, job.training.epochs)}"
                    self._metrics[job] = row
                    self.heard(job.folder, row)
                    if not left and not job.copy_of:  # others' epochs were told as they came
                        self._plain(line)
        except Exception as error:  # a store that does not answer, or a file that holds anything
            # Not looked at again before its end: a store that stays silent for a minute ends the job itself.
            self._unreadable.add(job)
            self.warn("progress", f"{self.title(job)}: {_reason(error)}")

    def _rows(self, job: Job, table: str, file: str) -> list[dict[str, Any]]:
        if time.monotonic() > self._deadline:
            return []
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
        trainings = sum(job.is_training for job in self._states)
        for job, state in self._states.items():
            if state == "running" or (job.is_training and trainings <= _SHOWN_JOBS):
                table.add_row(self.title(job), state, *(self._cells(job) if job.is_training else ()))
        return table

    def _cells(self, job: Job) -> tuple[str, ...]:
        row, epochs = self._metrics.get(job), job.training.epochs
        return _cells(row, epochs) if row else (f"0/{epochs}", "", "", "", "", "")


def _reason(error: Exception) -> str:
    """One line."""
    text = str(error).strip().splitlines()
    line = text[0] if text else "no message"
    return line if isinstance(error, StorageFailed) else f"{type(error).__name__}: {line}"


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
