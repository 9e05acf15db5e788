"""Events of a run, and its listeners: console, TensorBoard, Ray's metrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dwf_cluster.cluster.control import Claim
from dwf_cluster.plan.jobs import Job
from dwf_cluster.settings import one_line
from dwf_cluster.store import StorageFailed


@dataclass(frozen=True)
class Planned:
    """The pending jobs of the given stages are known; a stage without any is done already."""

    stages: tuple[str, ...]
    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class Connected:
    """The run has a Ray cluster.

    Attributes:
        dashboard: URL of Ray's dashboard; empty if it has none.
        token_file: holds the token that the dashboard asks for.
    """

    dashboard: str
    token_file: str


@dataclass(frozen=True)
class Queued:
    """Jobs are about to run; they wait for their inputs and for free CPUs or GPUs.

    Attributes:
        jobs: these.
        seconds: planned, of each job's work on all GPUs or CPUs of the run together; empty if no plan could be made.
    """

    jobs: tuple[Job, ...]
    seconds: Mapping[Job, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Started:
    """A job was submitted to Ray."""

    job: Job


@dataclass(frozen=True)
class Epoch:
    """A training has ended an epoch.

    Attributes:
        job: the training.
        row: of the table `metrics`.
        is_replayed: whether nothing new was trained: the epoch is from an earlier run or another experiment, or is
            reported again at the end of the training's trial.
    """

    job: Job
    row: Mapping[str, Any]
    is_replayed: bool = False


@dataclass(frozen=True)
class Ended:
    """A job has ended.

    Attributes:
        job: which.
        state: `done`, `stopped` (at the run's request; it resumes from there) or `failed`.
        reason: one line that says why it failed.
        seconds: how long it ran; None if its row of `jobs` has no seconds.
        notes: lines for the user from its row of `jobs`, such as that a damaged checkpoint was removed.
    """

    job: Job
    state: str
    reason: str = ""
    seconds: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """The jobs of the last `Queued` have ended, or the run stops."""


@dataclass(frozen=True)
class Note:
    """One line for the user: a job is retried, or waits; a trial has ended; something is missing from the output."""

    text: str


Event = Planned | Connected | Queued | Started | Claim | Epoch | Ended | Finished | Note
Listener = Callable[[Event], None]


class Listeners:
    """Pass each event to every listener. A failing listener never ends a run: its first failure is a `Note`.

    Args:
        listeners: by the names that warnings give them.
    """

    def __init__(self, listeners: Mapping[str, Listener]) -> None:
        self._listeners = dict(listeners)
        self._failed: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Pass an event on."""
        for name, listener in self._listeners.items():
            try:
                listener(event)
            except Exception as error:  # of any class: monitoring must not end a run
                if name not in self._failed:
                    self._failed.add(name)
                    self(warning(name, error))
                elif isinstance(event, Note):  # it may be the warning itself
                    warnings.warn(f"{name} fails, so this line is not shown: {event.text}", stacklevel=2)


def warning(channel: str, error: Exception, subject: str = "") -> Note:
    """The line that says what is missing from the output.

    Args:
        channel: where it is missing: progress, TensorBoard, ...
        error: why.
        subject: what it is about, if not all.
    """
    reason = one_line(error, limit=500)
    if not isinstance(error, StorageFailed) and reason != type(error).__name__:
        reason = f"{type(error).__name__}: {reason}"
    return Note(f"warning: {channel}: {subject and f'{subject}: '}{reason}; the run continues")
