"""The command line: `python -m dwf_cluster.launch --local`. Nothing else knows about argv."""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dwf_cluster.experiment import PRESETS, STAGES, Experiment, InvalidInput, build, describe

if TYPE_CHECKING:
    from dwf_cluster.cluster.ray import Cluster

_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the process that `ray job submit` starts."""


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
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--local", action="store_true", help="run on this machine")
    where.add_argument("--address", help="run on a Ray that is there: auto, HOST:PORT or ray://HOST:PORT")
    where.add_argument("--slurm", action="store_true", help="submit to SLURM, then follow the job")
    parser.add_argument("--preset", default="digits", help="a preset, or an .npz file (default: digits)")
    parser.add_argument("--seed", help="seed of every random draw, or several: 0,1,2 or 0..4 (default: 0)")
    parser.add_argument("--storage", default="./runs", metavar="URL", help="where results go (default: ./runs)")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="FIELD=VALUE", help="change fields of the preset"
    )
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="comma-separated, of experts,joint,evaluate (default: all)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan, or with --slurm the sbatch script; start nothing"
    )
    parser.add_argument(
        "--data-folder",
        type=Path,
        default=Path("data"),
        metavar="FOLDER",
        help="where data sets are looked for and downloaded to (default: ./data)",
    )
    parser.add_argument("--cpus", help="with --local, CPUs to use (default: all that this process may use)")
    parser.add_argument("--gpus", help="with --local, GPUs to use (default: all that this process may use)")
    parser.add_argument(
        "--joint-workers", help="processes of the joint stage's DDP run (default: one a GPU or, without, one a node)"
    )
    parser.add_argument(
        "--expert-workers",
        help="the most processes of one expert's DDP run, with GPUs (default: as many as have enough images of a "
        "batch; more than one only where GPUs would wait)",
    )
    parser.add_argument("--gpus-per-expert", help="share of a GPU for each expert, 0.01 to 1 (default: 1)")
    slurm = parser.add_argument_group("with --slurm")
    slurm.add_argument("--nodes", help="nodes of the allocation (default: 1)")
    slurm.add_argument("--gpus-per-node", help="GPUs of each node (default: none)")
    slurm.add_argument("--cpus-per-node", help="CPUs of each node (default: the site's)")
    slurm.add_argument(
        "--time", default="24:00:00", help="time limit of the job, which is requeued and goes on (default: 24:00:00)"
    )
    slurm.add_argument("--partition", help="partition (default: the site's)")
    slurm.add_argument("--account", help="account (default: the site's)")
    slurm.add_argument(
        "--sbatch", nargs="+", action="extend", default=[], metavar="OPTION=VALUE", help="other options of sbatch"
    )
    slurm.add_argument(
        "--executor", default="slurm", help="slurm, or local: the same in processes of this machine (default: slurm)"
    )
    slurm.add_argument("--throttle", help="with several seeds, how many of their jobs run at once (default: all)")
    return parser


def main(argv: Sequence[str] | None = None, again: str | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: the arguments; None: this process's.
        again: the command that resumes a run; None: this one.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(_parser().parse_args(arguments), again or f"python -m dwf_cluster.launch {shlex.join(arguments)}")
    except InvalidInput as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def stage(name: str) -> int:
    """Run one stage with this process's arguments: on the Ray whose job this is, else on this machine."""
    in_job = _RAY_JOB in os.environ
    arguments = ["--stages", name, *sys.argv[1:]]
    submit = "ray job submit --working-dir . -- " if in_job else ""
    again = f"{submit}python jobs/{name}.py {shlex.join(sys.argv[1:])}".rstrip()
    return main([*(("--address", "auto") if in_job else ("--local",)), *arguments], again)


