"""`python -m dwf_cluster.status ./runs`: the state of each experiment of a store. Needs neither torch nor ray.

Whoever can write to the store writes the files that are read here, so nothing in them is trusted: values have a largest
width, characters that a terminal would act on are shown as escapes, and the command that resumes an experiment is made
from its `experiment.json`, whose fields are validated, never from text that a file holds.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterable, Sequence

from dwf_cluster.experiment import Experiment, assemble, invocation
from dwf_cluster.plan.jobs import STAGES
from dwf_cluster.settings import InvalidInput, printable, printable_lines, to_text
from dwf_cluster.store import StorageFailed, Store
from dwf_cluster.store.lock import HEARTBEAT_TIMEOUT
from dwf_cluster.store.status import Status, age, experiment_folders

_CELL = 60
_LINE = 400
"""Characters of a cell, and of a line of a failure's reason, that are shown."""

_LARGEST_NUMBER = 10**12

UNKNOWN_COMMAND = "the command that began it, again"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if the store cannot be read, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m dwf_cluster.status", description="The state of each experiment.")
    parser.add_argument("storage", nargs="?", default="./runs", help="path or URL (default: ./runs)")
    parser.add_argument("--prune", action="store_true", help="list what no run needs any more, ask, and remove it")
    parser.add_argument("--yes", action="store_true", help="with --prune: do not ask")
    try:
        options = parser.parse_args(argv)
        if options.prune:
            from dwf_cluster.console import prune

            return prune.command(options.storage, options.yes)
        for line in lines(options.storage):
            print(line)
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except StorageFailed as error:
        print(f"failed: {printable_lines(error)}", file=sys.stderr)
        return 1
    return 0


def lines(storage: str) -> list[str]:
    """A heading, a line for each experiment, and below each that neither runs nor is done the reason and how to resume.

    Raises:
        InvalidInput: if there is no such storage.
        StorageFailed: if it cannot be listed.
    """
    store = Store(storage, "")
    folders = experiment_folders(storage)
    statuses = {
        folder: content if content is None or isinstance(content, StorageFailed) else Status.parse(content)
        for folder, content in _read_each(store, folders, Status.FILE)
    }
    rows = {folder: _row(folder, status) for folder, status in statuses.items()}
    pending = {
        folder: status
        for folder, status in statuses.items()
        if isinstance(status, Status) and rows[folder][1] not in ("done", "running")
    }
    commands = {
        folder: _resume_command(content, folder, storage, on_slurm=bool(pending[folder].job))
        for folder, content in _read_each(store, pending, "experiment.json")
    }
    heads = ["experiment", "state", *STAGES, "seconds", "rows", "where"]
    widths = [max(map(len, column)) for column in zip(heads, *rows.values(), strict=True)]
    shown = [_line(heads, widths)]
    for folder, status in statuses.items():
        shown.append(_line(rows[folder], widths))
        if isinstance(status, StorageFailed):
            shown.append(f"    {printable(status, _LINE)}")
        elif folder in pending:
            shown += [f"    {printable(line, _LINE)}" for line in pending[folder].reason.splitlines()[:20]]
            shown.append(f"    resume: {commands[folder]}")
    return shown


def _read_each(store: Store, folders: Iterable[str], file: str) -> Iterable[tuple[str, bytes | StorageFailed | None]]:
    folders = list(folders)
    return zip(folders, store.read_all([f"{folder}/{file}" for folder in folders]), strict=True)


def _row(folder: str, status: Status | StorageFailed | None) -> list[str]:
    if not isinstance(status, Status):
        return [folder, "unknown", *("" for _ in STAGES), "", "", ""]
    state, beat = status.state, age(status.heartbeat)
    where = status.host + (f" job {status.job}" if status.job else "")
    if state == "running":
        since = (
            f"heartbeat {_number(max(beat, 0))} s ago"
            if beat > -HEARTBEAT_TIMEOUT
            else "heartbeat ahead of this machine's clock"
        )
        where = f"{printable(where, _CELL - len(since) - 2)}, {since}"
    stages = ["/".join(map(_number, status.stages.get(stage, (0, 0)))) for stage in STAGES]
    rows = _number(sum(status.rows.values())) if status.rows else ""
    shown = "lost" if state == "running" and beat > HEARTBEAT_TIMEOUT else state
    return [folder, shown, *stages, _number(status.seconds), rows, printable(where, _CELL)]


def _number(value: float) -> str:
    """A count or seconds, rounded; `?` for what no run has to_text."""
    return f"{value:.0f}" if -1 < value <= _LARGEST_NUMBER else "?"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _resume_command(content: bytes | StorageFailed | None, folder: str, storage: str, *, on_slurm: bool) -> str:
    """The command that resumes the experiment of a folder, every word quoted for a shell.

    Args:
        content: of its `experiment.json`.
        folder: whose name the experiment must have.
        storage: as the user has given it.
        on_slurm: whether a SLURM job has run it.
    """
    try:
        experiment = Experiment.from_json(content.decode() if isinstance(content, bytes) else "")
        preset, changed = invocation(experiment)
        assignments = [f"{name}={to_text(value)}" for name, value in changed.items()]
        made = assemble(preset, experiment.seed, assignments)
    except (InvalidInput, UnicodeDecodeError):
        return UNKNOWN_COMMAND
    data = made.data.model_copy(update={"sha256": experiment.data.sha256})
    words = ["python", "-m", "dwf_cluster.launch", "--slurm" if on_slurm else "--local", "--preset", preset]
    words += ["--seed", str(experiment.seed), "--storage", storage]
    command = shlex.join([*words, "--set", *assignments] if assignments else words)
    same = experiment.folder == folder and made.model_copy(update={"data": data}) == experiment
    return command if same and command.isprintable() and not preset.startswith("-") else UNKNOWN_COMMAND


if __name__ == "__main__":
    sys.exit(main())
