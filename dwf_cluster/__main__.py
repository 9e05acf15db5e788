"""The command `dwf`, or `python -m dwf_cluster`: the commands of this project under one name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name

from dwf_cluster.console.command import exit_status
from dwf_cluster.settings import InvalidInput

COMMANDS: Mapping[str, tuple[str, str]] = {
    "run": ("dwf_cluster.launch:main", "train models and attack them: on this machine, a Ray cluster or SLURM"),
    "status": ("dwf_cluster.status:main", "show the state of each experiment of a storage"),
    "evaluate": ("dwf_cluster.console.own_model:evaluate_command", "attack your own PyTorch model"),
    "report": ("analysis.report:main", "write a self-contained report of finished experiments"),
}
"""For each command its function, as `module:function` of (arguments) -> exit status, and what it does."""

_USAGE = "\n".join(
    (
        "usage: dwf COMMAND [options]",
        "",
        "commands:",
        *(f"  {name:<10}{meaning}" for name, (_, meaning) in COMMANDS.items()),
        "",
        "dwf COMMAND --help shows the options of a command.",
        "To begin: dwf run --local",
    )
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit status.

    Args:
        arguments: None: those of this process.
    """
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    if not command_line or command_line[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    return exit_status(lambda: _command(command_line[0])(command_line[1:]))


def _command(name: str) -> Callable[[Sequence[str]], int]:
    """The function of a command.

    Raises:
        InvalidInput: if there is no such command, or a package that it needs is not installed.
    """
    if name not in COMMANDS:
        raise InvalidInput(f"{name[:80]!r} is not a command: allowed are {', '.join(COMMANDS)}")
    try:
        command: Callable[[Sequence[str]], int] = resolve_name(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "analysis", "dwf_cluster"):
            raise
        raise InvalidInput(
            f"dwf {name}: the package {package} is not installed; install it with pip install 'dwf-cluster[analysis]'"
        ) from None
    return command


if __name__ == "__main__":
    sys.exit(main())
