"""Files on a disk: written whole, durably, and only as long as the run that writes them holds its lock.

An unfinished file lies in the folder of the run that writes it (`.run-00003`) and is renamed to its place. The next run
removes that folder before it begins. A file or folder that has gone can no longer be renamed, so nothing of an earlier
run appears after that, however long its processes were paused in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil

_UNFINISHED = ".unfinished"
_RUN_FOLDER = re.compile(r"\.run-(\d+)", re.ASCII)

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
"""What `os.link` answers on CIFS, exFAT and many FUSE file systems."""


def run_folder(root: str, run: int) -> str:
    """Where the unfinished files of an experiment's run lie."""
    return os.path.join(root, f".run-{run:05d}")


def put(path: str, content: bytes, exclusive: bool, staging: str | None, label: str) -> None:
    """Write a file, whole or not at all.

    Args:
        path: of the file; its folder is made.
        content: of the file.
        exclusive: whether to raise FileExistsError if there is such a file; otherwise it is replaced.
        staging: the run's folder; None: beside the file, hidden from readers of Parquet folders.
        label: begins the name of the unfinished file in `staging`.

    Raises:
        FileNotFoundError: if `staging` has gone.
    """
    folder, base = os.path.split(path)
    if staging is None:
        os.makedirs(folder, exist_ok=True)
    unfinished = _unfinished(folder if staging is None else staging, f".{base}" if staging is None else label)
    try:
        _write(unfinished, content, "wb")
        os.makedirs(folder, exist_ok=True)
        if exclusive:
            _link(unfinished, path, content)
        else:
            os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):  # it has its place, or the disk has gone
            os.remove(unfinished)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # else a power cut could undo the rename
        finally:
            os.close(descriptor)


def remove(path: str, staging: str) -> None:
    """Remove a file or a folder.

    Raises:
        FileNotFoundError: if it, or `staging`, has gone.
    """
    aside = _unfinished(staging, "removed")
    os.rename(path, aside)
    with contextlib.suppress(FileNotFoundError):  # the next run has removed it
        shutil.rmtree(aside) if os.path.isdir(aside) else os.remove(aside)


def remove_run(folder: str) -> None:
    """Remove a run's folder, which that run may still be writing to.

    Raises:
        OSError: EBUSY, if a new file has come into it meanwhile.
    """
    try:
        for entry in os.scandir(folder):
            with contextlib.suppress(FileNotFoundError):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.path)
                else:
                    os.remove(entry.path)
        os.rmdir(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise OSError(errno.EBUSY, str(error)) if error.errno == errno.ENOTEMPTY else error from None


def sweep(root: str, before: int | None) -> None:
    """Remove the folders of earlier runs than `before` (None: of all), and unfinished files beside others."""
    for folder, folders, names in os.walk(root):
        for name in list(folders):
            run = _RUN_FOLDER.fullmatch(name)
            if run:
                folders.remove(name)
                if before is None or int(run[1]) < before:
                    remove_run(os.path.join(folder, name))
        for name in names:
            if name.startswith(".") and name.endswith(_UNFINISHED):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, name))


def _unfinished(folder: str, label: str) -> str:
    return os.path.join(folder, f"{label}.{os.getpid()}-{secrets.token_hex(4)}{_UNFINISHED}")


def _write(path: str, content: bytes, mode: str) -> None:
    with open(path, mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _link(unfinished: str, path: str, content: bytes) -> None:
    try:
        os.link(unfinished, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # Exclusive too; but killed in the middle, it leaves a part. Readers of locks expect that.
        _write(path, content, "xb")
