"""Temporary folders of a run: private, below TMPDIR, removed at its end or, if it was killed, at the next start.

The process that made a folder holds a lock (flock) on it. The kernel releases the lock when the process ends for any
reason, so a folder whose lock is free has no owner. systemd-tmpfiles does not remove locked folders either.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from dwf_cluster.settings import InvalidInput

SPACE = 8 << 20
"""Bytes that must be free: Ray writes about 2 MB at its start, and its logs grow."""

_MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
"""Length limit in bytes."""

_REMOVAL_ATTEMPTS = 100
"""One every tenth of a second. SLURM kills what is left of a job within seconds."""


@contextlib.contextmanager
def folder(*, for_sockets: bool = False) -> Iterator[str]:
    """A folder that only this user can read, while the body runs; folders of killed runs are removed first.

    Args:
        for_sockets: whether it will hold the sockets of a Ray, whose paths must be short; it is below `/tmp` if TMPDIR
            is long.

    Raises:
        InvalidInput: if TMPDIR cannot be written to or is full.
    """
    parent = _parent(for_sockets)
    remove_abandoned(parent)
    try:
        path, lock = _make(parent)
    except OSError as error:
        raise _unusable(parent, error) from None
    try:
        try:
            _require_space(path)
        except OSError as error:
            raise _unusable(parent, error) from None
        yield path
    finally:
        remove(path)
        os.close(lock)


@contextlib.contextmanager
def used_by_children(folder: str) -> Iterator[None]:
    """Let processes that start while the body runs put their temporary files into a folder, which is removed later."""
    tempfile.gettempdir()  # remembers its result, so this process does not use the folder
    before = os.environ.get("TMPDIR")
    os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        if before is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before


def remove(path: str) -> None:
    """Remove a folder. Processes of Ray may still write to it, so one attempt may not be enough."""
    for _ in range(_REMOVAL_ATTEMPTS):
        shutil.rmtree(path, ignore_errors=True)
        if not os.path.lexists(path):
            return
        time.sleep(0.1)


def remove_abandoned(parent: str) -> None:
    """Remove this user's folders below `parent` whose owners, on this host, have ended; kill what Ray left running."""
    try:
        names = [name for name in os.listdir(parent) if name.startswith(_prefix())]
    except OSError:  # `parent` cannot be listed
        return
    for name in names:
        path = os.path.join(parent, name)
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # it was removed meanwhile, is no folder, or belongs to another user
            continue
        try:
            if os.fstat(lock).st_uid != os.getuid():
                continue
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for pid in _left_by_ray(path):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            remove(path)
        except (
            OSError
        ):  # its owner is alive, or the file system has no locks, so nothing shows that the owner has ended
            continue
        finally:
            os.close(lock)


def make_private(folder: str, token: str) -> None:
    """Make a folder that only this user can read, with a file `token` that only this user can read.

    An older folder of that name is removed first.

    Raises:
        OSError: if the older folder belongs to another user.
    """
    shutil.rmtree(folder, ignore_errors=True)
    os.mkdir(folder, 0o700)
    write_token(folder, token)


def write_token(folder: str, token: str) -> None:
    """Write a new file `token` that only this user can read."""
    with open(os.open(f"{folder}/token", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(token)


def set_environment(folder: str) -> None:
    """Set the environment of all Ray processes that this one starts: token authentication, no usage statistics."""
    os.environ.pop("RAY_AUTH_TOKEN", None)
    # Threads that wait by spinning make the joint stage ten times slower when other programs use the CPUs too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=f"{folder}/token",
        RAY_TRAIN_V2_ENABLED="1",
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S="0",  # all results are in the store
        # Seconds: a busy machine needs more than Ray's 60 and 30.
        RAY_DASHBOARD_STARTUP_TIMEOUT_S="300",
        RAY_DASHBOARD_SUBPROCESS_MODULE_WAIT_READY_TIMEOUT="300",
    )


def _prefix() -> str:
    """Prefix of the folders' names. It differs between hosts: some shared file systems lock for one host only."""
    return f"dwf-{zlib.crc32(platform.node().encode()) & 0xFFFF:04x}_"


def sockets_fit(folder: str) -> bool:
    """Whether the sockets of a Ray below `folder` have paths that are short enough for the system."""
    return len(os.fsencode(_longest_socket(folder))) <= _MAX_SOCKET_PATH


def _longest_socket(folder: str) -> str:
    """The longest path of Ray's sockets: that of a part of its dashboard."""
    return f"{folder}/ray/session_YYYY-MM-DD_hh-mm-ss_ffffff_{os.getpid():07d}/sockets/dash_TaskEventsHead"


def _parent(for_sockets: bool) -> str:
    """TMPDIR; `/tmp` if TMPDIR is not set, or if the paths of sockets below it would be too long."""
    parent = os.path.abspath(os.environ.get("TMPDIR") or "/tmp")
    below = f"/{_prefix()}01234567"
    if not for_sockets or sockets_fit(parent + below):
        return parent
    limit = _MAX_SOCKET_PATH - len(_longest_socket(below))
    print(
        f"warning: TMPDIR: {parent!r} is too long for Ray's sockets: allowed are {limit} bytes; using /tmp",
        file=sys.stderr,
    )
    return "/tmp"


def _make(parent: str) -> tuple[str, int]:
    """Make a folder and lock it; returns its path and the lock."""
    while True:
        path = tempfile.mkdtemp(prefix=_prefix(), dir=parent)
        try:
            lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another run has removed it before it was locked
            continue
        try:
            # Shared: NFS gives no exclusive lock to a reader. `remove_abandoned` gets none there either.
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # another run is removing it
            os.close(lock)
            continue
        except OSError:  # without locks on this file system, no run removes folders here
            return path, lock
        if os.path.exists(path):
            return path, lock
        os.close(lock)


def _require_space(path: str) -> None:
    """Write as much as a run needs, because quotas and full disks show only then."""
    trial = os.path.join(path, "trial")
    with open(trial, "wb") as file:
        file.write(os.urandom(SPACE))
    os.remove(trial)


def _unusable(parent: str, error: OSError) -> InvalidInput:
    return InvalidInput(
        f"TMPDIR: {parent!r} cannot be used: {error.strerror or error}; "
        f"allowed is a folder with {SPACE >> 20} MiB free that this user can write to"
    )


def _left_by_ray(path: str) -> Iterator[int]:
    """Ray's processes of this user with an open file below a folder: agents outlive a killed driver by minutes.

    Without /proc there are none.
    """
    below = f"{os.path.realpath(path)}/"
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            if (process / "comm").read_text().startswith("ray") and any(
                os.readlink(file).startswith(below) for file in (process / "fd").iterdir()
            ):
                yield int(process.name)
