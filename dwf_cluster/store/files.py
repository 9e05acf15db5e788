"""Store: the folder of one experiment. It names every file, writes files whole or not at all, and retries.

A store that carries the number of a run is *fenced*: as soon as a later run has taken the experiment's lock, none of
its writes appears. On a disk this holds without exception (`store.disk`). Object stores cannot rename, so the store
reads the locks right before each PUT.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import disk
from dwf_cluster.store.retry import NotAFile, Result, StorageFailed, retry
from dwf_cluster.store.url import check_url

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

LOCKS = "lease"
"""Folder of an experiment's locks, one file a run, `00001.json` and so on. They are never replaced or removed."""

_LOCK_NAME = re.compile(r"(\d+)\.json", re.ASCII)

_CONNECTIONS = 64
"""HTTP connections of one process: a run of many experiments writes their heartbeats in as many threads."""


class LockLost(RuntimeError):
    """A later run has taken the experiment over, or this run has ended: it may not write any more."""


def lock_file(number: int) -> str:
    """Path of the lock of an experiment's run, below the experiment's folder; runs are numbered from 1."""
    return f"{LOCKS}/{number:05d}.json"


@dataclass(frozen=True)
class RowLabels:
    """The columns of every table that say which experiment a row belongs to.

    Attributes:
        experiment: the experiment's signature.
        preset: name of the preset that the experiment started from.
        dataset: name of the data set, or of the file with the images.
        seed: seed of every random draw.
    """

    experiment: str
    preset: str
    dataset: str
    seed: int


