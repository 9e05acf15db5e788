"""The status of an experiment: `status.json`, which its run rewrites with every heartbeat."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from dwf_cluster.store.files import Store

HEARTBEAT = 10.0
"""Seconds between two heartbeats."""


def _checked(time: str) -> str:
    if datetime.fromisoformat(time).tzinfo is None:
        raise ValueError("a time needs a zone")
    return time


Time = Annotated[str, AfterValidator(_checked)]
State = Literal["running", "done", "stopped", "failed"]


class Status(BaseModel):
    """What `status.json` says.

    Attributes:
        run: number of the run that wrote it.
        state: `running`; `done`: all stages; `stopped`: at the user's request, or stages are left; `failed`.
        host, job: where the driver runs or ran; job is SLURM's number, empty outside SLURM.
        started, heartbeat: when the run began, and when this file was written; ISO 8601, UTC.
        seconds: wall-clock time of all runs of the experiment so far.
        stages: of each stage, the number of jobs that are done and of all jobs.
        reason: a line for each job that failed.
        resume: the command that resumes it.
        rows: of each table, at the end of the last run.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)
    FILE: ClassVar[str] = "status.json"

    run: int
    state: State
    host: str
    job: str
    started: Time
    heartbeat: Time
    seconds: float
    stages: dict[str, tuple[int, int]]
    reason: str
    resume: str
    rows: dict[str, int]

    @staticmethod
    def read(store: Store) -> Status | None:
        """The status in a store; None if there is none, or it cannot be parsed."""
        content = store.read(Status.FILE)
        return Status.parse(content) if content else None

    @staticmethod
    def parse(content: bytes) -> Status | None:
        """The status in a file's content; None if it cannot be parsed."""
        try:
            return Status.model_validate_json(content)
        except ValidationError:
            return None

    def write(self, store: Store) -> None:
        """Replace the status in a store."""
        store.write(Status.FILE, (self.model_dump_json(indent=2) + "\n").encode())


def now() -> str:
    """The present time, as it is stored: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def age(time: str) -> float:
    """Seconds since a stored time, by this machine's clock; negative if it is from the future."""
    return (datetime.now(timezone.utc) - datetime.fromisoformat(time)).total_seconds()
