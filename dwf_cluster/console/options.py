"""The options of `python -m dwf_cluster.launch`, their types, and what `--help` and `--help-fields` print."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from dwf_cluster.console.command import Parser, require_utf8
from dwf_cluster.plan.jobs import STAGES
from dwf_cluster.presets import PRESETS, fields_of_an_experiment
from dwf_cluster.settings import InvalidInput

# ------------------------------------------------------------------------------------------- types of values


def _refuse(text: str, allowed: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"{text!r} cannot be used: allowed {allowed}")


def count(low: int) -> Callable[[str], int]:
    """The type of an integer from `low` to 4096."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= 4096):
            _refuse(text, f"is an integer from {low} to 4096")
        return int(text)

    return parse


def seeds(text: str) -> list[int]:
    """`3`, `0,2,5` or `0..4`."""
    first, dots, last = text.partition("..")
    parts = [first, last] if dots else text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) < 2**31 for part in parts):
        _refuse(text, "is an integer from 0 to 2147483647, or several with commas between, or first..last")
    numbers = range(int(first), int(last) + 1) if dots else [int(part) for part in parts]
    if not 1 <= len(numbers) <= 1000 or len(set(numbers)) < len(numbers):
        _refuse(text, "are 1 to 1000 different seeds")
    return list(numbers)


def stages(text: str) -> list[str]:
    """Names of stages with commas between."""
    names = text.split(",")
    for name in names:
        if name not in STAGES:
            _refuse(name, f"are {','.join(STAGES)}")
    return names


def share(text: str) -> float:
    """A share of a GPU."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.01 <= number <= 1:
        _refuse(text, "is a number from 0.01 to 1")
    return number


def minutes(text: str) -> int:
    """`90`, `MM:SS`, `HH:MM:SS`, `D-HH` or `D-HH:MM:SS`, as sbatch reads it, in whole minutes, rounded up."""
    match = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d\d))?(?::(\d\d))?", text, re.ASCII)
    if match is None:
        _refuse(text, "are minutes, HH:MM:SS, D-HH or D-HH:MM:SS")
    days, first, second, third = (int(part or 0) for part in match.groups())
    unit = 60 if match[1] or match[4] else 1  # of the second number, in seconds
    seconds = days * 86_400 + first * 60 * unit + second * unit + third
    if seconds == 0:
        _refuse(text, "is more than 0")
    return -(-seconds // 60)


def safe_text(text: str) -> str:
    """A value that is safe in a batch script."""
    if not re.fullmatch(r"[\w.,:@%+=/\[\]-]+", text, re.ASCII):
        _refuse(text, "are letters, digits and .,:@%+=/[]_-")
    return text


def sbatch_option(text: str) -> tuple[str, str]:
    """`option=value`, with the long name of an option of sbatch."""
    name, separator, value = text.partition("=")
    if not (separator and re.fullmatch("[a-z][a-z-]*", name)):
        _refuse(text, "is option=value, such as qos=high")
    return name, safe_text(value)


# -------------------------------------------------------------------------------------------------- options


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line.

    Raises:
        InvalidInput: for the first argument that cannot be used.
        SystemExit: after `--help`.
    """
    require_utf8(arguments)
    options = _parser().parse_args(arguments)
    for option, names in options.only_with.items():
        for name in names:
            if not getattr(options, option) and getattr(options, name) not in (None, []):
                raise InvalidInput(f"--{name.replace('_', '-')}: cannot be used without --{option}")
    if options.save_adversarial:  # a field of the experiment, so that jobs and trials have it
        options.set.append(f"save_adversarial={options.save_adversarial}")
    if not (options.local or options.address or options.slurm or options.fetch_data or options.help_fields is not None):
        raise InvalidInput("one of the arguments --local --address --slurm is required")
    return options


def _parser() -> Parser:
    presets = "\n".join(f"  {name:<16} {meaning}" for name, (_, meaning) in PRESETS.items())
    parser = Parser(
        prog="python -m dwf_cluster.launch",
        usage="%(prog)s (--local | --address ADDRESS | --slurm) [options]",
        description="Train the models of an experiment, attack them all, and write Parquet tables.\n"
        "The same command again skips what is done and resumes what was interrupted.",
        epilog=f"presets:\n{presets}\n"
        "  FILE.npz         your own images: x_train, y_train, x_test, y_test\n"
        "  experiment.json  an experiment as a run has written it\n\n"
        "exit status: 0 all stages done; 1 a run that failed; 2 bad input; 130 interrupted\n"
        "(Ctrl-C, SIGTERM, a closed terminal), nothing lost",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--help-fields",
        nargs="?",
        const="",
        metavar="PART",
        help="print the fields for --set, all or those of one part",
    )
    location = parser.add_mutually_exclusive_group()
    location.add_argument("--local", action="store_true", help="run on this machine")
    location.add_argument("--address", help="run on an existing Ray cluster: auto, HOST:PORT or ray://HOST:PORT")
    location.add_argument("--slurm", action="store_true", help="submit to SLURM, then follow the job")
    _add_experiment(parser)
    _add_run(parser)
    only_with = {"local": _add_local(parser), "sweep": _add_sweep(parser), "slurm": _add_slurm(parser)}
    parser.set_defaults(only_with={name: [action.dest for action in added] for name, added in only_with.items()})
    return parser


