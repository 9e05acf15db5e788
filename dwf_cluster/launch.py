"""The command `python -m dwf_cluster.launch`, or `dwf run`: run experiments on this machine, a Ray cluster or SLURM."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from dwf_cluster.cluster.environment import RESUME_COMMAND
from dwf_cluster.console.command import CommandFailed, exit_status
from dwf_cluster.console.options import help_fields, parse, seeds
from dwf_cluster.console.terminal import Stop
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import STAGES
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput, printable
from dwf_cluster.store import check_url

# Imports inside functions keep torch, ray, pyarrow and rich out of --help and of typing mistakes.
if TYPE_CHECKING:
    from rich.console import Console

    from dwf_cluster.cluster.events import Listeners
    from dwf_cluster.data.registry import Data
    from dwf_cluster.pipeline.sweep import Sweep
    from dwf_cluster.plan.resources import Limits, Resources

_COMMAND = ("python", "-m", "dwf_cluster.launch")

_RAY_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets this variable in the process that `ray job submit` starts."""


def main(arguments: Sequence[str] | None = None, resume_command: str | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        arguments: None: those of this process.
        resume_command: the command that resumes the run; None: that of the SLURM job that this is the driver of, or
            this one.
    """
    command_line = list(sys.argv[1:] if arguments is None else arguments)
    command = resume_command or os.environ.get(RESUME_COMMAND) or shlex.join([*_COMMAND, *command_line])
    return exit_status(lambda: _run(parse(command_line), command), command)


def job(name: str, *options: str) -> int:
    """Run the script `jobs/<name>.py`: a launch with these options and the script's arguments.

    It runs on the Ray cluster whose job it is, or else on this machine.
    """
    in_job = _RAY_JOB in os.environ
    submit = "ray job submit --working-dir . -- " if in_job else ""
    resume_command = f"{submit}python jobs/{name}.py {shlex.join(sys.argv[1:])}".rstrip()
    connection = ("--address", "auto") if in_job else ("--local",)
    return main([*connection, *options, *sys.argv[1:]], resume_command)


def _run(options: argparse.Namespace, resume_command: str) -> int:
    if options.help_fields is not None:
        print(help_fields(options.help_fields))
        return 0
    if options.fetch_data:
        return _fetch_data(options)
    if _RAY_JOB in os.environ and "://" not in options.storage and not os.path.isabs(options.storage):
        raise InvalidInput(
            f"--storage: {options.storage!r} cannot be used in a Ray job, whose folder is temporary: "
            "allowed is an absolute path or a URL"
        )
    check_url(options.storage)
    sweep = _sweep(options) if options.sweep else None
    if sweep:
        experiments = [trial.experiment for trial in sweep.trials]
    else:
        experiments = [build(options.preset, seed, options.set) for seed in options.seed or [None]]
    stages = options.stages or list(STAGES)
    from dwf_cluster.pipeline.run import check_trainable, seed_names

    for experiment in experiments:
        check_trainable(experiment)
    if options.slurm:
        return _submit(options, experiments, stages, resume_command)
    names = sweep.names if sweep else seed_names(experiments)
    if options.dry_run:
        return _print_plan(options, experiments, names, stages)
    return _run_pipeline(options, experiments, names, stages, resume_command, sweep)


def _sweep(options: argparse.Namespace) -> Sweep:
    allowed = {"slurm": "sbatch slurm/sweep.sh", "stages": "all stages", "seed": "--sweep seeds=0..4"}
    for name, instead in allowed.items():
        if getattr(options, name):
            raise InvalidInput(f"--{name}: cannot be used with --sweep; allowed is {instead}")
    varied = [assignment for assignment in options.sweep if not assignment.startswith("seeds=")]
    swept_seeds: list[int | None] = []
    for assignment in options.sweep:
        if assignment.startswith("seeds="):
            try:
                swept_seeds += seeds(assignment.removeprefix("seeds="))
            except argparse.ArgumentTypeError as error:
                raise InvalidInput(f"--sweep: seeds: {error}") from None
    from dwf_cluster.pipeline.sweep import sweep

    return sweep(options.preset, options.set, varied, swept_seeds or [None], options.samples, bool(options.asha))


# ---------------------------------------------------------------------------------------------- the data set


def _fetch_data(options: argparse.Namespace) -> int:
    data = build(options.preset, None, options.set).data
    from dwf_cluster.data import sources

    try:
        sources.fetch(data, options.data_folder)
    except sources.DataUnavailable as error:
        raise CommandFailed(str(error)) from None
    print(printable(f"{data.source}: verified; data folder: {options.data_folder}"))
    return 0


def _warn_of_missing_data(options: argparse.Namespace, data: Data) -> None:
    """Say which command downloads the data set, in case that the nodes of a SLURM job have no network."""
    from dwf_cluster.data import sources

    if sources.is_here(data, options.data_folder):
        return
    command = [*_COMMAND, "--fetch-data", "--preset", options.preset, "--data-folder", str(options.data_folder)]
    changed = [assignment for assignment in options.set if assignment.startswith("data.")]
    command += ["--set", *changed] if changed else []
    print(
        printable(
            f"warning: {data.source} is not in {options.data_folder}; if compute nodes have no network, run this on "
            f"the login node first: {shlex.join(command)}"
        ),
        file=sys.stderr,
    )


# ------------------------------------------------------------------------------------------------------ runs


def _print_plan(
    options: argparse.Namespace, experiments: Sequence[Experiment], names: Mapping[str, str], stages: Sequence[str]
) -> int:
    from rich.console import Console

    from dwf_cluster.console import tables
    from dwf_cluster.data.sources import sizes
    from dwf_cluster.pipeline.stages import pending_jobs

    size = sizes(experiments[0].data)
    pending = pending_jobs({e: e.store(options.storage) for e in experiments}, stages, size)
    table, lines = tables.plan(experiments, names, pending, size, _resources(options), options.storage)
    tables.show(Console(), table)
    print(*lines, *_folders(options, experiments), sep="\n")
    return 0


def _run_pipeline(
    options: argparse.Namespace,
    experiments: Sequence[Experiment],
    names: Mapping[str, str],
    stages: Sequence[str],
    resume_command: str,
    sweep: Sweep | None,
) -> int:
    from rich.console import Console

    from dwf_cluster.cluster.connect import RayNotStarted, attached, local
    from dwf_cluster.console import tables
    from dwf_cluster.data.sources import DataUnavailable
    from dwf_cluster.pipeline.run import Run
    from dwf_cluster.pipeline.stages import StageFailed
    from dwf_cluster.store.lock import ExperimentLocked

    if "SLURM_JOB_ID" in os.environ:
        _warn_of_missing_data(options, experiments[0].data)
    if options.address:
        connect = functools.partial(attached, options.address, _limits(options))
    else:
        connect = functools.partial(local, _resources(options))
    console, stop = Console(), Stop()
    listeners = _listeners(options, names, console)
    run = Run(options.storage, options.data_folder, stop.with_signals(connect), listeners, stop.is_set, resume_command)
    try:
        if sweep:
            tables.sweep_results(console, sweep, run.sweep(sweep))
        else:
            run.experiments(experiments, stages)
    except (StageFailed, DataUnavailable, ExperimentLocked, RayNotStarted) as error:
        raise CommandFailed(str(error)) from error
    for experiment in experiments if "evaluate" in stages and not sweep else ():
        tables.results(console, experiment, experiment.store(options.storage))
    print(*_folders(options, experiments), sep="\n")
    return 0


def _listeners(options: argparse.Namespace, names: Mapping[str, str], console: Console) -> Listeners:
    """The listeners to the events of a run."""
    from dwf_cluster.cluster.events import Listener, Listeners
    from dwf_cluster.console.progress import Progress
    from dwf_cluster.console.ray_metrics import RayMetrics

    listeners: dict[str, Listener] = {"progress": Progress(names, console), "Ray's metrics": RayMetrics()}
    if options.tensorboard:
        from dwf_cluster.console.tensorboard import EventFiles

        listeners["TensorBoard"] = EventFiles(options.tensorboard)
    return Listeners(listeners)


def _limits(options: argparse.Namespace) -> Limits:
    from dwf_cluster.plan.resources import Limits

    return Limits(options.joint_workers, options.expert_workers, options.gpus_per_expert or 1.0)


def _resources(options: argparse.Namespace) -> Resources:
    """The resources of this machine that a run may use."""
    from dwf_cluster.plan.resources import Resources, cpus_here, gpus_here, unused_gpus

    gpus = gpus_here() if options.gpus is None else options.gpus
    if options.gpus is None and (line := unused_gpus()):
        print(line, file=sys.stderr)
    return Resources(options.cpus or cpus_here(), gpus, limits=_limits(options))


def _folders(options: argparse.Namespace, experiments: Sequence[Experiment]) -> list[str]:
    return [experiment.store(options.storage).root for experiment in experiments]


# ----------------------------------------------------------------------------------------------------- SLURM


def _submit(
    options: argparse.Namespace, experiments: Sequence[Experiment], stages: Sequence[str], resume_command: str
) -> int:
    from dwf_cluster.cluster import submit
    from dwf_cluster.cluster.sbatch import SlurmOptions

    named = {"partition": options.partition, "account": options.account}
    request = SlurmOptions(
        nodes=options.nodes or 1,
        gpus_per_node=options.gpus_per_node,
        cpus_per_node=options.cpus_per_node,
        minutes=options.time or 24 * 60,
        options={name: value for name, value in named.items() if value} | dict(options.sbatch),
        throttle=options.throttle,
        executor=options.executor or "slurm",
    )
    _warn_of_missing_data(options, experiments[0].data)
    arguments = functools.partial(_job_arguments, options, stages)
    if options.dry_run:
        print(submit.script(experiments, request, arguments, resume_command))
        return 0
    return submit.run(experiments, options.storage, stages, request, arguments, resume_command)


def _job_arguments(options: argparse.Namespace, stages: Sequence[str], experiment: Experiment) -> tuple[str, ...]:
    """The arguments of the launch that the job of one experiment runs; it runs in the same folder."""
    arguments = [f"--preset={options.preset}", f"--seed={experiment.seed}", f"--storage={options.storage}"]
    arguments += [f"--stages={','.join(stages)}", f"--data-folder={options.data_folder}"]
    for name in ("joint_workers", "expert_workers", "gpus_per_expert", "tensorboard"):
        if value := getattr(options, name):
            arguments.append(f"--{name.replace('_', '-')}={value}")
    return (*arguments, *(("--set", *options.set) if options.set else ()))


if __name__ == "__main__":
    sys.exit(main())