@dataclass(frozen=True)
class Store:
    """An experiment's folder. Picklable: each process opens the file system for itself.

    Every method retries transient errors (`store.retry`) and raises `StorageFailed` for others. A missing file is not
    an error.

    Attributes:
        url: storage root, a path or any fsspec URL (`s3://bucket/prefix`).
        folder: name of the experiment's folder below the root; empty: the root itself.
        run: number of the run that writes; then every write, create and remove raises `LockLost` once a later run
            has taken the experiment over. None: writes are not fenced.
        labels: added to every row that is written to a table; None: no rows can be written.
    """

    url: str
    folder: str
    run: int | None = None
    labels: RowLabels | None = None

    def __post_init__(self) -> None:
        check_url(self.url)
        if "://" not in self.url:  # Ray's workers have another working directory
            object.__setattr__(self, "url", os.path.abspath(self.url))
            check_url(self.url)

    @cached_property
    def files(self) -> AbstractFileSystem:
        """The file system. Its library finds the endpoint and the credentials."""
        import fsspec

        options: dict[str, object] = {"use_listings_cache": False}  # see at once what other processes have written
        if self.url.startswith("s3://"):
            # Only `retry` retries. By default botocore would five times, and s3fs five times that.
            retries = {"total_max_attempts": 1}
            options["config_kwargs"] = {"retries": retries, "max_pool_connections": _CONNECTIONS}
        file_system = fsspec.core.url_to_fs(self.url, **options)[0]
        file_system.retries = 1
        return file_system

    @cached_property
    def is_local(self) -> bool:
        """Whether the files are on a disk of this machine or on a mounted file system."""
        return "file" in self.files.protocol

    @property
    def root(self) -> str:
        """Path or URL of the experiment's folder."""
        return "/".join(part for part in (self.url.rstrip("/"), self.folder) if part)

    def path(self, name: str) -> str:
        """Path or URL of a file of this experiment, for messages and for pandas."""
        return f"{self.root}/{name}"

    def write(self, name: str, content: bytes) -> None:
        """Write one file, whole or not at all; a file of that name is replaced.

        Raises:
            LockLost: if the store is fenced and its run no longer owns the lock.
        """
        self._retry("written", name, lambda: self._put(name, content, exclusive=False))

    def create(self, name: str, content: bytes) -> bool:
        """Create one file and return True, or return False if it exists. Of many processes, exactly one succeeds.

        Args:
            name: name of the file.
            content: content that no other process would write.

        Raises:
            LockLost: as `write`.
        """
        try:
            self._retry("written", name, lambda: self._put(name, content, exclusive=True))
        except (FileExistsError, StorageFailed):
            existing = self.read(name)
            if existing is None:
                raise
            return existing == content  # ours, if only the answer to an earlier attempt was lost
        return True

    def read(self, name: str) -> bytes | None:
        """The content of one file; None if it does not exist."""
        try:
            content: bytes = self._retry("read", name, lambda: self._content(self._key(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return content

    def read_all(self, names: Sequence[str]) -> list[bytes | StorageFailed | None]:
        """The contents of many files, in parallel where the store can do that.

        Returns:
            For each file its content, None if it does not exist, or the reason why it cannot be read.
        """
        keys = [self._key(name) for name in names]
        remote = bool(keys) and not self.is_local  # `cat` does not accept an empty list
        results = self._retry("read", "", lambda: self.files.cat(keys, on_error="return")) if remote else {}
        contents = [results.get(key) for key in keys]
        # Read a file again, with retries, if there was another error.
        return [
            content if isinstance(content, bytes) else None if _is_absent(content) else self._read_or_reason(name)
            for name, content in zip(names, contents, strict=True)
        ]

    def read_start(self, name: str, count: int) -> bytes | None:
        """The first `count` bytes of one file; None if it does not exist."""
        try:
            content: bytes = self._retry("read", name, lambda: self._content(self._key(name), count))
        except (FileNotFoundError, NotADirectoryError, NotAFile):
            return None
        return content

    def read_ends(self, names: Sequence[str], count: int) -> list[bytes | None]:
        """At least the last `count` bytes of many files, in parallel where the store can; None for missing files."""
        keys = [self._key(name) for name in names]
        if self.is_local:
            ends: list[object] = [disk.read_end(key, count) for key in keys]
        else:
            read = functools.partial(self.files.cat, keys, on_error="return", start=-count)
            results = self._retry("read", "", read) if keys else {}
            ends = [results.get(key) for key in keys]
        # Read a file again, with retries, if there was another error.
        return [
            end if isinstance(end, bytes) else None if _is_absent(end) else self.read(name)
            for name, end in zip(names, ends, strict=True)
        ]

    def _read_or_reason(self, name: str) -> bytes | StorageFailed | None:
        try:
            return self.read(name)
        except StorageFailed as error:
            return error

    def size(self, name: str) -> int | None:
        """Bytes of one file; None if it does not exist."""
        try:
            return int(self._retry("read", name, lambda: self.files.size(self._key(name))))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders directly below a folder, sorted; without hidden and unfinished ones."""
        try:
            paths = self._retry("listed", folder, lambda: self.files.ls(self._key(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        own = self._key(folder).rstrip("/")
        listed = (path.rstrip("/") for path in paths)
        names = (path.rsplit("/", 1)[-1] for path in listed if path != own)  # some stores list the folder too
        return sorted(name for name in names if not name.startswith("."))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with its content, if it exists.

        Raises:
            LockLost: as `write`.
        """
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._retry("removed", name, lambda: self._remove(self._key(name)))

    def newest_run(self) -> int:
        """Number of the newest run that has taken the experiment's lock; 0 without one."""
        locks = (_LOCK_NAME.fullmatch(name) for name in self.names(LOCKS))
        number = max((int(lock[1]) for lock in locks if lock), default=0)
        number = max(number, self.run or 0)
        while self.read(lock_file(number + 1)) is not None:  # the listing may be older than the newest lock
            number += 1
        return number

    def preflight(self) -> None:
        """Test what a run relies on: to write, replace, read and remove a file, and to create one exclusively.

        Raises:
            InvalidInput: if the folder cannot be made, or files cannot be created exclusively: then two runs could
                own one lock.
            StorageFailed: if another operation fails.
        """
        from fsspec import AbstractFileSystem

        name, content, other = f"preflight-{secrets.token_hex(8)}", secrets.token_bytes(64), secrets.token_bytes(64)
        try:
            self.write(name, content)
        except OSError as error:  # a file where a folder is needed
            raise InvalidInput(f"--storage: {self.url!r} cannot be written: {error.strerror or error}") from None
        self.write(name, other)
        if self.read(name) != other:
            raise StorageFailed(f"{self.path(name)}: cannot be read as it was written")
        self.remove(name)
        # fsspec's default `pipe_file` checks that the file does not exist, then writes: two processes may both succeed.
        exclusive = self.is_local or getattr(self.files.pipe_file, "__func__", None) != AbstractFileSystem.pipe_file
        try:
            exclusive = exclusive and self.create(name, content) and not self.create(name, other)
        except (NotImplementedError, TypeError, ValueError):  # a `pipe_file` without that mode
            exclusive = False
        self.remove(name)
        if not exclusive:
            raise InvalidInput(
                f"--storage: {self.url!r} cannot be used: it, or the library that opens it, does not refuse to create "
                "a file that exists, so two runs could own one experiment; allowed are folders, and object stores "
                "with conditional writes (If-None-Match)"
            )

    def begin_run(self) -> None:
        """Fence off all earlier runs: after this returns, none of their writes can appear.

        Raises:
            LockLost: if a later run has already begun.
        """
        if folder := self._staging:
            self._retry("written", os.path.basename(folder), lambda: os.makedirs(folder, exist_ok=True))
        self.remove_temporary()
        try:
            # A later run may have removed temporary files before this folder was made; then its lock exists by now.
            self._fail_if_lost()
        except LockLost:
            self.end_run()
            raise

    def end_run(self) -> None:
        """Prevent all further writes of this run, also by cancelled processes that have not ended yet."""
        if folder := self._staging:
            self._retry("removed", os.path.basename(folder), lambda: disk.remove_run(folder))

    def remove_temporary(self) -> None:
        """Remove the unfinished files of earlier runs. No other run may be writing."""
        if self.is_local:
            self._retry("removed", "", lambda: disk.remove_unfinished(self._key(""), self.run))

    def _content(self, key: str, count: int | None = None) -> bytes:
        """The content of a file, or its first `count` bytes."""
        if self.is_local:
            disk.check_regular(key)
        content: bytes = self.files.cat_file(key, start=None if count is None else 0, end=count)
        return content

    def _key(self, name: str) -> str:
        return str(self.files._strip_protocol(self.path(name)))

    @property
    def _staging(self) -> str | None:
        """Folder of the run's unfinished files; None if the store is not fenced, or not on a disk."""
        return None if self.run is None or not self.is_local else disk.run_folder(self._key(""), self.run)

    def _put(self, name: str, content: bytes, exclusive: bool) -> None:
        if not self.is_local:
            self._fail_if_lost()
            # An object appears whole or not at all.
            self.files.pipe_file(self._key(name), content, **({"mode": "create"} if exclusive else {}))
            return
        try:
            disk.put(self._key(name), content, exclusive, self._staging, name.replace("/", "-"))
        except FileNotFoundError as error:
            self._fail_if_ended()
            raise OSError(errno.ESTALE, "its folder was removed meanwhile") from error  # transient

    def _remove(self, key: str) -> None:
        if self._staging is None:
            self._fail_if_lost()
            self.files.rm(key, recursive=True)
            return
        try:
            disk.remove(key, self._staging)
        except FileNotFoundError:
            self._fail_if_ended()
            raise

    def _fail_if_lost(self) -> None:
        if self.run is not None and (newest := self.newest_run()) > self.run:
            raise LockLost(f"{self.root} was taken over by run {newest}: run {self.run} writes nothing more")

    def _fail_if_ended(self) -> None:
        if self._staging and not os.path.isdir(self._staging):
            self._fail_if_lost()
            raise LockLost(f"{self.root}: run {self.run} has ended, or its folder was removed: it writes nothing more")

    def _retry(self, participle: str, name: str, operation: Callable[[], Result]) -> Result:
        return retry(self.path(name), participle, operation)


def _is_absent(result: object) -> bool:
    return isinstance(result, FileNotFoundError | NotADirectoryError)