def _add_experiment(parser: argparse.ArgumentParser) -> None:
    """Add what decides the numbers, and where they are stored."""
    parser.add_argument("--preset", default="digits", help="a preset, an .npz or a .json file (default: digits)")
    parser.add_argument("--seed", type=seeds, help="seed of every random draw, or several: 0,1,2 or 0..4 (default: 0)")
    parser.add_argument("--storage", default="./runs", metavar="URL", help="where results go (default: ./runs)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="change fields of the preset"
    )
    parser.add_argument(
        "--sweep",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD=VALUE",
        help="run an experiment for each combination of values, as trials of Ray Tune; a field that is given several "
        "times takes each of its values; seeds=0..4 takes several seeds",
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    """Add what to run, and with what; no part of the experiment."""
    parser.add_argument("--stages", type=stages, help=f"comma-separated, of {','.join(STAGES)} (default: all)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, or with --slurm the batch script; start nothing"
    )
    parser.add_argument(
        "--data-folder",
        type=Path,
        default=Path("data"),
        metavar="FOLDER",
        help="where data sets are looked for and downloaded to (default: ./data)",
    )
    parser.add_argument(
        "--fetch-data", action="store_true", help="download and verify the data set of the experiment; run nothing"
    )
    parser.add_argument(
        "--tensorboard", type=Path, metavar="FOLDER", help="write TensorBoard event files there during training"
    )
    parser.add_argument(
        "--save-adversarial",
        choices=("float", "uint8"),
        help="keep the adversarial images of every evaluation, as they are or rounded to uint8 within the ball; "
        "evaluations without them run again",
    )
    parser.add_argument(
        "--joint-workers",
        type=count(1),
        metavar="N",
        help="processes of the joint stage's DDP run (default: one a GPU or, without, one a node, as long as each has "
        "32 images of a batch)",
    )
    parser.add_argument(
        "--expert-workers",
        type=count(1),
        metavar="N",
        help="processes of each expert's DDP run, with GPUs (default: 1)",
    )
    parser.add_argument(
        "--gpus-per-expert", type=share, metavar="SHARE", help="share of a GPU for each expert, 0.01 to 1 (default: 1)"
    )


def _add_local(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    group = parser.add_argument_group("with --local (default: all that this process may use)")
    return [
        group.add_argument("--cpus", type=count(1), metavar="N", help="CPUs to use"),
        group.add_argument("--gpus", type=count(0), metavar="N", help="GPUs to use"),
    ]


def _add_sweep(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    group = parser.add_argument_group("with --sweep")
    return [
        group.add_argument(
            "--samples", type=count(1), metavar="N", help="draw N of the combinations, always the same (default: all)"
        ),
        group.add_argument(
            "--asha",
            action="store_true",
            default=None,
            help="stop trials early whose robust accuracy falls behind (ASHA)",
        ),
    ]


def _add_slurm(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    group = parser.add_argument_group("with --slurm (default: what the site gives)")
    return [
        group.add_argument("--nodes", type=count(1), metavar="N", help="nodes of each job (default: 1)"),
        group.add_argument("--gpus-per-node", type=count(0), metavar="N", help="GPUs of each node"),
        group.add_argument("--cpus-per-node", type=count(1), metavar="N", help="CPUs of each node"),
        group.add_argument(
            "--time", type=minutes, help="time limit; a job that reaches it is requeued (default: 24:00:00)"
        ),
        group.add_argument("--partition", type=safe_text, metavar="NAME", help="partition"),
        group.add_argument("--account", type=safe_text, metavar="NAME", help="account"),
        group.add_argument(
            "--sbatch",
            type=sbatch_option,
            nargs="+",
            action="extend",
            default=[],
            metavar="OPTION=VALUE",
            help="any other options of sbatch, by their long names",
        ),
        group.add_argument(
            "--throttle",
            type=count(1),
            metavar="N",
            help="of several seeds' jobs, how many run at once (default: all)",
        ),
        group.add_argument(
            "--executor", choices=("slurm", "local"), help="local: run the jobs as processes of this machine"
        ),
    ]


# ------------------------------------------------------------------------------------------- --help-fields


def help_fields(part: str) -> str:
    """Describe the fields that `--set` takes: name, type, default, meaning.

    Args:
        part: `experts` for `experts.epochs` and all others of that part, or the name of one field; empty: all fields.

    Raises:
        InvalidInput: if there is no such part.
    """
    fields = fields_of_an_experiment()
    chosen = [field for field in fields if not part or f"{field.name}.".startswith(f"{part}.")]
    if not chosen:
        parts = dict.fromkeys(field.name.partition(".")[0] for field in fields)
        raise InvalidInput(f"--help-fields: {part[:80]!r} cannot be used: allowed are {', '.join(parts)}")
    lines = [
        line
        for field in chosen
        for line in (
            f"  {field.name} ({field.type}; {field.default})\n      {field.meaning}",
            *(f"      {entry.name} ({entry.type}; {entry.default}): {entry.meaning}" for entry in field.entries),
        )
    ]
    return "\n".join(["fields for --set FIELD=VALUE (type; default before the preset):", *lines])
