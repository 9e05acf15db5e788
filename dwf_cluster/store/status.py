"""How an experiment stands: `status.json`, which its run writes anew with every heartbeat."""

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
        run: number of the lease under which it was written.
        state: `running`; `done`: all stages; `stopped`: at its user's request, or stages are left; `failed`.
        host, job: where the driver runs or ran; job is SLURM's number, empty outside SLURM.
        started, heartbeat: of the run, and of this file; ISO 8601, UTC.
        seconds: that all runs of the experiment have taken so far.
        stages: of each stage, jobs that are done and jobs in all.
        reason: a line for each job that failed.
        resume: the command that goes on.
        rows: of each table, as of the end of the last run.
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
        """What is there; None if there is nothing, or nothing of this kind."""
        content = store.read(Status.FILE)
        return Status.parse(content) if content else None

    @staticmethod
    def parse(content: bytes) -> Status | None:
        """What a file's content says; None if it is nothing of this kind."""
        try:
            return Status.model_validate_json(content)
        except ValidationError:
            return None

    def write(self, store: Store) -> None:
        """Put it in its place."""
        store.write(Status.FILE, (self.model_dump_json(indent=2) + "\n").encode())


def now() -> str:
    """The time as the files have it: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def age(time: str) -> float:
    """Seconds since a time that `now` gave, by this machine's clock."""
    return (datetime.now(timezone.utc) - datetime.fromisoformat(time)).total_seconds()
