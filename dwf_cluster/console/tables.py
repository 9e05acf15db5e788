"""The tables that a run prints: its plan, and at its end the accuracy of each model under each attack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from dwf_cluster.console.prune import format_bytes
from dwf_cluster.data.registry import Sizes
from dwf_cluster.defences.rows import rows as table_rows
from dwf_cluster.evaluation.registry import Column, all_columns, transfer_column
from dwf_cluster.evaluation.settings import Threat
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline.sweep import Sweep
from dwf_cluster.pipeline.trial_table import TrialTable, headline
from dwf_cluster.plan.disk_space import stored_bytes
from dwf_cluster.plan.jobs import STAGES, Job, deduplicate
from dwf_cluster.plan.jobs import jobs as plan_jobs
from dwf_cluster.plan.resources import Resources, allocate
from dwf_cluster.plan.schedule import Allocation, Planned, lower_bound, timeline
from dwf_cluster.plan.speeds import Speeds
from dwf_cluster.settings import printable, to_text
from dwf_cluster.store import Store, tables


def plan(
    experiments: Sequence[Experiment],
    names: Mapping[str, str],
    pending: Sequence[Job],
    sizes: Sizes,
    resources: Resources,
    storage: str,
) -> tuple[Table, list[str]]:
    """The plan of a run: for each job its allocation, its devices, its start and end, and its estimated cost.

    The cost counts forward passes of one image through one of the model's networks (a gradient counts as 2, a training
    step as 3), and the floating-point operations of these passes, which decide the order.

    Args:
        experiments: all experiments of the run.
        names: of the experiments, by their folders; empty for one alone.
        pending: jobs to be run.
        sizes: of the data set.
        resources: of the run.
        storage: URL below which the experiments have their folders.

    Returns:
        The table, and lines with the makespan, its lower bound, and the speed of each stage, measured or estimated.
    """
    jobs = deduplicate([job for e in experiments for stage in STAGES for job in plan_jobs(e, stage, sizes)], ())
    allocations = allocate(jobs, resources)
    speeds = Speeds(jobs, allocations, storage)
    planned = timeline(pending, allocations, resources.slots, speeds.seconds)
    makespan = max((when.end for when in planned.values()), default=0.0)
    bound = lower_bound(pending, allocations, resources.slots, speeds.seconds)
    nodes = f"{resources.nodes} nodes of " if resources.nodes > 1 else ""
    table = _table(
        f"Plan on {nodes}{resources.cpus} CPU, {resources.gpus} GPU: {sizes.train} training images, {sizes.test} test "
        f"images of {'x'.join(map(str, sizes.shape))}"
    )
    _add_plan(table, names, planned, allocations, "GPU" if resources.gpus else "CPU")
    return table, [
        f"makespan: {_clock(makespan)}",
        f"lower bound: {_clock(bound)} (no schedule on these resources is shorter)",
        *speeds.lines(pending),
        *_parallelism_lines(pending, resources, speeds),
        _storage_line(experiments, sizes, storage),
    ]


def _parallelism_lines(pending: Iterable[Job], resources: Resources, speeds: Speeds) -> Iterator[str]:
    """How long the first joint training takes on several GPUs if they divide its batches, and if its experts."""
    joint = next((job for job in pending if job.is_training and job.spec.method == "dwf"), None)
    if joint is None or resources.gpus == 0 or resources.slots == 1:
        return
    options = {name: value for name, value in joint.spec.options if name != "parallelism"}
    for parallelism in ("ddp", "experts"):
        spec = replace(joint.spec, options=tuple({**options, "parallelism": parallelism}.items()))
        limits = replace(resources.limits, joint_workers=None)
        job = replace(joint, spec=spec)
        (allocation,) = allocate([job], replace(resources, limits=limits)).values()
        yield (
            f"{joint.name} with joint.parallelism={parallelism}: {_clock(speeds.seconds(job, allocation))} on "
            f"{allocation.workers} GPU{'' if allocation.workers == 1 else 's'}"
        )


def _add_plan(
    table: Table,
    names: Mapping[str, str],
    planned: Mapping[Job, Planned],
    allocations: Mapping[Job, Allocation],
    device: str,
) -> None:
    """Add a row for each job, and their total; of passes only if all are of the same number of operations."""
    for heading in (*(("experiment",) if names else ()), "stage", "task", "resources", device):
        table.add_column(heading, no_wrap=True)
    for heading in ("start", "end", "million passes", "TFLOP"):
        table.add_column(heading, justify="right", no_wrap=True)
    for job, when in planned.items():
        times = (_clock(when.start), _clock(when.end))
        name = f"{job.name} (copied)" if job.copy_of else job.name
        cells = (job.stage, name, str(allocations[job]), _ranges(when.devices), *times, *_cost(job.cost, job.flop))
        table.add_row(*((names[job.folder],) if names else ()), *cells)
    table.add_section()
    blank = ("",) * (4 + bool(names))
    are_equal = len({job.pass_flop for job in planned}) == 1
    passes, flop = _cost(sum(job.cost for job in planned), sum(job.flop for job in planned))
    table.add_row("total", f"{len(planned)} tasks", *blank, passes if are_equal else "", flop)


def _storage_line(experiments: Sequence[Experiment], sizes: Sizes, storage: str) -> str:
    in_checkpoints, in_tables = stored_bytes(experiments, sizes)
    return (
        f"storage: about {format_bytes(in_checkpoints + in_tables)} below {storage} when all of it is done "
        f"({format_bytes(in_checkpoints)} of checkpoints, {format_bytes(in_tables)} of tables)"
    )


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


def _cost(passes: float, flop: float) -> tuple[str, str]:
    return f"{passes / 1e6:.3f}", f"{flop / 1e12:,.3f}"


def results(console: Console, experiment: Experiment, store: Store) -> None:
    """Print the results of an experiment: tables, dead experts, signs of gradient masking, how to read the rest."""
    show(console, result_table(experiment, store))
    for threat in experiment.threats if "transfer" in experiment.evaluation.beyond else ():
        show(console, transfer_table(experiment, store, threat))
    evaluations, predictions = (store.path(tables.folder(table)) for table in ("evaluations", "predictions"))
    for line in (
        *(f"warning: {sentence}" for sentence in tables.dead_experts(tables.read(store, "metrics").to_pylist())),
        *warnings(experiment, store),
        f"evaluations: {evaluations}",
        f"predictions: {predictions}",
        f"read them: import pandas; pandas.read_parquet({evaluations!r})",
    ):
        print(printable(line))


def result_table(experiment: Experiment, store: Store) -> Table:
    """Accuracy in percent of each model (down) in each column (across), from the table `evaluations`.

    Columns that no model was measured in, such as those that a later version has added, are left out.
    """
    suites = experiment.suites(*experiment.models)  # a baseline may have a column that the defended model has not
    listed = all_columns(experiment.evaluation, experiment.threats, suites)
    headings = {column: column.title for column in listed}
    table = _accuracies(experiment, store, "Accuracy in percent", headings)
    table.columns[1:] = [column for column in table.columns[1:] if any(column.cells)]
    table.caption, table.caption_justify = "\n".join(experiment.column_notes) or None, "left"
    return table


def transfer_table(experiment: Experiment, store: Store, threat: Threat) -> Table:
    """Accuracy in percent of each model (down) on the PGD images that were made on each other model (across)."""
    headings = {transfer_column(experiment.evaluation, threat, name): name for name in experiment.names}
    steps = next(iter(headings)).steps
    epsilon = f" ({threat.norm}, epsilon {threat.epsilon:.4g})" if len(experiment.threats) > 1 else ""
    table = _accuracies(experiment, store, f"On PGD-{steps}{epsilon} made on", headings)
    table.caption, table.caption_justify = "\n".join(experiment.selection_notes) or None, "left"
    return table


def _accuracies(experiment: Experiment, store: Store, title: str, headings: Mapping[Column, str]) -> Table:
    rows = tables.read(store, "evaluations").to_pylist()
    keys = list(next(iter(headings)).settings)
    accuracy = {(row["model"], *(row[key] for key in keys)): row["accuracy"] for row in rows}
    table = _table(f"{title}, {max((row['examples'] for row in rows), default=0)} test images")
    table.add_column("model", no_wrap=True)
    for heading in headings.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for specs in table_rows(experiment.models, experiment.baselines).values():
        table.add_section()
        for model in (spec.name for spec in specs):
            cells = [accuracy.get((model, *column.settings.values())) for column in headings]
            if any(cell is not None for cell in cells):  # else another run is still evaluating it
                table.add_row(model, *("" if cell is None else f"{100 * cell:.1f}" for cell in cells))
    return table


def warnings(experiment: Experiment, store: Store) -> list[str]:
    """A line for each sign of gradient masking in the table `checks`, and a line with their number."""
    rows = tables.read(store, "checks").to_pylist()
    models = experiment.names
    fired = sorted((row for row in rows if row["fired"]), key=lambda row: models.index(row["model"]))
    lines = [f"warning: {row['model']}, {row['check']}: {row['meaning']}" for row in fired]
    images = " and ".join(map(str, sorted({row["examples"] for row in rows}))) or 0
    checked = f"{len(rows)} checks of {len(models)} models on {images} images"
    # Rows of earlier versions do not say whether they could fire.
    could = [bool(row["could_fire"]) for row in rows if row["could_fire"] is not None]
    could_fire = f"; {sum(could)} of them could fire" if len(could) == len(rows) else ""
    return [*lines, f"signs of gradient masking: {len(lines) or 'none'} in {checked}{could_fire}"]


# ---------------------------------------------------------------------------------------------------- sweeps


def sweep_results(console: Console, sweep: Sweep, trials: TrialTable) -> None:
    """Print the results of a sweep: its trials, their means over seeds, and how to read the rest."""
    for table in sweep_tables(trials.rows, list(sweep.trials[0].varied)):
        show(console, table)
    for note in _sweep_notes(sweep):
        print(printable(note))
    print(f"trials: {trials.path}\nread them: import pandas; pandas.read_parquet({trials.path!r})")


def _sweep_notes(sweep: Sweep) -> list[str]:
    """The `column_notes` of the trials, such as that columns are upper bounds, with the settings that they apply to."""
    settings: dict[str, dict[str, None]] = {}
    for trial in sweep.trials:
        for note in trial.experiment.column_notes:
            settings.setdefault(note, {})[trial.setting] = None
    everywhere = len(sweep.settings)
    return [note if len(names) == everywhere else f"{'; '.join(names)}: {note}" for note, names in settings.items()]


def sweep_tables(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> list[Table]:
    """Accuracy in percent of the defended model of each trial; then mean ± standard deviation over seeds.

    A mean that leaves seeds out is in parentheses: those that are left may be the better ones.

    Args:
        rows: of `trials.parquet`.
        fields: the varied fields.
    """
    titles = list(headline({name: 0.0 for row in rows for name in row if row.get("clean") is not None}))
    per_trial = _table("Accuracy of the defended model in percent, each trial")
    per_setting = _table("Mean ± standard deviation over seeds")
    settings = [field for field in fields if field != "seed"]
    for table, headings in ((per_trial, (*fields, "state")), (per_setting, (*settings, "seeds"))):
        for heading in headings:
            table.add_column(heading, no_wrap=True)
        for title in titles:
            table.add_column(title, justify="right", no_wrap=True)
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        cells = ("" if row[title] is None else f"{100 * row[title]:.1f}" for title in titles)
        per_trial.add_row(*(to_text(row[field]) for field in fields), row["state"], *cells)
        groups.setdefault(tuple(to_text(row[field]) for field in settings), []).append(row)
    for setting, group in groups.items():
        done = [row for row in group if row["state"] == "done"]
        means = []
        for title in titles:
            values = [100 * row[title] for row in done if row[title] is not None]
            is_partial = 0 < len(values) < len(group)
            means.append(f"({_mean(values)})" if is_partial else _mean(values))
            if is_partial:
                per_setting.caption = "(in parentheses): the mean leaves seeds out; do not compare it with the others"
        per_setting.add_row(*setting, f"{len(done)} of {len(group)}", *means)
    return [per_trial, per_setting] if "seed" in fields else [per_trial]


def _mean(values: Sequence[float]) -> str:
    """Mean ± standard deviation; a single value as it is."""
    if len(values) < 2:
        return "".join(f"{value:.1f}" for value in values)
    return f"{fmean(values):.1f} ± {stdev(values):.1f}"


# ------------------------------------------------------------------------------------------- every table


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        collapse_padding=True,
    )


def show(console: Console, table: Table) -> None:
    """Print all columns of a table: a table that is wider than the console is not cut."""
    wide = Console(file=console.file, width=1000)
    wide.width = max(console.width, wide.measure(table).maximum)
    wide.print(table)
