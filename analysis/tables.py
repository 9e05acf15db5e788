"""Table 3 with means and standard deviations over seeds, tests, and the paper's cells.

    python -m analysis.tables ./runs
    python -m analysis.tables ./runs --format latex > table3.tex

Tables for each group of experiments that differ only in their seed. To add a table: a function that returns a `Table`,
and its place in `make_tables`.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from analysis import paper
from analysis.accuracies import accuracies, cells_of, head, percent
from analysis.class_tables import class_tables
from analysis.columns import ColumnKey, column_key, column_name, each, key_of_row
from analysis.command import command
from analysis.cost import SIZE_HEADS, SIZE_NOTE, costs, size_cells
from analysis.expert_tables import expert_tables
from analysis.formats import FORMATS, Table, signed
from analysis.paper_tables import beside_paper, equivalents
from analysis.predictions import Predictions, read_predictions
from analysis.results import Group, load
from analysis.statistics import ALPHA, comparisons, is_established
from analysis.sweep_tables import Setting, setting_tables
from dwf_cluster.console.command import Parser
from dwf_cluster.evaluation.registry import WORST_CASE, Column, worst_case_column

__all__ = [
    "accuracies",
    "against_defended",
    "beside_paper",
    "beyond",
    "equivalents",
    "make_tables",
    "percent",
    "table3",
]

INCOMPLETE = "incomplete"
"""The cell of a model that lacks a seed or a shard in a column of the primary family."""


def bold_cells(tests: pd.DataFrame) -> set[tuple[str, ColumnKey]]:
    """Models, with the column, whose lead is established; only columns of the primary family have such cells.

    The defended model, if its lead over every rival is established. A rival, if its lead over the defended model is.

    Args:
        tests: result of `statistics.comparisons`.
    """
    cells = set()
    primary = tests[tests.primary.astype(bool)]
    for _, rows in primary.groupby("attack", sort=False):
        family = list(each(rows))
        key, defended = key_of_row(family[0]), str(family[0].model)
        if all(is_established(row) and row.difference > 0 for row in family):
            cells.add((defended, key))
        cells |= {(str(row.other), key) for row in family if is_established(row) and row.difference < 0}
    return cells


def table3(group: Group, measured: pd.DataFrame, tests: pd.DataFrame) -> Table:
    """The worst case under the primary threat model, the paper's 17 columns, and the size and cost of each model.

    Args:
        group: gives models and columns.
        measured: result of `accuracies`.
        tests: result of `statistics.comparisons`; they decide which cells are bold.
    """
    columns = [*_headline_columns(group, measured), *group.paper_columns]
    notes = [*_notes(group, measured, columns), *bold_notes(group, tests)]
    title = f"{group.title}: accuracy in percent, the paper's table 3"
    table = _accuracy_table(title, group, columns, measured, tests, notes)
    if not (sizes := costs(group.experiment)):
        return table
    rows = [(model, [*cells, *size_cells(sizes.get(model))]) for model, cells in table.rows]
    return replace(table, heads=[*table.heads, *SIZE_HEADS], rows=rows, notes=[*notes, SIZE_NOTE])


def beyond(group: Group, measured: pd.DataFrame, tests: pd.DataFrame) -> Table | None:
    """The columns that `table3` does not have, or None if there are none; arguments as for `table3`."""
    shown = [*_headline_columns(group, measured), *group.paper_columns]
    measured_keys = {key_of_row(row) for row in each(measured)}
    columns = [c for c in group.columns if c not in shown and column_key(c) in measured_keys]
    if not columns:
        return None
    title = f"{group.title}: accuracy in percent, beyond the paper"
    notes = [*_coverage_notes(group, measured, columns), "No cell can be bold: these columns are exploratory."]
    return _accuracy_table(title, group, columns, measured, tests, notes)


def _headline_columns(group: Group, measured: pd.DataFrame) -> list[Column]:
    """The column `worst_case` under the primary threat model; none in the folders of earlier versions."""
    column = worst_case_column(group.experiment.threat)
    return [column] if any(key_of_row(row) == column_key(column) for row in each(measured)) else []


def _accuracy_table(
    title: str,
    group: Group,
    columns: Sequence[Column],
    measured: pd.DataFrame,
    tests: pd.DataFrame,
    notes: Sequence[str],
) -> Table:
    cells, established = cells_of(measured), bold_cells(tests)
    missing = {(str(row.other), key_of_row(row)) for row in each(tests[tests.incomplete.astype(bool)])}
    keys = [column_key(column) for column in columns]
    models = [m for m in group.models if any((m, key) in cells or (m, key) in missing for key in keys)]

    def cell(model: str, key: ColumnKey) -> str:
        row = cells.get((model, key))
        if row is None:
            return INCOMPLETE if (model, key) in missing else ""
        return percent(row) + (f" ({row.seeds}/{len(group.seeds)})" if row.seeds < len(group.seeds) else "")

    return Table(
        title,
        [head(column) for column in columns],
        [(model, [cell(model, key) for key in keys]) for model in models],
        frozenset((i, j) for i, m in enumerate(models) for j, key in enumerate(keys) if (m, key) in established),
        notes,
        groups=_group_headings(group, models),
    )


def _group_headings(group: Group, models: Sequence[str]) -> dict[int, str]:
    """The first row of each group of models, and its heading; none if all models are of one group."""
    headings = {model: heading for heading, members in group.sections.items() for model in members}
    first: dict[str, int] = {}
    for i, model in enumerate(models):
        first.setdefault(headings[model], i)
    return {i: heading for heading, i in first.items()} if len(first) > 1 else {}


def _notes(group: Group, measured: pd.DataFrame, columns: Sequence[Column]) -> list[str]:
    images, seeds = measured.examples.max(), ", ".join(map(str, group.seeds))
    threats = "; ".join(f"{threat.norm} {threat.epsilon:.4g}" for threat in group.experiment.threats)
    return [
        f"{images} test images; {'mean ± std over seeds' if len(group.seeds) > 1 else 'seed'} {seeds}. "
        f"Second line of the heading: epsilon of fgsm, iterations of the other attacks (restarts: iterations x "
        f"starts). Epsilons are in pixels of [0, 1]; the other attacks have {threats}.",
        *_coverage_notes(group, measured, columns),
    ]


def _coverage_notes(group: Group, measured: pd.DataFrame, columns: Sequence[Column]) -> list[str]:
    """What limits the numbers of these columns."""
    keys = {column_key(column) for column in columns}
    rows = (row for row in each(measured) if row.seeds < len(group.seeds) and key_of_row(row) in keys)
    partial = [f"{row.model} {row.title}" for row in rows]
    listed = f"{', '.join(partial[:6])}{', ...' if len(partial) > 6 else ''}"
    return [
        *group.experiment.column_notes,
        *([f"In brackets seeds measured / all; incomplete, so not compared: {listed}."] if partial else []),
    ]


def bold_notes(group: Group, tests: pd.DataFrame) -> list[str]:
    """The rule of bold cells, and the rivals that it leaves out."""
    primary = tests[tests.primary.astype(bool)]
    if primary.empty:
        return ["No cell is bold: no two models have been tested yet."]
    titles = {column_key(column): column_name(column) for column in group.columns}
    names = dict.fromkeys(titles[key_of_row(row)] for row in each(primary))
    incomplete = [f"{row.other} ({titles[key_of_row(row)]})" for row in each(primary[primary.incomplete.astype(bool)])]
    attacks, defended = {row.attack for row in each(primary)}, group.defended
    stand_in = [
        "These results have no column worst_case; PGD with restarts stands in for it."
        if "pgd_restarts" in attacks
        else "These results have no column worst_case, and PGD's accuracies are upper bounds where a gate gives each "
        "image to one expert: nothing is tested under attack."
    ]
    rule = (
        f"in {' and '.join(names)} only, the {defended} if it is ahead of every rival (every other model), and a rival "
        f"if it is ahead of the {defended}, with p < {ALPHA:.2g} in paired tests {tested_over(group)}, corrected over "
        f"{len(primary)} comparisons (Hochberg over rivals, Bonferroni over columns); never with one seed"
    )
    return [
        f"Bold: {rule}." if bold_cells(tests) else f"No cell is bold. The rule: {rule}.",
        "All other columns are exploratory: no test of them is corrected, and no claim rests on them.",
        *(stand_in if WORST_CASE not in attacks else []),
        *_more_attacks(group, attacks),
        *([f"Incomplete, so no claim is made against: {', '.join(incomplete)}."] if incomplete else []),
    ]


def _more_attacks(group: Group, attacks: Collection[str]) -> list[str]:
    """That the worst case of the defended model is over more attacks than that of others."""
    experiment = group.experiment
    suites = [experiment.suites(spec) for spec in (*experiment.models, experiment.defended)]
    more = [suite for suite in suites[-1] if not all(suite in other for other in suites)]
    if WORST_CASE not in attacks or not more:
        return []
    return [
        f"The {group.defended} was attacked by {', '.join(more)} too, and not every rival was: its worst case is over "
        "more attacks, which favours those rivals."
    ]


def tested_over(group: Group) -> str:
    """What the paired tests generalise over."""
    if len(group.seeds) > 1:
        return "over seeds and images"
    return "over images (one seed: a statement about these trained models, not about the method)"


def against_defended(group: Group, tests: pd.DataFrame) -> Table | None:
    """Accuracy of the defended model minus that of each other model, in points, with 95 % intervals.

    The columns of the primary family come first. A cell is bold if the difference is established.
    """
    defended = group.defended
    rows = [row for row in each(tests) if row.model == defended]
    cells = {(key_of_row(row), str(row.other)): row for row in rows}
    if not cells:
        return None
    first = {key_of_row(row) for row in rows if row.primary}
    columns = [column for column in group.columns if any(key == column_key(column) for key, _ in cells)]
    columns = sorted(columns, key=lambda column: column_key(column) not in first)  # stable
    others = [model for model in group.models if any(other == model for _, other in cells)]
    shown = [[cells.get((column_key(column), other)) for other in others] for column in columns]
    return Table(
        f"{group.title}: {defended} minus each other model, percentage points",
        [(other, "") for other in others],
        [(" ".join(head(c)).strip(), [_interval(row) for row in r]) for c, r in zip(columns, shown, strict=True)],
        frozenset((i, j) for i, r in enumerate(shown) for j, row in enumerate(r) if row and is_established(row)),
        notes=[
            f"In brackets the 95 % interval {tested_over(group)}, not corrected.",
            f"Bold: an established difference, above the line only: p < {ALPHA:.2g}, corrected over "
            f"{int(tests.primary.sum())} comparisons (Hochberg over rivals, Bonferroni over columns), never with one "
            f"seed. Everything below the line is exploratory.",
            *group.experiment.column_notes,
        ],
        lines=frozenset({len(first)} & set(range(1, len(columns)))),
        corner="attack",
    )


def _interval(row: Any) -> str:
    """A row of `comparisons` as `+1.2 [-0.3, +2.7]`."""
    if row is None:
        return ""
    if row.incomplete:
        return INCOMPLETE
    return f"{signed(100 * row.difference)} [{signed(100 * row.low)}, {signed(100 * row.high)}]"


def make_tables(group: Group, predictions: Predictions) -> tuple[pd.DataFrame, pd.DataFrame, list[Table], list[str]]:
    """Accuracies, tests, the tables made of them, and remarks on tables that could not be made."""
    measured, tests = accuracies(group), comparisons(group, predictions)
    beside = beside_paper(group, measured)
    tables = [
        table3(group, measured, tests),
        equivalents(group, measured),
        beyond(group, measured, tests),
        beside,
        against_defended(group, tests),
    ]
    by_class, unrated = class_tables(group, predictions)
    tables += [*expert_tables(group, measured, predictions), *by_class]
    remarks = [*([] if beside else [paper.why_not_compared(group)]), *unrated]
    return measured, tests, [table for table in tables if table], remarks


@command
def main(arguments: Sequence[str]) -> None:
    """Print the tables of every group."""
    parser = Parser(
        prog="python -m analysis.tables", description="Table 3, tests and the paper's cells, for each group of seeds."
    )
    parser.add_argument("storage", nargs="+", help="storage or experiment's folder, a path or an fsspec URL")
    parser.add_argument("--format", choices=(*FORMATS, "csv"), default="text", help="default: text")
    options = parser.parse_args(arguments)
    settings, results = [], []
    for group in load(*options.storage).evaluated:
        predictions = read_predictions(group)
        measured, _, tables, remarks = make_tables(group, predictions)
        settings.append(Setting.of(group, measured, predictions))
        results.append((tables, remarks))
    if options.format == "csv":
        frames = [setting.measured.assign(group=setting.group.title) for setting in settings]
        pd.concat(frames).to_csv(sys.stdout, index=False)
        return
    for table in setting_tables(settings):
        print(FORMATS[options.format](table))
    for tables, remarks in results:
        print("\n".join([*map(FORMATS[options.format], tables), *remarks]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
