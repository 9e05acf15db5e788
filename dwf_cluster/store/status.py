"""The experiments of a storage, and the status of each: `status.json`, which its run writes with every heartbeat."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from dwf_cluster.settings import InvalidInput
from dwf_cluster.store.files import Store

HEARTBEAT = 10.0
"""Seconds between two heartbeats."""

_EXPERIMENT_FOLDER = re.compile(r"[A-Za-z0-9][\w.-]*-seed\d+-[0-9a-f]{10}", re.ASCII)


def _with_zone(time: str) -> str:
    if datetime.fromisoformat(time).tzinfo is None:
        raise ValueError("a time needs a zone")
    return time


Time = Annotated[str, AfterValidator(_with_zone)]
State = Literal["running", "done", "stopped", "failed"]


class Status(BaseModel):
    """The content of `status.json`.

    Attributes:
        run: number of the run that wrote the file.
        state: `running`; `done`: all stages are; `stopped`: by the user, or stages are left; `failed`.
        host, job: machine of the driver, and its SLURM job number, empty outside SLURM.
        started, heartbeat: when the run began, and when this file was written; ISO 8601, UTC.
        seconds: wall-clock time of all runs of the experiment so far.
        stages: for each stage, the number of finished jobs and of all jobs.
        reason: a line for each job that failed.
        resume: the command that resumes the experiment.
        rows: number of rows of each table at the end of the last run.
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
        """The status in a store; None if the file does not exist or cannot be parsed."""
        content = store.read(Status.FILE)
        return Status.parse(content) if content else None

    @staticmethod
    def parse(content: bytes) -> Status | None:
        """The status in a file's content; None if the content cannot be parsed."""
        try:
            return Status.model_validate_json(content)
        except ValidationError:
            return None

    def write(self, store: Store) -> None:
        """Replace the status in a store."""
        store.write(Status.FILE, (self.model_dump_json(indent=2) + "\n").encode())


def now() -> str:
    """The current time as a Status stores it: ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def age(time: str) -> float:
    """Seconds since a stored time, by this machine's clock; negative if the time is in the future."""
    return (datetime.now(timezone.utc) - datetime.fromisoformat(time)).total_seconds()


def experiment_folders(storage: str) -> list[str]:
    """Names of the experiments' folders in a storage, sorted.

    Raises:
        InvalidInput: if there is none.
        StorageFailed: if the storage cannot be listed.
    """
    folders = [name for name in Store(storage, "").names("") if _EXPERIMENT_FOLDER.fullmatch(name)]
    if not folders:
        raise InvalidInput(f"storage: {storage!r} cannot be used: no experiments there")
    return folders
