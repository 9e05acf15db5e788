"""What a run tells whoever listens: console, TensorBoard, Ray's metrics, the heartbeat."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dwf_cluster.cluster.control import Claim
from dwf_cluster.plan.jobs import Job


@dataclass(frozen=True)
class Planned:
    """The pending jobs of the given stages are known; those of a stage without any are done already."""

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
class Started:
    """A job was submitted to Ray."""

    job: Job


@dataclass(frozen=True)
class Epoch:
    """A training has ended an epoch.

    Attributes:
        job: the training.
        row: of the table `metrics`.
        is_replayed: whether an earlier run has trained it.
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
    """

    job: Job
    state: str
    reason: str = ""


@dataclass(frozen=True)
class Note:
    """One line for the user: a job is retried, or waits."""

    text: str


Event = Planned | Connected | Started | Claim | Epoch | Ended | Note
