"""Shared by the command lines: bad input is one line on stderr and exit status 2, a storage failure one and 1."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dwf_cluster.settings import InvalidInput, one_line
from dwf_cluster.store import StorageFailed


def command(function: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], int]:
    """Make a function of command-line arguments return an exit status: 0 done, 2 bad input, 1 storage failed."""

    @functools.wraps(function)
    def main(arguments: Sequence[str]) -> int:
        try:
            function(arguments)
            sys.stdout.flush()
        except InvalidInput as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Exception as error:
            # A storage that does not answer. The exceptions of botocore have no public base class.
            if not isinstance(error, OSError | StorageFailed) and not type(error).__module__.startswith("botocore."):
                raise
            print(f"failed: {one_line(error, 1000)}", file=sys.stderr)
            return 1
        return 0

    return main


def write_whole(path: Path, content: bytes) -> None:
    """Write a file completely or not at all: if the disk is full, an earlier file of that name stays as it was.

    Raises:
        InvalidInput: if it cannot be written; names the option `--out`.
    """
    try:
        if path.exists() and not path.is_file():  # such as /dev/stdout
            path.write_bytes(content)
            return
        target = Path(os.path.realpath(path))  # replaces the file that a link points to, not the link
        unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
        try:
            unfinished.write_bytes(content)
            os.replace(unfinished, target)
        finally:
            with contextlib.suppress(OSError):  # never created, or renamed
                unfinished.unlink()
    except OSError as error:
        raise InvalidInput(f"--out: {str(path)!r} cannot be used: {error.strerror}") from None
