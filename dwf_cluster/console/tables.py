"""The tables that begin and end a run: the plan, and models down, attacks across, the mixture last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dwf_cluster.data.registry import Sizes
from dwf_cluster.evaluation.registry import Column, transfer_column
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline.sweep import Sweep
from dwf_cluster.pipeline.trial_table import TrialTable, headline
from dwf_cluster.plan.jobs import STAGES, Job, deduplicate, forward_flops, stored_bytes
from dwf_cluster.plan.jobs import jobs as plan_jobs
from dwf_cluster.plan.resources import Resources, allocate
from dwf_cluster.plan.schedule import Allocation, lower_bound, timeline
from dwf_cluster.settings import printable, to_text
from dwf_cluster.store import Store, tables
from dwf_cluster.store.prune import size

GPU_FLOPS = 8.4e13, "estimate for an H100 with TF32, not measured"
CPU_FLOPS = 2.5e10, "estimate for a core at the demo's width, not measured"
"""Floating-point operations a second of one of them until jobs have been measured, and where that figure is from."""


def plan(
    experiments: Sequence[Experiment],
    names: Mapping[str, str],
    todo: Sequence[Job],
    sizes: Sizes,
    resources: Resources,
    storage: str,
) -> tuple[Table, list[str]]:
    """The plan of a run: each job, what it gets, where and when, and its estimated cost.

    The cost counts forward passes of one image through one ResNet (a gradient is 2, a training step 3) and,
    with the operations of such a pass, floating-point operations.

    Args:
        experiments: all of the run.
        names: of the experiments, if there are several, by their folders.
        todo: unfinished jobs.
        sizes: of the data set.
        resources: of the run.
        storage: URL below which the experiments have their folders.

    Returns:
        The table, and lines with the makespan, its lower bound, and the speed of each stage, measured or estimated.
    """
    jobs = deduplicate([job for e in experiments for stage in STAGES for job in plan_jobs(e, stage, sizes)], ())
    allocations = allocate(jobs, resources)
    flops = forward_flops(experiments[0].defended, sizes.shape)
    device = "GPU" if resources.gpus else "CPU"
    assumed, why = GPU_FLOPS if resources.gpus else CPU_FLOPS
    measured = measured_speeds(jobs, allocations, storage)
    speeds = {stage: measured.get(stage, assumed / flops) for stage in STAGES}
    nodes = f"{resources.nodes} nodes of " if resources.nodes > 1 else ""
    table = _table(
        f"Plan on {nodes}{resources.cpus} CPU, {resources.gpus} GPU: {sizes.train} training images, {sizes.test} test "
        f"images of {'x'.join(map(str, sizes.shape))}"
    )
    for heading in (*(("experiment",) if names else ()), "stage", "task", "gets", device):
        table.add_column(heading, no_wrap=True)
    for heading in ("start", "end", "million passes", "TFLOP"):
        table.add_column(heading, justify="right", no_wrap=True)
    planned = timeline(todo, allocations, resources.slots, speeds)
    for job, when in planned.items():
        times = (_clock(when.start), _clock(when.end))
        name = f"{job.name} (copied)" if job.copy_of else job.name
        cells = (job.stage, name, str(allocations[job]), _ranges(when.devices), *times, *_cost(job.cost, flops))
        table.add_row(*((names[job.folder],) if names else ()), *cells)
    table.add_section()
    total = sum(job.cost for job in todo)
    blank = ("",) * (4 + bool(names))
    table.add_row("total", f"{len(todo)} tasks", *blank, *_cost(total, flops))
    makespan = max((when.end for when in planned.values()), default=0.0)
    bound = lower_bound(todo, allocations, resources.slots, speeds)
    return table, [
        f"makespan: {_clock(makespan)}",
        f"lower bound: {_clock(bound)} (no schedule on these resources is shorter)",
        *(
            f"speed of {stage}: {speeds[stage] * flops / 1e12:.3g} TFLOP/s a {device}, "
            f"{'measured on finished jobs' if stage in measured else why}"
            for stage in sorted({job.stage for job in todo}, key=STAGES.index)
        ),
        _storage_line(experiments, sizes, storage),
    ]


def _storage_line(experiments: Sequence[Experiment], sizes: Sizes, storage: str) -> str:
    in_checkpoints, in_tables = stored_bytes(experiments, sizes)
    return (
        f"storage: about {size(in_checkpoints + in_tables)} below {storage} when all of it is done "
        f"({size(in_checkpoints)} of checkpoints, {size(in_tables)} of tables)"
    )


def measured_speeds(jobs: Sequence[Job], allocations: Mapping[Job, Allocation], storage: str) -> dict[str, float]:
    """Passes a second of one GPU or CPU, of each stage that has finished jobs."""
    work: dict[str, tuple[float, float]] = {}
    for job in jobs:
        for row in tables.read(Store(storage, job.folder), "jobs", [job.file]).to_pylist():
            if row["state"] == "done" and row["attempts"] == 1:
                cost, seconds = work.get(job.stage, (0.0, 0.0))
                work[job.stage] = cost + job.cost, seconds + row["seconds"] * allocations[job].slots
    return {stage: cost / seconds for stage, (cost, seconds) in work.items() if seconds}


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,6` for 0, 1, 2, 3, 6."""
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], n]
        else:
            runs.append([n])
    return ",".join("-".join(map(str, run)) for run in runs)


