"""The command line: `python -m dwf_cluster.launch --local`. Nothing else knows about argv."""

from __future__ import annotations

import argparse
import functools
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dwf_cluster.console.terminal import Stop, lasting_output
from dwf_cluster.experiment import PRESETS, Experiment, build, fields_of_an_experiment
from dwf_cluster.plan.jobs import STAGES
from dwf_cluster.settings import InvalidInput, printable_lines
from dwf_cluster.store import StorageFailed, check_url

if TYPE_CHECKING:
    from dwf_cluster.pipeline.sweep import Sweep
    from dwf_cluster.plan.resources import Limits, Resources

_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it in the process that `ray job submit` starts."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidInput(message.removeprefix("argument "))


def _refuse(text: str, allowed: str) -> NoReturn:
    raise argparse.ArgumentTypeError(f"{text!r} cannot be used: allowed {allowed}")


def _count(low: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= 4096):
            _refuse(text, f"is an integer from {low} to 4096")
        return int(text)

    return read


def _seeds(text: str) -> list[int]:
    """`3`, `0,2,5` or `0..4`."""
    first, dots, last = text.partition("..")
    parts = [first, last] if dots else text.split(",")
    if not all(part.isascii() and part.isdigit() and int(part) < 2**31 for part in parts):
        _refuse(text, "is an integer from 0 to 2147483647, or several with commas between, or first..last")
    seeds = range(int(first), int(last) + 1) if dots else [int(part) for part in parts]
    if not 1 <= len(seeds) <= 1000 or len(set(seeds)) < len(seeds):
        _refuse(text, "are 1 to 1000 different seeds")
    return list(seeds)


def _stages(text: str) -> list[str]:
    stages = text.split(",")
    for stage in stages:
        if stage not in STAGES:
            _refuse(stage, f"are {','.join(STAGES)}")
    return stages


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.01 <= share <= 1:
        _refuse(text, "is a number from 0.01 to 1")
    return share


