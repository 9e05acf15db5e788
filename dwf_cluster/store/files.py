"""The one class that owns every file name of an experiment, and writes whole files or none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from dwf_cluster.experiment import InvalidInput

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem


@dataclass(frozen=True)
class Store:
    """An experiment's folder. Picklable: each process opens the file system for itself.

    Every method raises `InvalidInput` for a URL of a kind that fsspec does not know.

    Attributes:
        url: storage root, a path or any fsspec URL (`s3://bucket/prefix`).
        folder: the experiment's folder below it.
    """

    url: str
    folder: str

    def __post_init__(self) -> None:
        if "://" not in self.url:  # workers have another working directory
            object.__setattr__(self, "url", os.path.abspath(self.url))

    @cached_property
    def _files(self) -> AbstractFileSystem:
        import fsspec

        try:
            return fsspec.core.url_to_fs(self.url)[0]
        except (ValueError, ImportError) as error:
            raise InvalidInput(f"--storage: {self.url!r} cannot be used: {error}") from None

    @cached_property
    def _is_local(self) -> bool:
        return "file" in self._files.protocol

    @property
    def root(self) -> str:
        """Path or URL of the experiment's folder."""
        return f"{self.url.rstrip('/')}/{self.folder}"

    def path(self, name: str) -> str:
        """Path or URL of a file of this experiment, for people and for pandas."""
        return f"{self.root}/{name}"

    def write(self, name: str, content: bytes) -> None:
        """Write one file, whole or not at all; a file of that name is replaced."""
        path = self._files._strip_protocol(self.path(name))
        if not self._is_local:  # object stores put whole objects
            self._files.pipe_file(path, content)
            return
        folder, base = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        # A leading dot hides an unfinished file from readers of Parquet folders.
        unfinished = os.path.join(folder, f".{base}.{os.getpid()}.unfinished")
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)

    def read(self, name: str) -> bytes | None:
        """The content of one file; None if there is none."""
        try:
            content: bytes = self._files.cat_file(self.path(name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        return content

    def size(self, name: str) -> int | None:
        """Bytes of one file; None if there is none."""
        try:
            return int(self._files.size(self.path(name)))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def names(self, folder: str) -> list[str]:
        """Names of the files and folders directly below a folder, sorted; unfinished ones left out."""
        self._files.invalidate_cache()
        try:
            paths = self._files.ls(self.path(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (path.rstrip("/").rsplit("/", 1)[-1] for path in paths)
        return sorted(name for name in names if not name.startswith("."))

    def remove(self, folder: str) -> None:
        """Remove a folder and all that is in it."""
        self._files.rm(self.path(folder), recursive=True)
