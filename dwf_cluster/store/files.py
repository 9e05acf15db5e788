"""The one class that owns every file name of an experiment, writes whole files or none, and retries.

A store that carries the number of a run is *fenced*: as soon as a later run has taken the experiment's lock, none of
its writes appears. On a disk that holds without exception (`store.disk`). Object stores have no rename, so the locks
are looked at right before each PUT.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import re
import secrets
import stat
import time
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeVar

from dwf_cluster.settings import MAX_JSON_BYTES, InvalidInput
from dwf_cluster.store import disk

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

PATIENCE = 60.0
"""Seconds for which an operation is retried while the store times out, breaks off or asks to slow down."""

LOCKS = "lease"
"""Folder of an experiment's locks, one file a run, `00001.json` and so on. They are never replaced or removed."""

_LONGEST_PAUSE = 10.0

_CONNECTIONS = 64
"""HTTP connections of a process at once: a run of many experiments writes their heartbeats in as many threads."""

_PASSING = {
    errno.EAGAIN,
    errno.EBUSY,  # 503 SlowDown
    errno.EINTR,
    errno.EIO,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ESTALE,
    getattr(errno, "EREMOTEIO", errno.EIO),  # 500
    None,  # a status that the library has no number for, such as 502
}
_PASSING_NAMES = {
    "ConnectionError",
    "HTTPClientError",
    "TimeoutError",
    "ClientPayloadError",
    "IncompleteReadError",
    "ResponseParserError",  # a proxy's error page, or XML that was cut off
}
"""Of classes anywhere among an error's ancestors: each file system has its own, and none is imported for this."""

_AZURE = ("abfs", "abfss", "az")
"""Kinds whose usual URL is `abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX`."""

_LOCK = re.compile(r"(\d+)\.json", re.ASCII)


class StorageFailed(RuntimeError):
    """The store does not answer, does not let us in, or is full. Its text is one line: file, what was tried, why."""


class NotAFile(StorageFailed):
    """A folder stands where a file is expected."""


class LockLost(RuntimeError):
    """A later run has taken the experiment over, or this run has ended: it may write nothing more."""


def check_url(url: str) -> None:
    """Refuse a storage URL that contains secrets, or of a kind that fsspec does not know.

    Raises:
        InvalidInput: with what might be a secret left out.
    """
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in url):  # Cs: bytes that are no UTF-8
        raise InvalidInput(f"--storage: {url!r} cannot be used: allowed are printable characters in UTF-8")
    kind, separator, rest = url.partition("://")
    if not separator:
        return
    host = rest.partition("/")[0]
    user, at, _ = host.rpartition("@")
    is_container = kind in _AZURE and bool(user) and ":" not in user and "@" not in user
    if (at and not is_container) or re.search("[?#;]", rest) or "::" in url:
        shown = f"{kind.rpartition('::')[2]}://{re.split('[?#;]', rest.rpartition('@')[2])[0]}"
        raise InvalidInput(
            f"--storage: {shown!r} with a password, a key or options cannot be used: allowed is KIND://BUCKET/PREFIX; "
            "keys and endpoint come from the environment, the profile or the machine"
        )
    import fsspec
    from fsspec.archive import AbstractArchiveFileSystem

    try:
        files = fsspec.get_filesystem_class(kind)
    except (ValueError, ImportError) as error:
        raise InvalidInput(f"--storage: {url!r} cannot be used: {error}") from None
    if issubclass(files, AbstractArchiveFileSystem) or kind == "data":
        raise InvalidInput(f"--storage: {url!r} cannot be used: {kind} has no files that can be replaced")


def lock_file(number: int) -> str:
    """Name of the lock of an experiment's run of that number, from 1."""
    return f"{LOCKS}/{number:05d}.json"


@dataclass(frozen=True)
class Labels:
    """The columns of every table that say which experiment a row belongs to.

    Attributes:
        experiment: its signature.
        preset: the name of the preset it started from.
        dataset: name of the data set, or of the file with the images.
        seed: of every random draw.
    """

    experiment: str
    preset: str
    dataset: str
    seed: int