def _run(options: argparse.Namespace, again: str) -> int:
    stages = options.stages.split(",")
    for stage in stages:
        if stage not in STAGES:
            raise InvalidInput(f"--stages: {stage!r} cannot be used: allowed are {','.join(STAGES)}")
    counts = {
        name: _integer(f"--{name.replace('_', '-')}", getattr(options, name), low, 4096)
        for name, low in (
            ("cpus", 1),
            ("gpus", 0),
            ("joint_workers", 1),
            ("expert_workers", 1),
            ("nodes", 1),
            ("gpus_per_node", 0),
            ("cpus_per_node", 1),
            ("throttle", 1),
        )
    }
    share = _share(options.gpus_per_expert)
    if _RAY_JOB in os.environ and "://" not in options.storage and not os.path.isabs(options.storage):
        raise InvalidInput(
            f"--storage: {options.storage!r} cannot be used in a Ray job, whose folder is temporary: "
            "allowed is an absolute path or a URL"
        )
    _refuse_misplaced(options)
    experiments = [build(options.preset, seed, options.set) for seed in _seeds(options.seed)]

    # Not before the input is known to be good: a typing mistake must not wait for imports.
    from rich.console import Console

    from dwf_cluster import summary
    from dwf_cluster.cluster.placement import Limits, Resources, cpus_here, gpus_here
    from dwf_cluster.cluster.ray import attached, local
    from dwf_cluster.data.sources import DataUnavailable, sizes
    from dwf_cluster.pipeline import Interrupted, StageFailed, run
    from dwf_cluster.plan import unfinished
    from dwf_cluster.progress import Progress
    from dwf_cluster.store import Store

    if options.slurm:
        return _submit(options, counts, experiments, stages, again)
    limits = Limits(counts["joint_workers"], counts["expert_workers"], share)
    stores = {experiment: Store(options.storage, experiment.folder) for experiment in experiments}
    console = Console()
    if options.address and not options.dry_run:
        connect = functools.partial(attached, options.address, limits)
    else:
        cpus, gpus = counts["cpus"], counts["gpus"]
        here = cpus_here() if cpus is None else cpus, gpus_here() if gpus is None else gpus
        resources = Resources(*here, limits=limits)
        connect = functools.partial(local, resources)
    if options.dry_run:
        size = sizes(experiments[0].data)
        todo = [job for e in experiments for jobs in unfinished(e, stores[e], stages, size).values() for job in jobs]
        table, lines = summary.plan(experiments, todo, size, resources, options.storage)
        summary.show(console, table)
        print(*lines, sep="\n")
    else:
        try:
            stop = _Stop()
            progress = Progress(experiments, options.storage, console)
            run(experiments, options.storage, stop.heeded(connect), stages, options.data_folder, progress, stop.is_set)
        except (KeyboardInterrupt, Interrupted):
            print(f"interrupted; what is done is kept\nresume: {again}", file=sys.stderr)
            return 130
        except (StageFailed, DataUnavailable) as error:
            print(f"failed: {error}\nresume: {again}", file=sys.stderr)
            return 1
        for experiment in experiments if "evaluate" in stages else ():
            summary.results(console, experiment, stores[experiment])
    for store in stores.values():
        print(store.root)
    return 0


def _submit(
    options: argparse.Namespace,
    counts: Mapping[str, int | None],
    experiments: Sequence[Experiment],
    stages: Sequence[str],
    again: str,
) -> int:
    """Submit a job for each experiment, follow them, and judge by the store what has come of it."""
    request_options = {"partition": options.partition, "account": options.account}
    for assignment in options.sbatch:
        name, separator, value = assignment.partition("=")
        if not (separator and re.fullmatch("[a-z][a-z-]*", name)):
            raise InvalidInput(f"--sbatch: {assignment!r} cannot be used: allowed is option=value, such as qos=high")
        request_options[name] = value
    for name, value in request_options.items():
        if value is not None and not re.fullmatch(r"[\w.,:@%+=/\[\]-]+", value):
            raise InvalidInput(f"--{name}: {value!r} cannot be used: allowed are letters, digits and .,:@%+=/[]_-")
    if options.executor not in ("slurm", "local"):
        raise InvalidInput(f"--executor: {options.executor!r} cannot be used: allowed are slurm, local")

    from dwf_cluster.cluster import slurm
    from dwf_cluster.data.sources import sizes
    from dwf_cluster.plan import unfinished
    from dwf_cluster.store import Store

    request = slurm.Request(
        counts["nodes"] or 1,
        counts["gpus_per_node"],
        counts["cpus_per_node"],
        _minutes(options.time),
        {name: value for name, value in request_options.items() if value is not None},
        counts["throttle"],
        options.executor,
    )
    stores = {experiment.folder: Store(options.storage, experiment.folder) for experiment in experiments}
    size = sizes(experiments[0].data)

    def to_do(experiment: Experiment) -> bool:
        return any(unfinished(experiment, stores[experiment.folder], stages, size).values())

    runs = [
        slurm.Run(experiment.folder, _arguments(options, experiment.seed), again)
        for experiment in experiments
        if options.dry_run or to_do(experiment)
    ]
    say = functools.partial(print, flush=True)
    if options.dry_run:
        print(slurm.script(runs, request))
        return 0
    jobs = slurm.submit(runs, request, say)
    if jobs:
        say(f"this only looks on; Ctrl-C ends it, not the job. Come back: {again}")
    try:
        slurm.follow(jobs, request, say)
    except KeyboardInterrupt:
        print(f"the job goes on. Come back: {again}", file=sys.stderr)
        return 130
    status = 0
    for experiment in experiments:
        if to_do(experiment):
            job = next(job for run, job in jobs.items() if run.folder == experiment.folder)
            word = slurm.last_word(job)
            print(
                f"failed: job {job.job_id} ended before all was done{f' ({word})' if word else ''}; "
                f"log: {job.paths.stdout}\nresume: {again}",
                file=sys.stderr,
            )
            status = 1
    for store in stores.values() if status == 0 else ():
        print(store.root)
    return status


