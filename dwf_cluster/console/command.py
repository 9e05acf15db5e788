"""Shared by all commands: a parser with errors of one line, and the exit status of each error."""

from __future__ import annotations

import argparse
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from dwf_cluster.console.terminal import lasting_output
from dwf_cluster.settings import InvalidInput, printable_lines
from dwf_cluster.store import StorageFailed


class Parser(argparse.ArgumentParser):
    """Raises `InvalidInput` where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise InvalidInput(message.removeprefix("argument "))


class CommandFailed(RuntimeError):
    """A command failed for a reason that its user can understand. Its text may have several lines."""


def require_utf8(arguments: Sequence[str]) -> None:
    """Refuse arguments that are not text.

    Raises:
        InvalidInput: for the first argument that is not UTF-8.
    """
    for argument in arguments:
        if re.search("[\ud800-\udfff]", argument):  # how Python represents bytes that are not UTF-8
            raise InvalidInput(f"{argument!r} cannot be used: allowed is text in UTF-8")


def exit_status(
    command: Callable[[], int], resume_command: str = "", after_interrupt: str = "what is done is kept"
) -> int:
    """Run a command; print its error, if it raises one, on stderr.

    Args:
        command: returns its exit status.
        resume_command: the command that resumes it; empty if there is nothing to resume.
        after_interrupt: what an interrupted command leaves.

    Returns:
        The exit status: the command's own; 1 if it failed; 2 for bad input; 130 if it was interrupted.
    """
    resume = f"\nresume: {resume_command}" if resume_command else ""
    with lasting_output():
        try:
            return command()
        except InvalidInput as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (StorageFailed, CommandFailed) as error:
            print(f"failed: {printable_lines(error)}{resume}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"interrupted; {after_interrupt}{resume}", file=sys.stderr)
            return 130
        except Exception:  # a defect of the program
            traceback.print_exc()
            print(f"failed: a defect of the program; see above{resume}", file=sys.stderr)
            return 1
