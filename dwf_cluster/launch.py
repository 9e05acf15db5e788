"""The command line: `python -m dwf_cluster.launch --local`. Nothing else knows about argv."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dwf_cluster.experiment import PRESETS, STAGES, InvalidInput, build, describe


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidInput(message)


def _parser() -> argparse.ArgumentParser:
    presets = "\n".join(f"  {name:<22} {meaning}" for name, (_, meaning) in PRESETS.items())
    fields = "\n".join(f"  {f.name} ({f.type}; {f.default})\n      {f.meaning}" for f in describe())
    parser = _Parser(
        prog="python -m dwf_cluster.launch",
        description="Train nine experts and their mixture, attack them all, and write Parquet tables. "
        "The same command again skips what is done and resumes what was interrupted.",
        epilog=f"presets:\n{presets}\n  path/to/file.npz       your own images: x_train, y_train, x_test, y_test\n\n"
        f"fields for --set (type; default before the preset):\n{fields}\n\n"
        "exit status: 0 all stages done; 1 a run that failed; 2 bad input; 130 interrupted, nothing lost",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--local", action="store_true", required=True, help="run on this machine")
    parser.add_argument("--preset", default="digits", help="a preset, or an .npz file (default: digits)")
    parser.add_argument("--seed", help="seed of every random draw (default: 0)")
    parser.add_argument("--storage", default="./runs", metavar="URL", help="where results go (default: ./runs)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="change fields of the preset"
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="comma-separated, of experts,joint,evaluate (default: all)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and start nothing")
    parser.add_argument(
        "--data-folder",
        type=Path,
        default=Path("data"),
        metavar="FOLDER",
        help="where data sets are looked for and downloaded to (default: ./data)",
    )
    parser.add_argument("--cpus", help="CPUs to use (default: all that this process may use)")
    parser.add_argument("--gpus", help="GPUs to use (default: all that this process may use)")
    parser.add_argument("--joint-workers", help="processes of the joint stage's DDP run (default: one a GPU, or one)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(_parser().parse_args(arguments), arguments)
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    stages = options.stages.split(",")
    for stage in stages:
        if stage not in STAGES:
            raise InvalidInput(f"--stages: {stage!r} cannot be used: allowed are {','.join(STAGES)}")
    seed = _integer("--seed", options.seed, 0, 2**31 - 1)
    cpus = _integer("--cpus", options.cpus, 1, 4096)
    gpus = _integer("--gpus", options.gpus, 0, 4096)
    joint_workers = _integer("--joint-workers", options.joint_workers, 1, 4096)
    experiment = build(options.preset, seed, options.set)

    # Not before the input is known to be good: a typing mistake must not wait for imports.
    from rich.console import Console

    from dwf_cluster.cluster.placement import Resources
    from dwf_cluster.data.sources import DataUnavailable, sizes
    from dwf_cluster.pipeline import StageFailed, run
    from dwf_cluster.plan import unfinished
    from dwf_cluster.progress import Progress
    from dwf_cluster.store import Store
    from dwf_cluster.store.tables import folder
    from dwf_cluster.summary import plan_table, result_table, show, transfer_table, warnings

    resources = Resources.here(cpus, gpus, joint_workers)
    store = Store(options.storage, experiment.folder)
    console = Console()
    if options.dry_run:
        size = sizes(experiment.data)
        show(
            console,
            plan_table(experiment, unfinished(experiment, store, stages, size), size, resources),
        )
    else:
        again = f"python -m dwf_cluster.launch {shlex.join(arguments)}"
        try:
            progress = Progress(experiment, store, console)
            run(experiment, store, resources, stages, options.data_folder, progress)
        except KeyboardInterrupt:
            print(f"interrupted; what is done is kept\nresume: {again}", file=sys.stderr)
            return 130
        except (StageFailed, DataUnavailable) as error:
            print(f"failed: {error}\nresume: {again}", file=sys.stderr)
            return 1
        if "evaluate" in stages:
            show(console, result_table(experiment, store))
            if "transfer" in experiment.evaluation.beyond:
                show(console, transfer_table(experiment, store))
            for line in warnings(experiment, store):
                print(line)
            evaluations, predictions = (store.path(folder(t)) for t in ("evaluations", "predictions"))
            for line in (f"evaluations: {evaluations}", f"predictions: {predictions}"):
                print(line)
            print(f"read them: import pandas; pandas.read_parquet({evaluations!r})")
    print(store.root)
    return 0


def _integer(name: str, text: str | None, low: int, high: int) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise InvalidInput(f"{name}: {text!r} cannot be used: allowed is an integer from {low} to {high}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