def _arguments(options: argparse.Namespace, seed: int) -> tuple[str, ...]:
    """What a job of one experiment gets; it runs in this folder."""
    arguments = [f"--preset={options.preset}", f"--seed={seed}", f"--storage={options.storage}"]
    arguments += [f"--stages={options.stages}", f"--data-folder={options.data_folder}"]
    for name in ("joint_workers", "expert_workers", "gpus_per_expert"):
        if value := getattr(options, name):
            arguments.append(f"--{name.replace('_', '-')}={value}")
    return (*arguments, *(("--set", *options.set) if options.set else ()))


def _minutes(text: str) -> int:
    """`90`, `HH:MM:SS`, `D-HH` or `D-HH:MM:SS`, as sbatch has it, in whole minutes, rounded up."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d{1,6})(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if found:
        days, first, second, third = (int(part or 0) for part in found.groups())
        hours = days * 24 + first if found[1] or found[4] else 0
        minutes = hours * 60 + second + (third > 0) if hours or found[1] or found[4] else first + (second > 0)
        if minutes > 0:
            return minutes
    raise InvalidInput(f"--time: {text!r} cannot be used: allowed are minutes, HH:MM:SS, D-HH or D-HH:MM:SS")


class _Stop(threading.Event):
    """Set by the first Ctrl-C or SIGTERM of a run; the second ends it at once."""

    def heeded(self, connect: Callable[[], AbstractContextManager[Cluster]]) -> Callable[[], Any]:
        """The same connection, and signals heeded from its beginning to its end."""

        @contextmanager
        def connection() -> Iterator[Cluster]:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
            with connect() as cluster:
                for signum in (signal.SIGINT, signal.SIGTERM):  # Ray has set SIGTERM's while it started
                    signal.signal(signum, self._ask)
                yield cluster

        return connection

    def _ask(self, signum: int, frame: object) -> None:
        if self.is_set():
            raise KeyboardInterrupt
        self.set()
        print("stopping: trainings save what they have; again to stop at once", file=sys.stderr, flush=True)


def _seeds(text: str | None) -> list[int | None]:
    """`3`, `0,2,5` or `0..4`; None: the preset's."""
    if text is None:
        return [None]
    first, dots, last = text.partition("..")
    parts = [first, last] if dots else text.split(",")
    allowed = "an integer from 0 to 2147483647, several with commas between, or first..last"
    if not all(part.isascii() and part.isdigit() and int(part) < 2**31 for part in parts):
        raise InvalidInput(f"--seed: {text!r} cannot be used: allowed is {allowed}")
    seeds = [int(part) for part in parts]
    if dots:
        seeds = list(range(seeds[0], seeds[1] + 1))
    if not 1 <= len(seeds) <= 1000 or len(set(seeds)) < len(seeds):
        raise InvalidInput(f"--seed: {text!r} cannot be used: allowed are 1 to 1000 different seeds")
    return list(seeds)


def _share(text: str | None) -> float:
    try:
        share = 1.0 if text is None else float(text)
    except ValueError:
        share = 0.0
    if not 0.01 <= share <= 1:
        raise InvalidInput(f"--gpus-per-expert: {text!r} cannot be used: allowed is a number from 0.01 to 1")
    return share


def _refuse_misplaced(options: argparse.Namespace) -> None:
    """An option that the chosen way to run would not look at is a mistake."""
    only = {
        "local": ("cpus", "gpus"),
        "slurm": ("nodes", "gpus_per_node", "cpus_per_node", "partition", "account", "sbatch", "throttle"),
    }
    for way, names in only.items():
        for name in names:
            if getattr(options, name) and not getattr(options, way):
                raise InvalidInput(f"--{name.replace('_', '-')}: cannot be used without --{way}")


def _integer(name: str, text: str | None, low: int, high: int) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise InvalidInput(f"{name}: {text!r} cannot be used: allowed is an integer from {low} to {high}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
