"""Table 3 with means and standard deviations over seeds, tests, and the paper's cells.

    python -m analysis.tables ./runs
    python -m analysis.tables ./runs --format latex > table3.tex

Tables for each group of experiments that differ only in their seed. To add a table: a function that returns a `Table`,
and its place in `make_tables`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from analysis import paper
from analysis.class_tables import class_tables
from analysis.columns import CELL_FIELDS, COLUMN_FIELDS, ColumnKey, column_key, column_name, each, key_of_row
from analysis.command import command
from analysis.expert_tables import expert_tables
from analysis.formats import FORMATS, Table
from analysis.predictions import Predictions, read_predictions
from analysis.results import Group, load
from analysis.statistics import ALPHA, comparisons
from analysis.sweep_tables import Setting, setting_tables
from dwf_cluster.console.command import Parser
from dwf_cluster.evaluation.merge import wilson
from dwf_cluster.evaluation.registry import Column
from dwf_cluster.settings import printable, to_text

_NO_CELL = (math.nan, math.nan)


def accuracies(group: Group) -> pd.DataFrame:
    """The accuracy of every model in every column, from the `evaluations` of all seeds.

    Returns:
        One row for each model and column that was measured with any seed, models in the order of `Group.models` and
        columns in that of the result table (`transfer` last): `model`, `attack`, `source`, `epsilon`, `steps`, `title`
        (of the column), `seeds` (number measured), `mean`, `std` (sample, over seeds; NaN for one), `low`, `high` (95 %
        Wilson interval of the mean, for the number of images of one seed), all 0..1, `examples`, and `paper`,
        `paper_std` (0..1, NaN where the paper has no such cell).
    """
    measured: dict[tuple[str, ColumnKey], list[tuple[float, int]]] = {}
    for row in each(group.frame("evaluations", [*CELL_FIELDS, "accuracy", "examples"])):
        measured.setdefault((row.model, key_of_row(row)), []).append((row.accuracy, row.examples))
    titles = {column_key(column): column_name(column) for column in group.columns}
    transfers = {key: f"{key.attack} {key.source}" for _, key in measured if key not in titles}
    published = paper.published(group)
    rows = []
    for model in group.models:
        for key, title in (titles | transfers).items():
            if cell := measured.get((model, key)):
                values, examples = [accuracy for accuracy, _ in cell], min(count for _, count in cell)
                mean, std = fmean(values), stdev(values) if len(values) > 1 else math.nan
                interval = wilson(round(mean * examples), examples)
                paper_cell = published.get((model, key), _NO_CELL)
                rows.append((model, *key, title, len(values), mean, std, *interval, examples, *paper_cell))
    names = [*CELL_FIELDS, "title", "seeds", "mean", "std", "low", "high", "examples", "paper", "paper_std"]
    return pd.DataFrame(rows, columns=names)


def best(tests: pd.DataFrame) -> set[tuple[str, ColumnKey]]:
    """Models, with the column, that are ahead of every other model there, each test significant after Holm.

    Args:
        tests: result of `statistics.comparisons`.
    """
    cells = set()
    for _, rows in tests.groupby(COLUMN_FIELDS, dropna=False):
        ahead = rows[rows.p_holm < ALPHA]
        wins = pd.concat([ahead.model[ahead.difference > 0], ahead.other[ahead.difference < 0]]).value_counts()
        rivals = len({*rows.model, *rows.other}) - 1
        key = key_of_row(next(each(rows)))
        cells |= {(str(model), key) for model, won in wins.items() if won == rivals}
    return cells


def table3(group: Group, measured: pd.DataFrame, tests: pd.DataFrame) -> Table:
    """The paper's 17 columns.

    Args:
        group: gives models and columns.
        measured: result of `accuracies`.
        tests: result of `statistics.comparisons`; they decide which cells are bold.
    """
    title, proven = "accuracy in percent, the paper's table 3", best(tests)
    notes = _notes(group, measured, len(tests), bool(proven))
    return _accuracy_table(f"{group.title}: {title}", group, group.paper_columns, measured, proven, notes)


def beyond(group: Group, measured: pd.DataFrame, tests: pd.DataFrame) -> Table | None:
    """The columns that the paper does not have, or None if there are none; arguments as for `table3`."""
    columns = [column for column in group.columns if column not in group.paper_columns]
    if not columns:
        return None
    title = f"{group.title}: accuracy in percent, beyond the paper"
    return _accuracy_table(title, group, columns, measured, best(tests), [])


def _accuracy_table(
    title: str,
    group: Group,
    columns: Sequence[Column],
    measured: pd.DataFrame,
    proven: set[tuple[str, ColumnKey]],
    notes: Sequence[str],
) -> Table:
    cells = _cells(measured)
    keys = [column_key(column) for column in columns]
    models = [model for model in group.models if any((model, key) in cells for key in keys)]
    bold = {(i, j) for i, model in enumerate(models) for j, key in enumerate(keys) if (model, key) in proven}
    return Table(
        title,
        [_head(column) for column in columns],
        [(model, [percent(cells.get((model, key))) for key in keys]) for model in models],
        frozenset(bold),
        notes,
        frozenset({len(models) - 1} - {0}),
    )


def _notes(group: Group, measured: pd.DataFrame, tests: int, bold: bool) -> list[str]:
    images = " or ".join(map(str, sorted(set(measured.examples))))
    seeds = ", ".join(map(str, group.seeds))
    proof = f"p < {ALPHA:.2g} in every paired test (McNemar, Holm over {tests} comparisons)"
    partial = [f"{row.model} {row.title}" for row in each(measured) if row.seeds < len(group.seeds)]
    return [
        f"{images} test images; {'mean ± std over seeds' if len(group.seeds) > 1 else 'seed'} {seeds}. Second line of "
        f"the heading: epsilon of fgsm, iterations of the other attacks (restarts: iterations x starts). Epsilons are "
        f"in pixels of [0, 1]; that of PGD is {group.experiment.pgd.epsilon:.4g}.",
        f"Bold: ahead of every other model of the column, {proof}."
        if bold
        else f"No cell is bold: no model is ahead of every other one of its column with {proof}.",
        *([f"Not of all seeds yet: {', '.join(partial[:6])}{', ...' if len(partial) > 6 else ''}."] if partial else []),
    ]


def _cells(measured: pd.DataFrame) -> dict[tuple[str, ColumnKey], Any]:
    return {(row.model, key_of_row(row)): row for row in each(measured)}


def _head(column: Column) -> tuple[str, str]:
    above, below = column.title.split("\n")
    return above, below


def percent(row: Any) -> str:
    """A row of `accuracies` as `97.5 ± 0.4`; blank for None."""
    return "" if row is None else _percent(row.mean, row.std)


def _percent(mean: float, std: float) -> str:
    if math.isnan(mean):
        return ""
    return f"{100 * mean:.1f}" + ("" if math.isnan(std) else f" ± {100 * std:.1f}")


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}"  # no -0.0


def beside_paper(group: Group, measured: pd.DataFrame) -> Table | None:
    """Our cells, the paper's and the difference, for the models and columns that both have; None if there are none."""
    cells = _cells(measured)
    shared = {cell for cell, row in cells.items() if not math.isnan(row.paper)}
    columns = [column for column in group.paper_columns if any(key == column_key(column) for _, key in shared)]
    names = paper.names(group.experiment)
    rows: list[tuple[str, list[str]]] = []
    for model in (model for model in group.models if any(model == name for name, _ in shared)):
        ours = [cells.get((model, column_key(column))) for column in columns]
        rows += [
            (model, [percent(row) for row in ours]),
            (f"paper: {names[model]}", ["" if row is None else _percent(row.paper, row.paper_std) for row in ours]),
            ("difference", ["" if row is None else _signed(100 * (row.mean - row.paper)) for row in ours]),
        ]
    if not rows:
        return None
    changed = ", ".join(printable(f"{name}={to_text(value)}", 100) for name, value in group.changed.items())
    notes = [paper.pgd_warning(group)]
    notes += [f"Settings that differ from the preset: {changed}."] if changed else []
    lines = frozenset(range(3, len(rows), 3))
    return Table(f"{group.title}: beside the paper", [_head(c) for c in columns], rows, frozenset(), notes, lines)


