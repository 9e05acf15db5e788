"""The one class that owns every file name of an experiment, writes whole files or none, and is patient with stores."""

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

from dwf_cluster.experiment import MAX_JSON_BYTES, InvalidInput

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

Result = TypeVar("Result")

PATIENCE = 60.0
"""Seconds for which a store that times out, breaks off or asks for patience is asked again."""

_LONGEST_PAUSE = 10.0

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
_PASSING_NAMES = {"ConnectionError", "HTTPClientError", "TimeoutError", "ClientPayloadError", "IncompleteReadError"}
"""Of classes anywhere among an error's ancestors: each file system has its own, and none is imported for this."""

_UNFINISHED = ".unfinished"


class StorageFailed(RuntimeError):
    """The store does not answer, does not let us in, or is full. Its text is one line: file, what was tried, why."""


def check_url(url: str) -> None:
    """Refuse a storage URL that tells secrets, or that fsspec does not know.

    Raises:
        InvalidInput: with what might be a secret left out.
    """
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in url):  # Cs: bytes that are no UTF-8
        raise InvalidInput(f"--storage: {url!r} cannot be used: allowed are printable characters in UTF-8")
    kind, separator, rest = url.partition("://")
    if not separator:
        return
    host = rest.partition("/")[0]
    if "@" in host or re.search("[?#;]", rest) or "::" in url:
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


@dataclass(frozen=True)
class Store:
    """An experiment's folder. Picklable: each process opens the file system for itself.

    Every method asks again for `PATIENCE` seconds, with growing random pauses, where that may help, and raises
    `StorageFailed` where it does not. What is not there is no failure.

    Attributes:
        url: storage root, a path or any fsspec URL (`s3://bucket/prefix`).
        folder: the experiment's folder below it; empty: the root itself.
    """

    url: str
    folder: str

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
            # botocore tries five times, s3fs five times that: `_ask` is patient enough.
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
        files = fsspec.core.url_to_fs(self.url, **options)[0]
        files.retries = 1
        return files

    @cached_property
    def is_local(self) -> bool:
        """Whether the files are this machine's, or look so."""
        return "file" in self.files.protocol

    @property
    def root(self) -> str:
        """Path or URL of the experiment's folder."""
        return "/".join(part for part in (self.url.rstrip("/"), self.folder) if part)

    def path(self, name: str) -> str:
        """Path or URL of a file of this experiment, for people and for pandas."""
        return f"{self.root}/{name}"

    def write(self, name: str, content: bytes) -> None:
        """Write one file, whole or not at all; a file of that name is replaced."""
        self._ask(
            "written",
            name,
            # Object stores put whole objects.
            lambda: (
                self._put(name, content, os.replace)
                if self.is_local
                else self.files.pipe_file(self._key(name), content)
            ),
        )

    def create(self, name: str, content: bytes) -> bool:
        """Write one file if there is none of that name; returns whether it did. Of many who try, one succeeds.

        Args:
            name: of the file.
            content: unlike what any other would write.
        """
        try:
            self._ask(
                "written",
                name,
                lambda: (
                    self._put(name, content, os.link)
                    if self.is_local
                    else self.files.pipe_file(self._key(name), content, mode="create")
                ),
            )
        except (FileExistsError, StorageFailed):
            found = self.read(name)
            if found is None:
                raise
            return found == content  # our own, whose answer was lost on the way
        return True

    def read(self, name: str) -> bytes | None:
        """The content of one file; None if there is none."""
        try:
            content: bytes = self._ask("read", name, lambda: self._content(self._key(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return content

    def read_all(self, names: Sequence[str]) -> list[bytes | StorageFailed | None]:
        """The contents of many files, at once where the store can do that.

        Returns:
            For each file its content, None if there is none, or why it cannot be read: the others still can.
        """
        keys = [self._key(name) for name in names]
        found = {} if self.is_local else self._ask("read", "", lambda: self.files.cat(keys, on_error="return"))
        contents = [found.get(key) for key in keys]
        # What else went wrong is asked for once more, with patience.
        return [
            content if isinstance(content, bytes) else None if _is_absent(content) else self._read_or_reason(name)
            for name, content in zip(names, contents, strict=True)
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
        """Names of the files and folders directly below a folder, sorted; unfinished ones left out."""
        try:
            paths = self._ask("listed", folder, lambda: self.files.ls(self._key(folder), detail=False))
        except (FileNotFoundError, NotADirectoryError):
            return []
        own = self._key(folder).rstrip("/")
        found = (path.rstrip("/") for path in paths)
        names = (path.rsplit("/", 1)[-1] for path in found if path != own)  # some stores list the folder too
        return sorted(name for name in names if not name.startswith("."))

    def remove(self, name: str) -> None:
        """Remove a file, or a folder and all that is in it, if it is there."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            self._ask("removed", name, lambda: self.files.rm(self._key(name), recursive=True))

    def check(self) -> None:
        """Write one file, read it and remove it.

        Raises:
            InvalidInput: if there cannot be such a folder.
            StorageFailed: if one of these cannot be done.
        """
        name, content = f"preflight-{secrets.token_hex(8)}", secrets.token_bytes(64)
        try:
            self.write(name, content)
        except OSError as error:  # a file where a folder is needed
            raise InvalidInput(f"--storage: {self.url!r} cannot be written: {error.strerror or error}") from None
        if self.read(name) != content:
            raise StorageFailed(f"{self.path(name)}: cannot be read as it was written")
        self.remove(name)

    def sweep(self) -> None:
        """Remove what killed processes have left half-written. Nobody else may be writing."""
        if self.is_local:
            for folder, _, names in os.walk(self._key("")):
                for name in names:
                    if name.startswith(".") and name.endswith(_UNFINISHED):
                        with contextlib.suppress(FileNotFoundError):
                            os.remove(os.path.join(folder, name))

    def _content(self, key: str) -> bytes:
        """The content of a file; on a disk of a regular one, as a pipe or a device has no end."""
        if self.is_local:
            status = os.stat(key)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(status.st_mode):
                raise OSError(errno.EINVAL, "not a regular file")
            if key.endswith(".json") and status.st_size > MAX_JSON_BYTES:
                raise OSError(errno.EFBIG, f"{status.st_size} bytes of JSON, allowed are {MAX_JSON_BYTES}")
        content: bytes = self.files.cat_file(key)
        return content

    def _key(self, name: str) -> str:
        return str(self.files._strip_protocol(self.path(name)))

    def _put(self, name: str, content: bytes, place: Callable[[str, str], None]) -> None:
        folder, base = os.path.split(self._key(name))
        os.makedirs(folder, exist_ok=True)
        # A leading dot hides an unfinished file from readers of Parquet folders.
        unfinished = os.path.join(folder, f".{base}.{os.getpid()}-{secrets.token_hex(4)}{_UNFINISHED}")
        try:
            with open(unfinished, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            place(unfinished, os.path.join(folder, base))
        finally:
            with contextlib.suppress(OSError):  # it has its place, or the store has gone
                os.remove(unfinished)

    def _ask(self, what: str, name: str, call: Callable[[], Result]) -> Result:
        deadline, pause = time.monotonic() + PATIENCE, 0.1
        while True:
            try:
                return call()
            except (FileExistsError, NotADirectoryError):
                raise
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
