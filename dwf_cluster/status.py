"""The command `python -m dwf_cluster.status ./runs`, or `dwf status`: the state of each experiment of a storage.

It needs neither torch nor ray. Anyone who can write to the store can change the files that are read here, so none of
their content is trusted: cells have a maximum width, characters that control a terminal are shown as escapes, and the
resume command is derived from `experiment.json`, whose fields are validated; stored text is never part of it.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Sequence

from dwf_cluster.console.command import Parser, exit_status
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import STAGES
from dwf_cluster.presets import assemble, invocation
from dwf_cluster.settings import InvalidInput, printable, to_text
from dwf_cluster.store import StorageFailed, Store
from dwf_cluster.store.lock import HEARTBEAT_TIMEOUT
from dwf_cluster.store.status import Status, age, experiment_folders

_MAX_CELL = 60
_MAX_REASON = 400
"""Characters shown of a cell, and of one line of a failure's reason."""

_MAX_REASON_LINES = 20

_LARGEST_NUMBER = 10**12

UNKNOWN_COMMAND = "run the command that started it again"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 if the store cannot be read, 2 for bad input.

    Args:
        arguments: None: those of this process.
    """
    return exit_status(lambda: _run(arguments))


def _run(arguments: Sequence[str] | None) -> int:
    parser = Parser(prog="python -m dwf_cluster.status", description="Show the state of each experiment of a storage.")
    parser.add_argument("storage", nargs="?", default="./runs", help="path or URL (default: ./runs)")
    parser.add_argument(
        "--prune", action="store_true", help="list checkpoints that no run needs any more, ask, and remove them"
    )
    parser.add_argument("--yes", action="store_true", help="with --prune: do not ask")
    options = parser.parse_args(arguments)
    if options.prune:
        from dwf_cluster.console import prune

        return prune.command(options.storage, options.yes)
    for line in lines(options.storage):
        print(line)
    return 0


def lines(storage: str) -> list[str]:
    """A heading and a line for each experiment; below one that is neither running nor done, why and how to resume it.

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
    resumable = {
        folder: status
        for folder, status in statuses.items()
        if isinstance(status, Status) and rows[folder][1] not in ("done", "running")
    }
    commands = {
        folder: _resume_command(content, folder, storage, on_slurm=bool(resumable[folder].job))
        for folder, content in _read_each(store, resumable, "experiment.json")
    }
    headings = ["experiment", "state", *STAGES, "seconds", "rows", "where"]
    widths = [max(map(len, column)) for column in zip(headings, *rows.values(), strict=True)]
    shown = [_line(headings, widths)]
    for folder, status in statuses.items():
        shown.append(_line(rows[folder], widths))
        if isinstance(status, StorageFailed):
            shown.append(f"    {printable(status, _MAX_REASON)}")
        elif folder in resumable:
            reasons = resumable[folder].reason.splitlines()[:_MAX_REASON_LINES]
            shown += [f"    {printable(reason, _MAX_REASON)}" for reason in reasons]
            shown.append(f"    resume: {commands[folder]}")
    return shown


def _read_each(store: Store, folders: Iterable[str], file: str) -> Iterable[tuple[str, bytes | StorageFailed | None]]:
    folders = list(folders)
    return zip(folders, store.read_all([f"{folder}/{file}" for folder in folders]), strict=True)


def _row(folder: str, status: Status | StorageFailed | None) -> list[str]:
    """The cells of an experiment's line."""
    if not isinstance(status, Status):
        return [folder, "unknown", *("" for _ in STAGES), "", "", ""]
    state, silence = status.state, age(status.heartbeat)
    where = status.host + (f" job {status.job}" if status.job else "")
    if state == "running":
        heartbeat = f"heartbeat {_number(max(silence, 0))} s ago"
        if silence <= -HEARTBEAT_TIMEOUT:
            heartbeat = "heartbeat ahead of this machine's clock"
        where = f"{printable(where, _MAX_CELL - len(heartbeat) - 2)}, {heartbeat}"
    stages = ["/".join(map(_number, status.stages.get(stage, (0, 0)))) for stage in STAGES]
    rows = _number(sum(status.rows.values())) if status.rows else ""
    shown_state = "lost" if state == "running" and silence > HEARTBEAT_TIMEOUT else state
    return [folder, shown_state, *stages, _number(status.seconds), rows, printable(where, _MAX_CELL)]


def _number(value: float) -> str:
    """A count or seconds, rounded; `?` for a value that no run can have written."""
    return f"{value:.0f}" if -1 < value <= _LARGEST_NUMBER else "?"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _resume_command(content: bytes | StorageFailed | None, folder: str, storage: str, *, on_slurm: bool) -> str:
    """The command that resumes the experiment of a folder, each word quoted for a shell.

    Args:
        content: of its `experiment.json`.
        folder: name that the experiment must have.
        storage: as the user typed it.
        on_slurm: whether a SLURM job ran it.
    """
    try:
        experiment = Experiment.from_json(content.decode() if isinstance(content, bytes) else "")
        preset, changed = invocation(experiment)
        assignments = [f"{name}={to_text(value)}" for name, value in changed.items()]
        assembled = assemble(preset, experiment.seed, assignments)
    except (InvalidInput, UnicodeDecodeError):
        return UNKNOWN_COMMAND
    data = assembled.data.model_copy(update={"sha256": experiment.data.sha256})
    words = ["python", "-m", "dwf_cluster.launch", "--slurm" if on_slurm else "--local", "--preset", preset]
    words += ["--seed", str(experiment.seed), "--storage", storage]
    command = shlex.join([*words, "--set", *assignments] if assignments else words)
    digests = [entry.sha256 for entry in experiment.given]
    given = tuple(e.model_copy(update={"sha256": d}) for e, d in zip(assembled.given, digests, strict=False))
    is_same = experiment.folder == folder and assembled.model_copy(update={"data": data, "given": given}) == experiment
    return command if is_same and command.isprintable() and not preset.startswith("-") else UNKNOWN_COMMAND


if __name__ == "__main__":
    sys.exit(main())
