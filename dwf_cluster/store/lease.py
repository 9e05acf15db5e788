"""Who runs an experiment: one at a time, and another only when that one is dead.

`lease/00003.json` says who began the experiment's third run; the highest number is the holder's. These files are only
ever created, never replaced, so of many who want to be the fourth one succeeds. Whether the holder lives, its process
tells on the same machine; on another one, the heartbeat of `status.json`.
"""

from __future__ import annotations

import os
import platform
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dwf_cluster.store.files import Store
from dwf_cluster.store.status import HEARTBEAT, Status, Time, age, now

FOLDER = "lease"

SILENCE = 60.0
"""Seconds without a heartbeat after which a holder on another machine may be dead."""


class Held(RuntimeError):
    """Somebody else runs the experiment. Its text is one line: which, host, process, job, since when."""


class Holder(BaseModel):
    """Who runs an experiment.

    Attributes:
        host: name of the driver's machine.
        machine: tells machines and containers of one name apart, and a machine before and after a restart.
        pid, began: the driver's process, and when it began, as its machine counts.
        job, life: SLURM's number of the job, and how often it was requeued; empty outside SLURM.
        since: when the run began; ISO 8601, UTC.
        token: unlike any other holder's.
    """

    model_config = ConfigDict(frozen=True, strict=True)

    host: str
    machine: str
    pid: int
    began: str
    job: str
    life: str
    since: Time
    token: str

    @staticmethod
    def me(pid: int | None = None) -> Holder:
        """This process, or another of this machine on whose behalf it acts."""
        return Holder(
            host=platform.node(),
            machine=_machine(),
            pid=pid or os.getpid(),
            began=_stat(pid or os.getpid())[1],
            job=os.environ.get("SLURM_JOB_ID", ""),
            life=os.environ.get("SLURM_RESTART_COUNT", ""),
            since=now(),
            token=secrets.token_hex(8),
        )


@dataclass(frozen=True)
class Lease:
    """This process's hold on an experiment.

    Attributes:
        store: of the experiment.
        number: of the run.
        holder: this process.
    """

    store: Store
    number: int
    holder: Holder

    def is_lost(self) -> bool:
        """Whether somebody has taken the experiment over."""
        return self.store.size(_file(self.number + 1)) is not None


def is_held(store: Store) -> bool:
    """Whether somebody plainly runs the experiment. `take` looks closer."""
    number, holder = _last(store)
    return bool(holder and _is_alive(store, number, holder))


def refuse_held(store: Store) -> None:
    """Answer at once where somebody plainly runs the experiment.

    Raises:
        Held: if so.
    """
    _, holder = _last(store)
    if holder and is_held(store):
        raise Held(_told(store, holder))


def take(store: Store, wait: Callable[[float], object] = time.sleep, pid: int | None = None) -> Lease:
    """Become the holder.

    Args:
        store: of the experiment.
        wait: waits so many seconds.
        pid: of the process of this machine that is to be known as the holder; None: this one.

    Raises:
        Held: if somebody else is, and alive.
    """
    while True:
        number, holder = _last(store)
        alive = _is_alive(store, number, holder) if holder else False
        if alive is None:  # silent, by clocks that may differ: is it silent while we look?
            before = store.read(Status.FILE)
            wait(2 * HEARTBEAT)
            alive = store.read(Status.FILE) != before
        if alive and holder:
            raise Held(_told(store, holder))
        me = Holder.me(pid)
        if store.create(_file(number + 1), (me.model_dump_json(indent=2) + "\n").encode()):
            for old in store.names(FOLDER)[:-2]:
                store.remove(f"{FOLDER}/{old}")
            return Lease(store, number + 1, me)


def last_word(store: Store) -> str | None:
    """How the experiment's last run ended: `done`, `stopped` or `failed`; None if it has not said so."""
    number, _ = _last(store)
    status = Status.read(store)
    return status.state if status and status.run == number and status.state != "running" else None


def _last(store: Store) -> tuple[int, Holder | None]:
    """The newest lease: its number, 0 without one, and whose it is; None if that cannot be read."""
    number = max((int(name[:5]) for name in store.names(FOLDER) if name[:5].isdigit()), default=0)
    while store.size(_file(number + 1)) is not None:  # a listing may be older than what is there
        number += 1
    if number == 0:
        return 0, None
    try:
        return number, Holder.model_validate_json(store.read(_file(number)) or b"")
    except ValidationError:
        return number, None


def _file(number: int) -> str:
    return f"{FOLDER}/{number:05d}.json"


def _is_alive(store: Store, number: int, holder: Holder) -> bool | None:
    """Whether the holder still runs the experiment; None: it has been silent for long."""
    if last_word(store):
        return False
    me = Holder.me()
    if holder.machine == me.machine:
        state, began = _stat(holder.pid)
        return state not in ("", "Z") and began == holder.began
    if me.job and holder.job == me.job and holder.life != me.life:
        return False  # SLURM has ended the job's former life before it began this one
    status = Status.read(store)
    # Without one it has just begun, or never came to its first.
    heartbeat = status.heartbeat if status and status.run == number else holder.since
    return True if age(heartbeat) < SILENCE else None


def _told(store: Store, holder: Holder) -> str:
    job = f", SLURM job {holder.job}" if holder.job else ""
    status = Status.read(store)
    beat = f", last heartbeat {age(status.heartbeat):.0f} s ago" if status else ""
    return f"{store.folder} is being run by {holder.host} (process {holder.pid}{job}) since {holder.since}{beat}"


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return platform.node()


def _stat(pid: int) -> tuple[str, str]:
    """State of a process of this machine, empty if there is none, and when it began, as Linux tells both."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "", ""
    except PermissionError:  # another user's
        pass
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # not Linux
        return "?", ""
    return fields[0], fields[19]
