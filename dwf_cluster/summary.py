"""The tables that begin and end a run: the plan, and models down, attacks across, the mixture last."""

from __future__ import annotations

from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.table import Table

from dwf_cluster.cluster.placement import Resources, placement
from dwf_cluster.data.sources import Sizes
from dwf_cluster.experiment import MIXTURE, Experiment
from dwf_cluster.grid import Column, columns, families, transfer
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
    grid = [column for family in families(experiment, MIXTURE) for column in columns(experiment, family)]
    return _accuracies(experiment, store, "Accuracy in percent", {column: column.title for column in grid})


def transfer_table(experiment: Experiment, store: Store) -> Table:
    """Accuracy in percent of each model (down) on the PGD images that were made on each other model (across)."""
    made_on = {transfer(experiment, name): name for name in _models(experiment)}
    steps = next(iter(made_on)).steps
    return _accuracies(experiment, store, f"On PGD-{steps} made on", made_on)


def _accuracies(experiment: Experiment, store: Store, title: str, heads: Mapping[Column, str]) -> Table:
    rows = tables.read(store, "evaluations").to_pylist()
    keys = list(next(iter(heads)).settings)
    accuracy = {(row["model"], *(row[key] for key in keys)): row["accuracy"] for row in rows}
    table = _table(f"{title}, {rows[0]['examples']} test images")
    table.add_column("model", no_wrap=True)
    for head in heads.values():
        table.add_column(head, justify="right", no_wrap=True)
    for model in _models(experiment):
        cells = [accuracy.get((model, *column.settings.values())) for column in heads]
        table.add_row(model, *("" if cell is None else f"{100 * cell:.1f}" for cell in cells))
    return table


def warnings(experiment: Experiment, store: Store) -> list[str]:
    """A line for each sign of gradient masking, from the `checks` table, or one that says there is none."""
    rows = tables.read(store, "checks").to_pylist()
    order = {model: place for place, model in enumerate(_models(experiment))}
    fired = sorted((row for row in rows if row["fired"]), key=lambda row: order[row["model"]])
    lines = [f"warning: {row['model']}, {row['check']}: {row['meaning']}" for row in fired]
    looked = f"{len(rows)} checks of {len(order)} models on {rows[0]['examples']} images"
    return [*lines, f"signs of gradient masking: {len(lines) or 'none'} in {looked}"]


def _models(experiment: Experiment) -> tuple[str, ...]:
    return (*(regime.name for regime in experiment.regimes), MIXTURE)


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
