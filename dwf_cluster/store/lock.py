"""The lock of an experiment: one run at a time, and another only when the owner of the lock is dead.

`lease/00003.json` names the process that began the third run; the owner of the highest number owns the lock. These
files are created exclusively and never replaced or removed, so of many processes that try to begin the fourth run one
succeeds, and no number is used twice. On the same machine the owner's process shows whether it is alive; across
machines, the heartbeat of its `status.json`. An owner that was wrongly taken for dead is fenced off: its writes fail
(`Store.run`).
"""

from __future__ import annotations

import os
import platform
import secrets
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from dwf_cluster.settings import printable
from dwf_cluster.store.files import LockLost, Store, lock_file
from dwf_cluster.store.status import HEARTBEAT, Status, Time, age, now

HEARTBEAT_TIMEOUT = 60.0
"""Seconds without a heartbeat after which an owner on another machine is presumed dead."""


class ExperimentLocked(RuntimeError):
    """Another run owns the lock. Its text is one line: which experiment, host, process, job, since when."""


class Owner(BaseModel):
    """The process that began a run of an experiment: the content of a lock file.

    Attributes:
        host: host name of the driver's machine.
        machine: distinguishes machines and containers with one host name, and a machine before and after a restart.
        pid, began: process number of the driver, and its start time in the units of its operating system.
        job, life: SLURM's job number, and how often the job was requeued; empty outside SLURM.
        since: when the run began; ISO 8601, UTC.
        token: random, different for every owner.
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
    def current(pid: int | None = None) -> Owner:
        """This process as owner, or another process of this machine on whose behalf it acts."""
        return Owner(
            host=platform.node(),
            machine=_machine(),
            pid=pid or os.getpid(),
            began=_process_state(pid or os.getpid())[1],
            job=os.environ.get("SLURM_JOB_ID", ""),
            life=os.environ.get("SLURM_RESTART_COUNT", ""),
            since=now(),
            token=secrets.token_hex(8),
        )


@dataclass(frozen=True)
class Lock:
    """This process's lock on an experiment.

    Attributes:
        store: store of the experiment, fenced: its writes appear only while this process owns the lock.
        number: number of the run.
        owner: this process, or the one on whose behalf it acts.
    """

    store: Store
    number: int
    owner: Owner

    def is_lost(self) -> bool:
        """Whether a later run has taken the lock."""
        return self.store.newest_run() > self.number

    def loss(self) -> ExperimentLocked:
        """The error that names the new owner."""
        number, owner = _newest(self.store)
        if number == self.number:  # no later run: the run's folder of unfinished files was removed
            return ExperimentLocked(f"{self.store.folder}: the files of its run {number} were removed while it ran")
        return ExperimentLocked(
            f"{self.store.folder} was taken over by {_describe(number, owner)}: this run sent no heartbeat for too long"
        )


def is_locked(store: Store) -> bool:
    """Whether another run certainly owns the lock. `acquire` waits to find out when it is uncertain."""
    number, owner = _newest(store)
    return bool(number and _is_alive(store, number, owner))


def fail_if_locked(store: Store) -> None:
    """Fail at once if another run certainly owns the lock.

    Raises:
        ExperimentLocked: if so.
    """
    number, owner = _newest(store)
    if number and _is_alive(store, number, owner):
        raise _locked_error(store, number, owner)


def acquire(store: Store, wait: Callable[[float], object] = time.sleep, pid: int | None = None) -> Lock:
    """Acquire the lock. After this returns, no write of an earlier run can appear.

    Args:
        store: store of the experiment.
        wait: waits for a number of seconds.
        pid: process of this machine that becomes the owner; None: this process.

    Raises:
        ExperimentLocked: if another run owns the lock and is alive.
    """
    while True:
        number, owner = _newest(store)
        alive = _is_alive(store, number, owner) if number else False
        if alive is None:  # no recent heartbeat, but clocks may differ: wait for the next one
            before = store.read(Status.FILE)
            wait(2 * HEARTBEAT)
            alive = store.read(Status.FILE) != before
        if alive:
            raise _locked_error(store, number, owner)
        new_owner = Owner.current(pid)
        if store.create(lock_file(number + 1), (new_owner.model_dump_json(indent=2) + "\n").encode()):
            fenced = replace(store, run=number + 1)
            try:
                fenced.begin_run()
            except LockLost:  # this process was paused for so long that another run took over
                continue
            return Lock(fenced, number + 1, new_owner)


def final_state(store: Store) -> str | None:
    """Final state of the experiment's newest run: `done`, `stopped` or `failed`; None if it has not written one."""
    number, _ = _newest(store)
    return _final_state(store, number)


def _newest(store: Store) -> tuple[int, Owner | None]:
    """The newest lock: its number (0: there is none) and its owner (None: the file cannot be parsed)."""
    number = store.newest_run()
    if number == 0:
        return 0, None
    try:
        return number, Owner.model_validate_json(store.read(lock_file(number)) or b"")
    except ValidationError:
        return number, None


def _final_state(store: Store, number: int) -> str | None:
    status = Status.read(store)
    return status.state if status and status.run == number and status.state != "running" else None


def _is_alive(store: Store, number: int, owner: Owner | None) -> bool | None:
    """Whether the owner of the newest lock still runs the experiment; None: only its next heartbeat can show it."""
    if _final_state(store, number):
        return False
    if owner:
        current = Owner.current()
        if owner.machine == current.machine:
            state, began = _process_state(owner.pid)
            return state not in ("", "Z") and began == owner.began
        if current.job and owner.job == current.job and owner.life != current.life:
            return False  # SLURM ends a job before it starts it again
    status = Status.read(store)
    # Without a status, the run has just begun, or was killed before its first heartbeat.
    heartbeat = status.heartbeat if status and status.run == number else owner.since if owner else None
    # A heartbeat in the future shows only that the clocks differ.
    return True if heartbeat and 0 <= age(heartbeat) < HEARTBEAT_TIMEOUT else None


def _locked_error(store: Store, number: int, owner: Owner | None) -> ExperimentLocked:
    status = Status.read(store)
    heartbeat = f", last heartbeat {age(status.heartbeat):.0f} s ago" if status else ""
    return ExperimentLocked(f"{store.folder} is being run by {_describe(number, owner)}{heartbeat}")


def _describe(number: int, owner: Owner | None) -> str:
    if owner is None:
        return f"a run whose lock {lock_file(number)} cannot be read"
    job = f", SLURM job {owner.job}" if owner.job else ""
    return printable(f"{owner.host} (process {owner.pid}{job}) since {owner.since}")


def _machine() -> str:
    """Identifies this machine, its boot and the container: within them a process number is unique at any time."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{platform.node()} {boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # macOS, where several machines often have one host name
        command = ["sysctl", "-n", "kern.bootsessionuuid"]
        boot = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
        return f"{platform.node()} {boot}"


def _process_state(pid: int) -> tuple[str, str]:
    """State (empty: no such process) and start time of a process of this machine, from Linux's `/proc/PID/stat`."""
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