def against_defended(group: Group, tests: pd.DataFrame) -> Table | None:
    """Accuracy of the defended model minus that of each other model, in points, with 95 % intervals.

    A cell is bold if p is below 0.05 after Holm.
    """
    defended = group.defended
    cells: dict[tuple[ColumnKey, str], tuple[str, bool]] = {}
    for row in each(tests[(tests.model == defended) | (tests.other == defended)]):
        sign, other = (1, row.other) if row.model == defended else (-1, row.model)
        low, high = sorted((sign * row.low, sign * row.high))
        text = f"{_signed(100 * sign * row.difference)} [{_signed(100 * low)}, {_signed(100 * high)}]"
        cells[key_of_row(row), str(other)] = text, row.p_holm < ALPHA
    if not cells:
        return None
    columns = [column for column in group.columns if any(key == column_key(column) for key, _ in cells)]
    others = [model for model in group.models if any(other == model for _, other in cells)]
    shown = [[cells.get((column_key(column), other), ("", False)) for other in others] for column in columns]
    return Table(
        f"{group.title}: {defended} minus each other model, percentage points",
        [(other, "") for other in others],
        [(" ".join(_head(c)).strip(), [cell for cell, _ in row]) for c, row in zip(columns, shown, strict=True)],
        frozenset((i, j) for i, row in enumerate(shown) for j, (_, proven) in enumerate(row) if proven),
        notes=[
            f"In brackets the 95 % bootstrap interval over images. Bold: p < {ALPHA:.2g} (McNemar on the same images, "
            f"Holm over the {len(tests)} comparisons of all pairs of models in all columns).",
            "These tests are statements about the trained models and further images, not about further seeds.",
        ],
        corner="attack",
    )


def make_tables(group: Group, predictions: Predictions) -> tuple[pd.DataFrame, pd.DataFrame, list[Table], list[str]]:
    """Accuracies, tests, the tables made of them, and remarks on tables that could not be made."""
    measured, tests = accuracies(group), comparisons(group, predictions)
    beside = beside_paper(group, measured)
    tables = [table3(group, measured, tests), beyond(group, measured, tests), beside, against_defended(group, tests)]
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
