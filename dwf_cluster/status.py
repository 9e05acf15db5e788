"""`python -m dwf_cluster.status ./runs`: how the experiments of a store stand. Needs neither torch nor ray."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence

from dwf_cluster.experiment import STAGES, InvalidInput
from dwf_cluster.store import StorageFailed, Store
from dwf_cluster.store.lease import SILENCE
from dwf_cluster.store.status import Status, age

_EXPERIMENT = re.compile(r"[A-Za-z0-9][\w.-]*-seed\d+-[0-9a-f]{10}", re.ASCII)

_COMMANDS = ("python -m dwf_cluster.launch ", "python jobs/", "sbatch slurm/", "ray job submit ")
"""What a command that resumes may begin with: files of a store are not to be trusted with a shell."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if the store cannot be read, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m dwf_cluster.status", description="How experiments stand.")
    parser.add_argument("storage", nargs="?", default="./runs", help="path or URL (default: ./runs)")
    parser.add_argument("--prune", action="store_true", help="list what no run needs any more, ask, and remove it")
    parser.add_argument("--yes", action="store_true", help="with --prune: do not ask")
    try:
        options = parser.parse_args(argv)
        if options.prune:
            from dwf_cluster.store import prune

            return prune.command(options.storage, options.yes)
        for line in lines(options.storage):
            print(line)
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


def lines(storage: str) -> list[str]:
    """A heading, a line for each experiment, and below those that do not run and are not done why, and what resumes.

    Raises:
        InvalidInput: if there is no such storage.
        StorageFailed: if it cannot be read.
    """
    store = Store(storage, "")
    folders = [name for name in store.names("") if _EXPERIMENT.fullmatch(name)]
    if not folders:
        raise InvalidInput(f"storage: {storage!r} cannot be used: no experiments there")
    contents = store.read_all([f"{folder}/{Status.FILE}" for folder in folders])
    found = {
        folder: Status.parse(content) if content else None for folder, content in zip(folders, contents, strict=True)
    }
    rows = [_row(folder, status) for folder, status in found.items()]
    heads = ["experiment", "state", *STAGES, "seconds", "rows", "where"]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    told = [_line(heads, widths)]
    for row, status in zip(rows, found.values(), strict=True):
        told.append(_line(row, widths))
        if status and row[1] not in ("done", "running"):
            told += [f"    {_printable(line)}" for line in status.reason.splitlines()[:20]]
            told.append(f"    resume: {_command(status.resume)}")
    return told


def _row(folder: str, status: Status | None) -> list[str]:
    if status is None:
        return [folder, "unknown", *("" for _ in STAGES), "", "", ""]
    state, beat = status.state, age(status.heartbeat)
    where = status.host + (f" job {status.job}" if status.job else "")
    if state == "running":
        where += f", heartbeat {beat:.0f} s ago"
    stages = ["{}/{}".format(*status.stages.get(stage, (0, 0))) for stage in STAGES]
    rows = str(sum(status.rows.values())) if status.rows else ""
    shown = "lost" if state == "running" and beat > SILENCE else state
    return [folder, shown, *stages, f"{status.seconds:.0f}", rows, _printable(where)]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _command(text: str) -> str:
    """The command with every word quoted, so that pasting it runs nothing else."""
    try:
        words = shlex.join(shlex.split(_printable(text)))
    except ValueError:
        words = ""
    return words if words.startswith(_COMMANDS) else "the command that began it, again"


if __name__ == "__main__":
    sys.exit(main())
