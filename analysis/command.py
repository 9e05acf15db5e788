"""A command line: bad input is one line on stderr and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from dwf_cluster.experiment import InvalidInput


class Parser(argparse.ArgumentParser):
    """Raises `InvalidInput` where argparse would print its usage."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise InvalidInput(message.removeprefix("argument "))


def run(do: Callable[[Sequence[str]], None]) -> int:
    """Call with this process's arguments; returns the exit status."""
    try:
        do(sys.argv[1:])
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
