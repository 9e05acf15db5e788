"""Files on a disk: written whole, durably, and only while the run that writes them owns its lock.

A run writes each file in its own folder (`.run-00003`) and then renames it to its place. The next run removes that
folder before it begins. A removed file cannot be renamed, so nothing of the earlier run appears after that, however
long its processes were paused in between.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat

from dwf_cluster.settings import MAX_JSON_BYTES

_UNFINISHED = ".unfinished"
_RUN_FOLDER = re.compile(r"\.run-(\d+)", re.ASCII)

_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}
"""Errors of `os.link` on CIFS, exFAT and many FUSE file systems."""


def run_folder(root: str, run: int) -> str:
    """Folder of the unfinished files of a run; `root` is the experiment's folder."""
    return os.path.join(root, f".run-{run:05d}")


def put(path: str, content: bytes, exclusive: bool, staging: str | None, label: str) -> None:
    """Write a file, whole or not at all.

    Args:
        path: path of the file; its folder is made.
        content: content of the file.
        exclusive: whether to raise FileExistsError if the file exists; otherwise it is replaced.
        staging: the run's folder; None: write beside the file, hidden from readers of Parquet folders.
        label: start of the unfinished file's name in `staging`.

    Raises:
        FileNotFoundError: if `staging` was removed.
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
        with contextlib.suppress(OSError):  # it was renamed, or the disk is gone
            os.remove(unfinished)
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # otherwise a power cut could undo the rename
        finally:
            os.close(descriptor)


def remove(path: str, staging: str) -> None:
    """Remove a file or a folder.

    Raises:
        FileNotFoundError: if `path` or `staging` does not exist.
    """
    aside = _unfinished(staging, "removed")
    os.rename(path, aside)
    with contextlib.suppress(FileNotFoundError):  # the next run has removed it
        shutil.rmtree(aside) if os.path.isdir(aside) else os.remove(aside)


def remove_run(folder: str) -> None:
    """Remove a run's folder, which that run may still be writing to.

    Raises:
        OSError: EBUSY, if a file was created in it meanwhile.
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


def remove_unfinished(root: str, before: int | None) -> None:
    """Remove the folders of runs before number `before` (None: of all runs), and unfinished files beside others."""
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


def check_regular(path: str) -> None:
    """Check that a file can be read to its end: not a folder, a pipe or a device, and not too much JSON.

    Raises:
        OSError: otherwise.
    """
    status = os.stat(path)
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    if path.endswith(".json") and status.st_size > MAX_JSON_BYTES:
        raise OSError(errno.EFBIG, f"{status.st_size} bytes of JSON, allowed are {MAX_JSON_BYTES}")


def read_end(path: str, count: int) -> bytes | OSError:
    """The last `count` bytes of a file, or the error that prevents reading them."""
    try:
        if not os.path.isfile(path):
            return FileNotFoundError(path) if not os.path.lexists(path) else OSError(path)
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - count))
            return file.read()
    except OSError as error:
        return error


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
        # Exclusive too, but a killed process leaves a truncated file. Readers of locks expect that.
        _write(path, content, "xb")