@dataclass(frozen=True)
class Store:
    """An experiment's folder. Picklable: each process opens the file system for itself.

    Every method retries for `PATIENCE` seconds, with growing random pauses, where that may help, and raises
    `StorageFailed` where it does not. A missing file is no failure.

    Attributes:
        url: storage root, a path or any fsspec URL (`s3://bucket/prefix`).
        folder: the experiment's folder below it; empty: the root itself.
        run: number of the run that writes; then every write, create and remove raises `LockLost` once a later run
            has taken the experiment over. None: writes are not fenced.
        labels: of the rows that are written to tables; None: no rows can be.
    """

    url: str
    folder: str
    run: int | None = None
    labels: Labels | None = None

    def __post_init__(self) -> None:
        check_url(self.url)
        if "://" not in self.url:  # workers have another working directory
            object.__setattr__(self, "url", os.path.abspath(self.url))
            check_url(self.url)

    @cached_property
    def files(self) -> AbstractFileSystem:
        """The file system, with endpoint and credentials from where its library looks for them."""
        import fsspec

        options: dict[str, object] = {"use_listings_cache": False}  # what others have written must be seen at once
        if self.url.startswith("s3://"):
            # botocore retries five times, s3fs five times that: `_ask` retries long enough.
            retries = {"total_max_attempts": 1}
            options["config_kwargs"] = {"retries": retries, "max_pool_connections": _CONNECTIONS}
        files = fsspec.core.url_to_fs(self.url, **options)[0]
        files.retries = 1
        return files

    @cached_property
    def is_local(self) -> bool:
        """Whether the files are on a disk of this machine, or mounted as if they were."""
        return "file" in self.files.protocol

    @property
    def root(self) -> str:
        """Path or URL of the experiment's folder."""
        return "/".join(part for part in (self.url.rstrip("/"), self.folder) if part)

    def path(self, name: str) -> str:
        """Path or URL of a file of this experiment, for people and for pandas."""
        return f"{self.root}/{name}"

    def write(self, name: str, content: bytes) -> None:
        """Write one file, whole or not at all; a file of that name is replaced.

        Raises:
            LockLost: if the store is fenced and its run no longer holds the lock.
        """
        self._ask("written", name, lambda: self._put(name, content, exclusive=False))

    def create(self, name: str, content: bytes) -> bool:
        """Write one file if there is none of that name; returns whether it did. Of many who try, one succeeds.

        Args:
            name: of the file.
            content: unlike what any other process would write.

        Raises:
            LockLost: as `write`.
        """
        try:
            self._ask("written", name, lambda: self._put(name, content, exclusive=True))
        except (FileExistsError, StorageFailed):
            existing = self.read(name)
            if existing is None:
                raise
            return existing == content  # ours, if only the answer to the request was lost
        return True

    def read(self, name: str) -> bytes | None:
        """The content of one file; None if there is none."""
        try:
            content: bytes = self._ask("read", name, lambda: self._content(self._key(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return content

    def read_all(self, names: Sequence[str]) -> list[bytes | StorageFailed | None]:
        """The contents of many files, in parallel where the store can do that.

        Returns:
            For each file its content, None if there is none, or why it cannot be read: the others still can.
        """
        keys = [self._key(name) for name in names]
        remote = bool(keys) and not self.is_local  # `cat` takes no empty list
        results = self._ask("read", "", lambda: self.files.cat(keys, on_error="return")) if remote else {}
        contents = [results.get(key) for key in keys]
        # Other errors: read the file once more, with retries.
        return [
            content if isinstance(content, bytes) else None if _is_absent(content) else self._read_or_reason(name)
            for name, content in zip(names, contents, strict=True)
        ]

    def read_start(self, name: str, count: int) -> bytes | None:
        """The first `count` bytes of one file; None if there is none."""
        try:
            content: bytes = self._ask("read", name, lambda: self._content(self._key(name), count))
        except (FileNotFoundError, NotADirectoryError, NotAFile):
            return None
        return content

    def read_ends(self, names: Sequence[str], count: int) -> list[bytes | None]:
        """At least the last `count` bytes of many files, at once where the store can do that; None for each absent."""
        keys = [self._key(name) for name in names]
        if self.is_local:
            ends: list[object] = [_end(key, count) for key in keys]
        else:
            found = self._ask("read", "", lambda: self.files.cat(keys, on_error="return", start=-count)) if keys else {}
            ends = [found.get(key) for key in keys]
        # What else went wrong is asked for once more, with patience.
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
        """Bytes of one file; None if there is none."""
        try:
            return int(self._ask("read", name, lambda: self.files.size(self._key(name))))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders directly below a folder, sorted; hidden and unfinished ones left out."""
        try:
            paths = self._ask("listed", folder, lambda: self.files.ls(self._key(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        own = self._key(folder).rstrip("/")
        listed = (path.rstrip("/") for path in paths)
        names = (path.rsplit("/", 1)[-1] for path in listed if path != own)  # some stores list the folder too
        return sorted(name for name in names if not name.startswith("."))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder and all that is in it, if it exists.

        Raises:
            LockLost: as `write`.
        """
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._ask("removed", name, lambda: self._remove(self._key(name)))

    def newest_run(self) -> int:
        """Number of the newest run that has taken the experiment's lock; 0 without one."""
        locks = (_LOCK.fullmatch(name) for name in self.names(LOCKS))
        number = max((int(lock[1]) for lock in locks if lock), default=0)
        number = max(number, self.run or 0)
        while self.read(lock_file(number + 1)) is not None:  # a listing may be older than the newest lock
            number += 1
        return number

    def preflight(self) -> None:
        """Prove that the store can do what a run relies on: write, replace, read, remove, and create exclusively.

        Raises:
            InvalidInput: if there cannot be such a folder, or files cannot be created exclusively, without which two
                runs could hold one lock.
            StorageFailed: if one of the others cannot be done.
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
        # fsspec's own `pipe_file` looks whether the file exists and then writes: two processes may both succeed.
        exclusive = self.is_local or getattr(self.files.pipe_file, "__func__", None) != AbstractFileSystem.pipe_file
        try:
            exclusive = exclusive and self.create(name, content) and not self.create(name, other)
        except (NotImplementedError, TypeError, ValueError):  # of a `pipe_file` that knows no such mode
            exclusive = False
        self.remove(name)
        if not exclusive:
            raise InvalidInput(
                f"--storage: {self.url!r} cannot be used: it, or the library that opens it, does not refuse to create "
                "a file that exists, so two runs could hold one experiment; allowed are folders, and object stores "
                "with conditional writes (If-None-Match)"
            )

    def begin_run(self) -> None:
        """Fence off all earlier runs: when this returns, none of their writes can appear any more.

        Raises:
            LockLost: if a later run has already begun.
        """
        if folder := self._staging:
            self._ask("written", os.path.basename(folder), lambda: os.makedirs(folder, exist_ok=True))
        self.remove_temporary()
        try:
            # A later run that has swept before the folder was made has its lock by now.
            self._fail_if_lost()
        except LockLost:
            self.end_run()
            raise

    def end_run(self) -> None:
        """Let nothing more be written by this run, not even by a cancelled process that has not ended yet."""
        if folder := self._staging:
            self._ask("removed", os.path.basename(folder), lambda: disk.remove_run(folder))

    def remove_temporary(self) -> None:
        """Remove what earlier runs have left half-written. No other run may be writing."""
        if self.is_local:
            self._ask("removed", "", lambda: disk.sweep(self._key(""), self.run))

    def _content(self, key: str, count: int | None = None) -> bytes:
        """The content of a file, or its first `count` bytes; on a disk only of a regular one: a pipe has no end."""
        if self.is_local:
            status = os.stat(key)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if key.endswith(".json") and status.st_size > MAX_JSON_BYTES:
                raise OSError(errno.EFBIG, f"{status.st_size} bytes of JSON, allowed are {MAX_JSON_BYTES}")
        content: bytes = self.files.cat_file(key, start=None if count is None else 0, end=count)
        return content

    def _key(self, name: str) -> str:
        return str(self.files._strip_protocol(self.path(name)))

    @property
    def _staging(self) -> str | None:
        """Folder of the run's unfinished files, on a disk; None without."""
        return None if self.run is None or not self.is_local else disk.run_folder(self._key(""), self.run)

    def _put(self, name: str, content: bytes, exclusive: bool) -> None:
        if not self.is_local:
            self._fail_if_lost()
            # Object stores put whole objects.
            self.files.pipe_file(self._key(name), content, **({"mode": "create"} if exclusive else {}))
            return
        try:
            disk.put(self._key(name), content, exclusive, self._staging, name.replace("/", "-"))
        except FileNotFoundError as error:
            self._fail_if_ended()
            raise OSError(errno.ESTALE, "its folder was removed meanwhile") from error  # to be tried again

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

    def _ask(self, what: str, name: str, call: Callable[[], Result]) -> Result:
        deadline, pause = time.monotonic() + PATIENCE, 0.1
        while True:
            try:
                return call()
            except (FileExistsError, NotADirectoryError):
                raise
            except IsADirectoryError as error:
                raise NotAFile(f"{self.path(name)}: cannot be {what}: {_reason(error)}") from None
            except FileNotFoundError as error:
                if what == "written":
                    raise StorageFailed(f"{self.path(name)}: cannot be written: {_reason(error)}") from None
                raise
            except Exception as error:  # each file system has its own classes
                passing = _is_passing(error)
                # botocore's own: no credentials, no such profile, a bucket's name that cannot be.
                spoken = isinstance(error, OSError) or type(error).__module__.startswith("botocore.")
                if not passing and not spoken:
                    raise
                if not passing or time.monotonic() > deadline:
                    raise StorageFailed(f"{self.path(name)}: cannot be {what}: {_reason(error)}") from error
            time.sleep(random.uniform(0, pause))
            pause = min(2 * pause, _LONGEST_PAUSE)


def _end(path: str, count: int) -> bytes | OSError:
    """The last bytes of a file of this machine, or why they cannot be read."""
    try:
        if not os.path.isfile(path):
            return FileNotFoundError(path) if not os.path.lexists(path) else OSError(path)
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - count))
            return file.read()
    except OSError as error:
        return error


def _is_absent(result: object) -> bool:
    return isinstance(result, FileNotFoundError | NotADirectoryError)


def _is_passing(error: Exception) -> bool:
    """Whether it may work if it is tried again."""
    if {parent.__name__ for parent in type(error).__mro__} & _PASSING_NAMES:
        return True
    return type(error) is OSError and error.errno in _PASSING


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
