"""A command line: bad input is one line on stderr and exit status 2, a store that fails one and 1."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dwf_cluster.settings import InvalidInput, printable
from dwf_cluster.store import StorageFailed


class Parser(argparse.ArgumentParser):
    """Raises `InvalidInput` where argparse would print its usage."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise InvalidInput(message.removeprefix("argument "))


def run(do: Callable[[Sequence[str]], None]) -> int:
    """Call with this process's arguments; returns the exit status."""
    try:
        do(sys.argv[1:])
        sys.stdout.flush()
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        # A store that does not answer; botocore's own have no class in common with others.
        if not isinstance(error, OSError | StorageFailed) and not type(error).__module__.startswith("botocore."):
            raise
        print(f"failed: {printable(' '.join(str(error).split()) or type(error).__name__)}", file=sys.stderr)
        return 1
    return 0


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: when the disk is full, one that was there before stays as it was.

    Raises:
        OSError: if it cannot be written.
    """
    if path.exists() and not path.is_file():  # such as /dev/stdout
        path.write_bytes(content)
        return
    target = Path(os.path.realpath(path))  # of a link, not the link
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, target)
    finally:
        with contextlib.suppress(OSError):  # it was never made, or has its place
            unfinished.unlink()