def _cost(passes: float, flops: float) -> tuple[str, str]:
    return f"{passes / 1e6:.3f}", f"{passes * flops / 1e12:,.3f}"


def results(console: Console, experiment: Experiment, store: Store) -> None:
    """Print what a run has come to: its tables, signs of masking, and how to read the rest."""
    show(console, result_table(experiment, store))
    if "transfer" in experiment.evaluation.beyond:
        show(console, transfer_table(experiment, store))
    evaluations, predictions = (store.path(tables.folder(table)) for table in ("evaluations", "predictions"))
    for line in (
        *warnings(experiment, store),
        f"evaluations: {evaluations}",
        f"predictions: {predictions}",
        f"read them: import pandas; pandas.read_parquet({evaluations!r})",
    ):
        print(printable(line))


def result_table(experiment: Experiment, store: Store) -> Table:
    """Accuracy in percent of each model in each column, from the `evaluations` table."""
    heads = {column: column.title for column in experiment.columns}
    return _accuracies(experiment, store, "Accuracy in percent", heads)


def transfer_table(experiment: Experiment, store: Store) -> Table:
    """Accuracy in percent of each model (down) on the PGD images that were made on each other model (across)."""
    made_on = {transfer_column(experiment.evaluation, experiment.threat, name): name for name in experiment.names}
    steps = next(iter(made_on)).steps
    return _accuracies(experiment, store, f"On PGD-{steps} made on", made_on)


def sweep_results(console: Console, sweep: Sweep, outcome: TrialTable) -> None:
    """Print what a sweep has come to: its trials, what they are worth over seeds, and where to read on."""
    for table in sweep_tables(outcome.rows, list(sweep.trials[0].varied)):
        show(console, table)
    print(f"trials: {outcome.path}\nread them: import pandas; pandas.read_parquet({outcome.path!r})")


def sweep_tables(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[Table]:
    """What the mixtures of a sweep are worth, in percent: a row a trial; then mean ± std over seeds.

    Args:
        rows: of `trials.parquet`.
        fields: that are varied.
    """
    heads = list(headline({name: 0.0 for row in rows for name in row if row.get("clean") is not None}))
    of_trials = _table("Accuracy of the mixture in percent, each trial")
    of_settings = _table("Mean ± standard deviation over seeds")
    settings = [field for field in fields if field != "seed"]
    for table, left in ((of_trials, (*fields, "state")), (of_settings, (*settings, "seeds"))):
        for head in left:
            table.add_column(head, no_wrap=True)
        for head in heads:
            table.add_column(head, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells = ("" if row[head] is None else f"{100 * row[head]:.1f}" for head in heads)
        of_trials.add_row(*(to_text(row[field]) for field in fields), row["state"], *cells)
        groups.setdefault(tuple(to_text(row[field]) for field in settings), []).append(row)
    for key, group in groups.items():
        done = [row for row in group if row["state"] == "done"]
        means = (_spread([100 * row[head] for row in done if row[head] is not None]) for head in heads)
        of_settings.add_row(*key, f"{len(done)} of {len(group)}", *means)
    return [of_trials, of_settings] if "seed" in fields else [of_trials]


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{fmean(values):.1f} ± {stdev(values):.1f}"


def _accuracies(experiment: Experiment, store: Store, title: str, heads: Mapping[Column, str]) -> Table:
    rows = tables.read(store, "evaluations").to_pylist()
    keys = list(next(iter(heads)).settings)
    accuracy = {(row["model"], *(row[key] for key in keys)): row["accuracy"] for row in rows}
    table = _table(f"{title}, {rows[0]['examples'] if rows else 0} test images")
    table.add_column("model", no_wrap=True)
    for head in heads.values():
        table.add_column(head, justify="right", no_wrap=True)
    for model in experiment.names:
        cells = [accuracy.get((model, *column.settings.values())) for column in heads]
        if any(cell is not None for cell in cells):  # else another run is at it
            table.add_row(model, *("" if cell is None else f"{100 * cell:.1f}" for cell in cells))
    return table


def warnings(experiment: Experiment, store: Store) -> list[str]:
    """A line for each sign of gradient masking, from the `checks` table, or one that says there is none."""
    rows = tables.read(store, "checks").to_pylist()
    order = {model: allocate for allocate, model in enumerate(experiment.names)}
    fired = sorted((row for row in rows if row["fired"]), key=lambda row: order[row["model"]])
    lines = [f"warning: {row['model']}, {row['check']}: {row['meaning']}" for row in fired]
    looked = f"{len(rows)} checks of {len(order)} models on {rows[0]['examples'] if rows else 0} images"
    return [*lines, f"signs of gradient masking: {len(lines) or 'none'} in {looked}"]


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )


def show(console: Console, table: Table) -> None:
    """Print a table whole: wider than the console rather than cut."""
    wide = Console(file=console.file, width=1000)
    wide.width = max(console.width, wide.measure(table).maximum)
    wide.print(table)