def _minutes(text: str) -> int:
    """`90`, `MM:SS`, `HH:MM:SS`, `D-HH` or `D-HH:MM:SS`, as sbatch has it, in whole minutes, rounded up."""
    found = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,6})(?::(\d\d))?(?::(\d\d))?", text, re.ASCII)
    if found is None:
        _refuse(text, "are minutes, HH:MM:SS, D-HH or D-HH:MM:SS")
    days, first, second, third = (int(part or 0) for part in found.groups())
    unit = 60 if found[1] or found[4] else 1  # of the second number, in seconds
    seconds = days * 86_400 + first * 60 * unit + second * unit + third
    if seconds == 0:
        _refuse(text, "is more than 0")
    return -(-seconds // 60)


def _word(text: str) -> str:
    """What may stand in a batch script."""
    if not re.fullmatch(r"[\w.,:@%+=/\[\]-]+", text, re.ASCII):
        _refuse(text, "are letters, digits and .,:@%+=/[]_-")
    return text


def _sbatch_option(text: str) -> tuple[str, str]:
    name, separator, value = text.partition("=")
    if not (separator and re.fullmatch("[a-z][a-z-]*", name)):
        _refuse(text, "is option=value, such as qos=high")
    return name, _word(value)


def _parser() -> argparse.ArgumentParser:
    presets = "\n".join(f"  {name:<22} {meaning}" for name, (_, meaning) in PRESETS.items())
    fields = "\n".join(f"  {f.name} ({f.type}; {f.default})\n      {f.meaning}" for f in fields_of_an_experiment())
    parser = _Parser(
        prog="python -m dwf_cluster.launch",
        description="Train nine experts and their mixture, attack them all, and write Parquet tables. "
        "The same command again skips what is done and resumes what was interrupted.",
        epilog=f"presets:\n{presets}\n  path/to/file.npz       your own images: x_train, y_train, x_test, y_test\n"
        "  path/to/experiment.json  an experiment as a run has written it\n\n"
        f"fields for --set (type; default before the preset):\n{fields}\n\n"
        "exit status: 0 all stages done; 1 a run that failed; 2 bad input; 130 interrupted (Ctrl-C, SIGTERM, a closed "
        "terminal), nothing lost",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--local", action="store_true", help="run on this machine")
    where.add_argument("--address", help="run on a Ray that is there: auto, HOST:PORT or ray://HOST:PORT")
    where.add_argument("--slurm", action="store_true", help="submit to SLURM, then follow the job")
    parser.add_argument("--preset", default="digits", help="a preset, an .npz or a .json file (default: digits)")
    parser.add_argument("--seed", type=_seeds, help="seed of every random draw, or several: 0,1,2 or 0..4 (default: 0)")
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
    parser.add_argument(
        "--stages",
        type=_stages,
        help="comma-separated, of experts,joint,evaluate (default: all)",
    )
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
        "--tensorboard", type=Path, metavar="FOLDER", help="write TensorBoard event files there, as training goes on"
    )
    parser.add_argument(
        "--joint-workers",
        type=_count(1),
        metavar="N",
        help="processes of the joint stage's DDP run (default: one a GPU or, without, one a node, as long as each has "
        "32 images of a batch)",
    )
    parser.add_argument(
        "--expert-workers",
        type=_count(1),
        metavar="N",
        help="processes of each expert's DDP run, with GPUs (default: 1)",
    )
    parser.add_argument(
        "--gpus-per-expert", type=_share, metavar="SHARE", help="of a GPU for each expert, 0.01 to 1 (default: 1)"
    )
    local = parser.add_argument_group("with --local (default: all that this process may use)")
    local.add_argument("--cpus", type=_count(1), metavar="N", help="CPUs to use")
    local.add_argument("--gpus", type=_count(0), metavar="N", help="GPUs to use")
    sweep = parser.add_argument_group("with --sweep")
    sweep.add_argument(
        "--samples", type=_count(1), metavar="N", help="draw N of the combinations, always the same (default: all)"
    )
    sweep.add_argument(
        "--asha", action="store_true", default=None, help="stop trials early whose robust accuracy falls behind (ASHA)"
    )
    slurm = parser.add_argument_group("with --slurm (default: what the site gives)")
    slurm.add_argument("--nodes", type=_count(1), metavar="N", help="nodes of each job (default: 1)")
    slurm.add_argument("--gpus-per-node", type=_count(0), metavar="N", help="GPUs of each node")
    slurm.add_argument("--cpus-per-node", type=_count(1), metavar="N", help="CPUs of each node")
    slurm.add_argument("--time", type=_minutes, help="time limit; then it is requeued and goes on (default: 24:00:00)")
    slurm.add_argument("--partition", type=_word, help="partition")
    slurm.add_argument("--account", type=_word, help="account")
    slurm.add_argument(
        "--sbatch",
        type=_sbatch_option,
        nargs="+",
        action="extend",
        default=[],
        metavar="OPTION=VALUE",
        help="any other options of sbatch, by their long names",
    )
    slurm.add_argument(
        "--throttle", type=_count(1), metavar="N", help="of several seeds' jobs, how many run at once (default: all)"
    )
    slurm.add_argument("--executor", choices=("slurm", "local"), help="local: the same in processes of this machine")
    parser.set_defaults(only={"local": _names(local), "sweep": _names(sweep), "slurm": _names(slurm)})
    return parser


def _names(group: argparse._ArgumentGroup) -> list[str]:
    return [action.dest for action in group._group_actions]


def main(argv: Sequence[str] | None = None, again: str | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        argv: the arguments; None: this process's.
        again: the command that resumes a run; None: this one.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    again = again or f"python -m dwf_cluster.launch {shlex.join(arguments)}"
    with lasting_output():
        try:
            for argument in arguments:
                if re.search("[\ud800-\udfff]", argument):  # how Python holds bytes that are no UTF-8
                    raise InvalidInput(f"{argument!r} cannot be used: allowed is text in UTF-8")
            return _run(_parser().parse_args(arguments), again)
        except InvalidInput as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except StorageFailed as error:
            print(f"failed: {printable_lines(error)}\nresume: {again}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print(f"interrupted; what is done is kept\nresume: {again}", file=sys.stderr)
            return 130


def job(name: str, *options: str) -> int:
    """Run the script of `jobs/` of that name, with these options and its arguments.

    On the Ray whose job this is, else on this machine.
    """
    in_job = _RAY_JOB in os.environ
    submit = "ray job submit --working-dir . -- " if in_job else ""
    again = f"{submit}python jobs/{name}.py {shlex.join(sys.argv[1:])}".rstrip()
    return main([*(("--address", "auto") if in_job else ("--local",)), *options, *sys.argv[1:]], again)


def _run(options: argparse.Namespace, again: str) -> int:
    for way, names in options.only.items():
        for name in names:
            if not getattr(options, way) and getattr(options, name) not in (None, []):
                raise InvalidInput(f"--{name.replace('_', '-')}: cannot be used without --{way}")
    if _RAY_JOB in os.environ and "://" not in options.storage and not os.path.isabs(options.storage):
        raise InvalidInput(
            f"--storage: {options.storage!r} cannot be used in a Ray job, whose folder is temporary: "
            "allowed is an absolute path or a URL"
        )
    check_url(options.storage)
    if options.sweep:
        return _sweep(options, again)
    options.stages = options.stages or list(STAGES)
    experiments = [build(options.preset, seed, options.set) for seed in options.seed or [None]]
    names = {e.folder: f"seed {e.seed}" for e in experiments} if len(experiments) > 1 else {}
    # Not before the input is known to be good: a typing mistake must not wait for imports.
    if options.slurm:
        return _submit(options, experiments, again)
    return _plan(options, experiments, names) if options.dry_run else _go(options, experiments, names, again)


def _sweep(options: argparse.Namespace, again: str) -> int:
    from dwf_cluster.pipeline.sweep import sweep

    for name in ("slurm", "stages", "seed"):
        if getattr(options, name):
            allowed = {"slurm": "sbatch slurm/sweep.sh", "seed": "--sweep seeds=0..4"}.get(name, "all stages")
            raise InvalidInput(f"--{name}: cannot be used with --sweep; allowed is {allowed}")
    varied = [assignment for assignment in options.sweep if not assignment.startswith("seeds=")]
    seeds: list[int | None] = []
    for assignment in options.sweep:
        if assignment.startswith("seeds="):
            try:
                seeds += _seeds(assignment.removeprefix("seeds="))
            except argparse.ArgumentTypeError as error:
                raise InvalidInput(f"--sweep: seeds: {error}") from None
    found = sweep(options.preset, options.set, varied, seeds or [None], options.samples, bool(options.asha))
    experiments = [trial.experiment for trial in found.trials]
    names = {trial.experiment.folder: trial.name for trial in found.trials}
    if options.dry_run:
        options.stages = list(STAGES)
        return _plan(options, experiments, names)
    return _go(options, experiments, names, again, found)


def _plan(options: argparse.Namespace, experiments: Sequence[Experiment], names: Mapping[str, str]) -> int:
    from rich.console import Console

    from dwf_cluster.console import tables
    from dwf_cluster.data.sources import sizes
    from dwf_cluster.pipeline.stages import pending_jobs

    size = sizes(experiments[0].data)
    todo = pending_jobs({e: e.store(options.storage) for e in experiments}, options.stages, size)
    table, lines = tables.plan(experiments, names, todo, size, _here(options), options.storage)
    tables.show(Console(), table)
    print(*lines, *_roots(options, experiments), sep="\n")
    return 0


def _go(
    options: argparse.Namespace,
    experiments: Sequence[Experiment],
    names: Mapping[str, str],
    again: str,
    sweep: Sweep | None = None,
) -> int:
    from rich.console import Console

    from dwf_cluster.cluster.driver import RayNotStarted, attached, local
    from dwf_cluster.cluster.events import Listener, Listeners
    from dwf_cluster.console import tables
    from dwf_cluster.console.progress import Progress
    from dwf_cluster.console.ray_metrics import RayMetrics
    from dwf_cluster.data.sources import DataUnavailable
    from dwf_cluster.pipeline.run import Run
    from dwf_cluster.pipeline.stages import StageFailed
    from dwf_cluster.store.lock import ExperimentLocked

    if options.address:
        connect = functools.partial(attached, options.address, _limits(options))
    else:
        connect = functools.partial(local, _here(options))
    console, stop = Console(), Stop()
    listeners: dict[str, Listener] = {"progress": Progress(names, console), "Ray's metrics": RayMetrics()}
    if options.tensorboard:
        from dwf_cluster.console.tensorboard import EventFiles

        listeners["TensorBoard"] = EventFiles(options.tensorboard)
    connection, tell = stop.with_signals(connect), Listeners(listeners)
    run = Run(options.storage, options.data_folder, connection, tell, stop.is_set, again)
    outcome = None
    try:
        if sweep:
            outcome = run.sweep(sweep)
        else:
            run.experiments(experiments, options.stages)
    except (StageFailed, DataUnavailable, ExperimentLocked, RayNotStarted) as error:
        print(f"failed: {printable_lines(error)}\nresume: {again}", file=sys.stderr)
        return 1
    if sweep and outcome:
        tables.sweep_results(console, sweep, outcome)
    else:
        for experiment in experiments if "evaluate" in options.stages else ():
            tables.results(console, experiment, experiment.store(options.storage))
    print(*_roots(options, experiments), sep="\n")
    return 0


def _submit(options: argparse.Namespace, experiments: Sequence[Experiment], again: str) -> int:
    from dwf_cluster.cluster import submit
    from dwf_cluster.cluster.sbatch import SlurmOptions

    asked = {"partition": options.partition, "account": options.account}
    request = SlurmOptions(
        nodes=options.nodes or 1,
        gpus_per_node=options.gpus_per_node,
        cpus_per_node=options.cpus_per_node,
        minutes=options.time or 24 * 60,
        options={name: value for name, value in asked.items() if value} | dict(options.sbatch),
        throttle=options.throttle,
        executor=options.executor or "slurm",
    )
    arguments = functools.partial(_job_arguments, options)
    if options.dry_run:
        print(submit.script(experiments, request, arguments, again))
        return 0
    return submit.run(experiments, options.storage, options.stages, request, arguments, again)


def _job_arguments(options: argparse.Namespace, experiment: Experiment) -> tuple[str, ...]:
    """What the job of one experiment is called with; it runs in the same folder."""
    arguments = [f"--preset={options.preset}", f"--seed={experiment.seed}", f"--storage={options.storage}"]
    arguments += [f"--stages={','.join(options.stages)}", f"--data-folder={options.data_folder}"]
    for name in ("joint_workers", "expert_workers", "gpus_per_expert", "tensorboard"):
        if value := getattr(options, name):
            arguments.append(f"--{name.replace('_', '-')}={value}")
    return (*arguments, *(("--set", *options.set) if options.set else ()))


def _limits(options: argparse.Namespace) -> Limits:
    from dwf_cluster.plan.resources import Limits

    return Limits(options.joint_workers, options.expert_workers, options.gpus_per_expert or 1.0)


def _here(options: argparse.Namespace) -> Resources:
    from dwf_cluster.plan.resources import Resources, cpus_here, gpus_here, unused_gpus

    gpus = gpus_here() if options.gpus is None else options.gpus
    if options.gpus is None and (line := unused_gpus()):
        print(line, file=sys.stderr)
    return Resources(options.cpus or cpus_here(), gpus, limits=_limits(options))


def _roots(options: argparse.Namespace, experiments: Sequence[Experiment]) -> list[str]:

    return [experiment.store(options.storage).root for experiment in experiments]


if __name__ == "__main__":
    sys.exit(main())
