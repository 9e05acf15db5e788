"""Files of the user's that are not in an experiment's folder, on a disk or at any fsspec URL."""

from __future__ import annotations

import functools
import hashlib
import os

from dwf_cluster.settings import InvalidInput, regular_file
from dwf_cluster.store.files import Store
from dwf_cluster.store.url import check_url


def absolute(location: str) -> str:
    """A path as it is in every working directory; a URL as it is."""
    return location if "://" in location else os.path.abspath(location)


def read(location: str, field: str) -> bytes:
    """The content of a file.

    Args:
        location: path or URL.
        field: that names it, for the message.

    Raises:
        InvalidInput: if there is no such file, or it is not a regular one.
        StorageFailed: if a URL does not answer.
    """
    if "://" in location:
        root, _, name = location.rpartition("/")
        try:
            check_url(location)
        except InvalidInput as error:
            raise InvalidInput(str(error).replace("--storage", field, 1)) from None
        content = Store(root, "").read(name)
        if content is None:
            raise InvalidInput(f"{field}: {location!r} cannot be read: there is no such file")
        return content
    regular_file(location, field)
    try:
        with open(location, "rb") as file:
            return file.read()
    except OSError as error:
        raise InvalidInput(f"{field}: {location!r} cannot be read: {error.strerror}") from None


def sha256(location: str, field: str) -> str:
    """Digest of a file, in hexadecimal digits; arguments and errors as of `read`.

    A file on a disk is read again only if it has changed, a URL once a process: a sweep asks for it a thousand times.
    """
    if "://" in location:
        return _digest(location, field)
    status = regular_file(location, field)
    return _digest(location, field, status.st_mtime_ns, status.st_size)


@functools.cache
def _digest(location: str, field: str, *version: int) -> str:
    return hashlib.sha256(read(location, field)).hexdigest()
