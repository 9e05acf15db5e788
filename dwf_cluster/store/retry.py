"""Retries of storage operations: transient errors are retried; all others become one line, `StorageFailed`."""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

PATIENCE = 60.0
"""Seconds for which an operation is retried while the storage times out, disconnects or throttles."""

_LONGEST_PAUSE = 10.0

_TRANSIENT = {
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
_TRANSIENT_CLASSES = {
    "ConnectionError",
    "HTTPClientError",
    "TimeoutError",
    "ClientPayloadError",
    "IncompleteReadError",
    "ResponseParserError",  # a proxy's error page, or truncated XML
}
"""Names of an exception's class or of its ancestors. By name, so that no file system's library is imported for this."""


class StorageFailed(RuntimeError):
    """The storage does not answer, refuses access, or is full. Its text is one line: file, operation, reason."""


class NotAFile(StorageFailed):
    """There is a folder where a file is expected."""


def retry(path: str, participle: str, operation: Callable[[], Result]) -> Result:
    """Call a storage operation until it succeeds, for up to `PATIENCE` seconds, with growing random pauses.

    Args:
        path: path or URL of the file, for messages.
        participle: what is done to the file, for messages: `read`, `written`, `listed` or `removed`.
        operation: may be called several times.

    Raises:
        FileExistsError, NotADirectoryError: as the operation raised them.
        FileNotFoundError: as the operation raised it, unless it writes.
        NotAFile: if there is a folder instead of a file.
        StorageFailed: if the error is not transient, or persists.
        Exception: other errors, which are mistakes in a program and not the storage's.
    """
    deadline, pause = time.monotonic() + PATIENCE, 0.1
    while True:
        try:
            return operation()
        except (FileExistsError, NotADirectoryError):
            raise
        except IsADirectoryError as error:
            raise NotAFile(f"{path}: cannot be {participle}: {_reason(error)}") from None
        except FileNotFoundError as error:
            if participle == "written":
                raise StorageFailed(f"{path}: cannot be written: {_reason(error)}") from None
            raise
        except Exception as error:  # each file system has its own classes
            transient = _is_transient(error)
            # botocore's own: no credentials, an unknown profile, an impossible bucket name.
            from_storage = isinstance(error, OSError) or type(error).__module__.startswith("botocore.")
            if not transient and not from_storage:
                raise
            if not transient or time.monotonic() > deadline:
                raise StorageFailed(f"{path}: cannot be {participle}: {_reason(error)}") from error
        time.sleep(random.uniform(0, pause))
        pause = min(2 * pause, _LONGEST_PAUSE)


def _is_transient(error: Exception) -> bool:
    """Whether the operation may succeed when it is repeated."""
    if {parent.__name__ for parent in type(error).__mro__} & _TRANSIENT_CLASSES:
        return True
    return type(error) is OSError and error.errno in _TRANSIENT


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
