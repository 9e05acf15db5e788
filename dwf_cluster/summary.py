"""The tables that begin and end a run: the plan, and models down, attacks across, the mixture last."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from dwf_cluster.cluster.placement import Resources, placement
from dwf_cluster.data.sources import Sizes
from dwf_cluster.experiment import MIXTURE, Experiment
from dwf_cluster.grid import FAMILIES, columns
from dwf_cluster.plan import Job, forward_flops
from dwf_cluster.store import Store, tables


def plan_table(experiment: Experiment, todo: dict[str, list[Job]], sizes: Sizes, resources: Resources) -> Table:
    """What a run would do: each job, what it gets, and its estimated cost.

    The cost counts forward passes of one image through one ResNet (a gradient is 2, a training step 3) and,
    with the operations of such a pass, floating-point operations.
    """
    table = _table(
        f"Plan on {resources.cpus} CPU, {resources.gpus} GPU: {sizes.train} training images, {sizes.test} test "
        f"images of {'x'.join(map(str, sizes.shape))}"
    )
    for heading in ("stage", "task", "gets"):
        table.add_column(heading, no_wrap=True)
    for heading in ("million passes", "TFLOP"):
        table.add_column(heading, justify="right", no_wrap=True)
    flops = forward_flops(experiment, sizes.shape)
    for stage, jobs in todo.items():
        if not jobs:
            table.add_row(stage, "done already, skipped")
        for job in jobs:
            table.add_row(stage, job.name, str(placement(job, resources)), *_cost(job.cost, flops))
    table.add_section()
    total = sum(job.cost for jobs in todo.values() for job in jobs)
    table.add_row("total", f"{sum(map(len, todo.values()))} tasks", "", *_cost(total, flops))
    return table


def _cost(passes: float, flops: float) -> tuple[str, str]:
    return f"{passes / 1e6:.3f}", f"{passes * flops / 1e12:,.3f}"


def result_table(experiment: Experiment, store: Store) -> Table:
    """Accuracy in percent of each model in each column, from the `evaluations` table."""
    grid = [column for family in FAMILIES for column in columns(experiment, family)]
    rows = tables.read(store, "evaluations").to_pylist()
    accuracy = {(r["model"], *(r[key] for key in grid[0].settings)): r["accuracy"] for r in rows}
    table = _table(f"Accuracy in percent on {rows[0]['examples']} test images")
    table.add_column("model", no_wrap=True)
    for column in grid:
        table.add_column(column.title, justify="right", no_wrap=True)
    for model in (*(regime.name for regime in experiment.regimes), MIXTURE):
        cells = [accuracy[(model, *column.settings.values())] for column in grid]
        table.add_row(model, *(f"{100 * cell:.1f}" for cell in cells))
    return table


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
