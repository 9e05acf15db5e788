"""Table 3: models down, attacks across, mean ± std over seeds; beside the paper's cells; with tests behind bold face.

    python -m analysis.tables ./runs
    python -m analysis.tables ./runs --format latex > table3.tex

A table for each group of experiments that differ only in their seed.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from analysis.command import Parser, run
from analysis.predictions import Predictions, read_predictions
from analysis.results import ColumnKey, Group, column_key, each, key_of_row, load
from analysis.statistics import ALPHA, comparisons, wilson
from dwf_cluster.evaluation.registry import Column

MIXTURE = "mixture"
from dwf_cluster.settings import printable, to_text

PAPER_MODELS = {
    "benign": "ResNet-18",
    "fgsm-at": "ResNet-18 (FGSM-AT)",
    "pgd-at": "ResNet-18 (PGD-AT)",
    MIXTURE: "DWF",
}
"""Our models that the paper has too, and its names of them."""

PAPER_DATASETS = {"cifar10": "CIFAR-10", "svhn": "SVHN"}

_COLUMN = ["model", "attack", "source", "epsilon", "steps"]
_DEFENDED = r"-AT\)|SoE|ADVMoE|DWF"


@dataclass(frozen=True)
class Table:
    """Cells to be printed, the same whatever the format.

    Attributes:
        title: above it.
        heads: two lines for each column after the first, which holds the rows' labels.
        rows: label and cells.
        bold: places (row, column) of bold cells, from 0, labels not counted.
        notes: below it, a line each.
        lines: rows that a line is drawn above.
        corner: what the rows are.
    """

    title: str
    heads: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[str]]]
    bold: frozenset[tuple[int, int]] = frozenset()
    notes: Sequence[str] = ()
    lines: frozenset[int] = frozenset()
    corner: str = "model"


@functools.cache
def paper() -> pd.DataFrame:
    """The paper's own table 3: dataset, model, attack, parameter, value, accuracy_percent, std_percent."""
    with files("analysis").joinpath("paper_table3.csv").open() as file:
        return pd.read_csv(file)


def accuracies(group: Group) -> pd.DataFrame:
    """What every model comes to in every column, from the `evaluations` of all seeds.

    Returns:
        One row a model and column that any seed was tested in, models in the gate's order and columns in the grid's
        (`transfer` last): `model`, `attack`, `source`, `epsilon`, `steps`, `title` (of the column), `seeds` (tested),
        `mean`, `std` (sample, over seeds; NaN for one), `low`, `high` (95 % Wilson of the mean, for the number of
        images of one seed), all 0..1, `examples`, and `paper`, `paper_std` (0..1, NaN where it has no such cell).
    """
    measured: dict[tuple[str, ColumnKey], list[tuple[float, int]]] = {}
    for row in each(group.frame("evaluations", [*_COLUMN, "accuracy", "examples"])):
        measured.setdefault((row.model, key_of_row(*row[1:5])), []).append((row.accuracy, row.examples))
    titles = {column_key(column): " ".join(column.title.split()) for column in group.columns}
    transfers = {where: f"transfer {where[1]}" for _, where in measured if where not in titles}
    published = _published(group)
    rows = []
    for model in group.models:
        for where, title in (titles | transfers).items():
            if found := measured.get((model, where)):
                values, examples = [accuracy for accuracy, _ in found], min(n for _, n in found)
                mean, std = fmean(values), stdev(values) if len(values) > 1 else math.nan
                interval = wilson(round(mean * examples), examples)
                theirs = published.get((model, where), (math.nan, math.nan))
                rows.append((model, *where, title, len(found), mean, std, *interval, examples, *theirs))
    names = [*_COLUMN, "title", "seeds", "mean", "std", "low", "high", "examples", "paper", "paper_std"]
    return pd.DataFrame(rows, columns=names)


def _published(group: Group) -> dict[tuple[str, ColumnKey], tuple[float, float]]:
    """The paper's cells (0..1) that are of the same data set, model, attack and strength as ours."""
    rows = paper()[paper().dataset == PAPER_DATASETS.get(group.experiment.data.source)]
    of = {(row.model, row.attack, row.value): row for row in each(rows.fillna({"value": 0}))}
    found = {}
    for model, name in PAPER_MODELS.items():
        for column in group.paper_columns:
            if (column.restarts or 3) != 3 or (column.eot or 1) != 1:  # the paper's
                continue
            value = {"clean": 0, "fgsm": column.epsilon}.get(column.attack, column.steps)
            if row := of.get((name, column.attack, value)):
                found[model, column_key(column)] = (row.accuracy_percent / 100, row.std_percent / 100)
    return found


def best(tests: pd.DataFrame) -> set[tuple[str, ColumnKey]]:
    """Models, with the column, that are ahead of every other model there, each of these tests significant after Holm.

    Args:
        tests: of `statistics.comparisons`.
    """
    found = set()
    for where, rows in tests.groupby(_COLUMN[1:], dropna=False):
        ahead = rows[rows.p_holm < ALPHA]
        wins = pd.concat([ahead.model[ahead.difference > 0], ahead.other[ahead.difference < 0]]).value_counts()
        rivals = len({*rows.model, *rows.other}) - 1
        found |= {(str(model), key_of_row(*tuple(where))) for model, won in wins.items() if won == rivals}
    return found


def table3(group: Group, measured: pd.DataFrame, tests: pd.DataFrame) -> Table:
    """The paper's 17 columns.

    Args:
        group: whose models and columns.
        measured: of `accuracies`.
        tests: of `statistics.comparisons`; decide what is bold.
    """
    title, proven = "accuracy in percent, the paper's table 3", best(tests)
    notes = _notes(group, measured, len(tests), bool(proven))
    return _accuracy_table(title, group, group.paper_columns, measured, proven, notes)


def beyond(group: Group, measured: pd.DataFrame, tests: pd.DataFrame) -> Table | None:
    """The columns that the paper does not have, or None if there are none; arguments as for `table3`."""
    columns = [column for column in group.columns if column not in group.paper_columns]
    if not columns:
        return None
    return _accuracy_table("accuracy in percent, beyond the paper", group, columns, measured, best(tests), [])


def overview(groups: Sequence[tuple[Group, pd.DataFrame]]) -> Table | None:
    """The mixture of each group beside the others', or None if there is but one: what a sweep came to.

    Args:
        groups: with their `accuracies`.
    """
    heads = {"clean": ("clean", ""), "pgd": ("pgd", "longest"), "pgd_restarts": ("restarts", "")}
    heads["pgd_adaptive"] = ("adaptive", "")
    rows = []
    for group, measured in groups:
        longest = {row.attack: row for row in each(measured[measured.model == MIXTURE])}  # steps rise
        cells = [percent(longest.get(attack)) for attack in heads]
        rows.append((group.title, [str(len(group.seeds)), *cells]))
    note = "Mean ± standard deviation over seeds. Settings that are compared here are tested in no way."
    title = "accuracy of the mixture in percent, all settings"
    table = Table(title, [("seeds", ""), *heads.values()], rows, notes=[note], corner="settings")
    return table if len(rows) > 1 else None


def _accuracy_table(
    title: str,
    group: Group,
    columns: Sequence[Column],
    measured: pd.DataFrame,
    proven: set[tuple[str, ColumnKey]],
    notes: Sequence[str],
) -> Table:
    cells = _cells(measured)
    models = [m for m in group.models if any((m, column_key(column)) in cells for column in columns)]
    bold = {(i, j) for i, model in enumerate(models) for j, c in enumerate(columns) if (model, column_key(c)) in proven}
    return Table(
        f"{group.title}: {title}",
        [_head(column) for column in columns],
        [(model, [percent(cells.get((model, column_key(column)))) for column in columns]) for model in models],
        frozenset(bold),
        notes,
        frozenset({len(models) - 1}),
    )


def _notes(group: Group, measured: pd.DataFrame, tests: int, bold: bool) -> list[str]:
    images = " or ".join(map(str, sorted(set(measured.examples))))
    seeds = ", ".join(map(str, group.seeds))
    proof = f"p < {ALPHA:.2g} in every paired test (McNemar, Holm over {tests} comparisons)"
    few = [f"{row.model} {row.title}" for row in each(measured) if row.seeds < len(group.seeds)]
    return [
        f"{images} test images; {'mean ± std over seeds' if len(group.seeds) > 1 else 'seed'} {seeds}. Below fgsm its "
        f"epsilon, below the others their iterations (restarts: times starts), all in pixels of [0, 1]; PGD's epsilon "
        f"is {group.experiment.pgd.epsilon:.4g}.",
        f"Bold: ahead of every other model of the column, {proof}."
        if bold
        else f"No cell is bold: no model is ahead of every other one of its column with {proof}.",
        *([f"Not of all seeds yet: {', '.join(few[:6])}{', ...' if len(few) > 6 else ''}."] if few else []),
    ]


def _cells(measured: pd.DataFrame) -> dict[tuple[str, ColumnKey], Any]:
    return {(row.model, key_of_row(*row[1:5])): row for row in each(measured)}


def _head(column: Column) -> tuple[str, str]:
    above, below = column.title.split("\n")
    return above, below


def _seeds(group: Group) -> str:
    if len(group.seeds) == 1:
        return f"seed {group.seeds[0]}"
    return f"mean ± std over seeds {', '.join(map(str, group.seeds))}"


def percent(row: Any) -> str:
    """A row of `accuracies` as `97.5 ± 0.4`; blank for None."""
    if row is None:
        return ""
    return f"{100 * row.mean:.1f}" + ("" if math.isnan(row.std) else f" ± {100 * row.std:.1f}")


def beside_paper(group: Group, measured: pd.DataFrame) -> Table | None:
    """Ours, the paper's and the difference, for the models and columns that both have; None if there are none."""
    cells = _cells(measured)
    columns = [c for c in group.paper_columns if any(not math.isnan(_paper(cells, m, c)) for m in PAPER_MODELS)]
    models = [m for m in group.models if any(not math.isnan(_paper(cells, m, c)) for c in columns)]
    if not models:
        return None
    rows: list[tuple[str, list[str]]] = []
    for model in models:
        of = [cells.get((model, column_key(column))) for column in columns]
        rows += [
            (model, [percent(row) for row in of]),
            (f"paper: {PAPER_MODELS[model]}", ["" if row is None else _published_percent(row) for row in of]),
            ("difference", ["" if row is None else _signed(100 * (row.mean - row.paper)) for row in of]),
        ]
    changed = ", ".join(printable(f"{name}={to_text(value)}", 100) for name, value in group.changed.items())
    notes = [_pgd_warning(group)] + ([f"Settings that are not the preset's: {changed}."] if changed else [])
    lines = frozenset(range(3, len(rows), 3))
    return Table(f"{group.title}: beside the paper", [_head(c) for c in columns], rows, frozenset(), notes, lines)


def _paper(cells: Mapping[tuple[str, ColumnKey], Any], model: str, column: Column) -> float:
    row = cells.get((model, column_key(column)))
    return math.nan if row is None else float(row.paper)


def _published_percent(row: Any) -> str:
    if math.isnan(row.paper):
        return ""
    return f"{100 * row.paper:.1f}" + ("" if math.isnan(row.paper_std) else f" ± {100 * row.paper_std:.1f}")


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}"  # no -0.0


def _pgd_warning(group: Group) -> str:
    rows = paper()[(paper().dataset == PAPER_DATASETS[group.experiment.data.source]) & (paper().attack == "pgd")]
    plain = rows[~rows.model.str.contains(_DEFENDED)].accuracy_percent
    pgd = group.experiment.pgd
    return (
        f"Warning: do not compare the PGD columns (pgd, restarts, adaptive) as they stand. The paper's undefended "
        f"networks keep {plain.min():.0f} to {plain.max():.0f} % under its PGD; in pixel space at 8/255 they keep "
        f"about 0 %, so its bound, or the space that it is measured in, is another. Ours is epsilon {pgd.epsilon:.4g}, "
        f"step {pgd.step_size:.4g}, in pixels of [0, 1]."
    )


def no_paper(group: Group) -> str:
    """Why there is nothing to put beside ours."""
    if group.experiment.data.source not in PAPER_DATASETS:
        return f"The paper has no figures for {printable(group.experiment.data.source)}."
    return "The paper has no cell for these models and strengths."


def against_mixture(group: Group, tests: pd.DataFrame) -> Table | None:
    """The mixture less every other model, points, with 95 % intervals; bold where Holm leaves p below 0.05."""
    of = tests[(tests.model == MIXTURE) | (tests.other == MIXTURE)]
    if of.empty:
        return None
    cells: dict[tuple[ColumnKey, str], tuple[str, bool]] = {}
    for row in each(of):
        sign, other = (1, row.other) if row.model == MIXTURE else (-1, row.model)
        low, high = sorted((sign * row.low, sign * row.high))
        where = key_of_row(row.attack, row.source, row.epsilon, row.steps)
        text = f"{_signed(100 * sign * row.difference)} [{_signed(100 * low)}, {_signed(100 * high)}]"
        cells[where, str(other)] = text, row.p_holm < ALPHA
    columns = [c for c in group.columns if any(where == column_key(c) for where, _ in cells)]
    others = [model for model in group.models if any(other == model for _, other in cells)]
    shown = [[cells.get((column_key(column), other), ("", False)) for other in others] for column in columns]
    return Table(
        f"{group.title}: the mixture less each other model, points",
        [(other, "") for other in others],
        [(" ".join(_head(c)).strip(), [cell for cell, _ in row]) for c, row in zip(columns, shown, strict=True)],
        frozenset((i, j) for i, row in enumerate(shown) for j, (_, proven) in enumerate(row) if proven),
        [
            f"In brackets the 95 % bootstrap interval over images. Bold: p < {ALPHA:.2g} (McNemar on the same images, "
            f"Holm over the {len(tests)} comparisons of all pairs of models in all columns).",
            "These tests speak of the trained models and of further images, not of further seeds.",
        ],
        corner="attack",
    )


def of_group(group: Group, found: Predictions) -> tuple[pd.DataFrame, pd.DataFrame, list[Table], list[str]]:
    """Accuracies, tests, the tables made of them, and remarks on what there is no table for."""
    measured, tests = accuracies(group), comparisons(group, found)
    beside = beside_paper(group, measured)
    made = [table3(group, measured, tests), beyond(group, measured, tests), beside, against_mixture(group, tests)]
    return measured, tests, [table for table in made if table], [] if beside else [no_paper(group)]


# ------------------------------------------------------------------------------------------- formats


def text(table: Table) -> str:
    """Columns lined up; an asterisk is bold face."""
    body = [
        [label, *(cell + "*" * ((i, j) in table.bold) for j, cell in enumerate(cells))]
        for i, (label, cells) in enumerate(table.rows)
    ]
    heads = [[table.corner, *(above for above, _ in table.heads)], ["", *(below for _, below in table.heads)]]
    heads = heads[: 1 + any(heads[1])]
    widths = [max(map(len, column)) for column in zip(*heads, *body, strict=True)]

    def line(cells: Sequence[str]) -> str:
        aligned = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return "  ".join(aligned).rstrip()

    rule = "─" * (sum(widths) + 2 * len(widths) - 2)
    rows = [part for i, row in enumerate(body) for part in ([rule] if i in table.lines else []) + [line(row)]]
    notes = [note.replace("Bold:", "*:").replace("is bold", "has a *") for note in table.notes]
    return "\n".join([table.title, *map(line, heads), rule, *rows, rule, *notes]) + "\n"


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown."""
    heads = [table.corner, *(f"{above} {below}".strip() for above, below in table.heads)]
    rows = [
        [label, *(f"**{cell}**" if (i, j) in table.bold else cell for j, cell in enumerate(cells))]
        for i, (label, cells) in enumerate(table.rows)
    ]
    lines = [heads, ["---", *["---:"] * len(table.heads)], *rows]
    return "\n\n".join(
        [f"**{table.title}**", "\n".join(f"| {' | '.join(cells)} |" for cells in lines), *table.notes, ""]
    )


_LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"±": r"$\pm$", "<": "$<$", "~": r"\textasciitilde{}"})


def latex(table: Table) -> str:
    """A float for the packages booktabs and graphicx, as wide as the text."""
    spans = [(name, len(list(cells))) for name, cells in itertools.groupby(above for above, _ in table.heads)]
    above = " & ".join(rf"\multicolumn{{{n}}}{{c}}{{{name.translate(_LATEX)}}}" for name, n in spans)
    ends = list(itertools.accumulate((n for _, n in spans), initial=2))
    rules = " ".join(rf"\cmidrule(lr){{{start}-{end - 1}}}" for start, end in itertools.pairwise(ends))
    below = " & ".join(head.translate(_LATEX) for _, head in table.heads)
    heads = [rf"{table.corner} & {above} \\"] + [rules, rf" & {below} \\"] * any(head for _, head in table.heads)
    body = []
    for i, (label, cells) in enumerate(table.rows):
        written_cells = [
            rf"\textbf{{{cell.translate(_LATEX)}}}" if (i, j) in table.bold else cell.translate(_LATEX)
            for j, cell in enumerate(cells)
        ]
        body += [r"\midrule"] * (i in table.lines) + [f"{' & '.join([label.translate(_LATEX), *written_cells])} \\\\"]
    return "\n".join(
        [
            r"\begin{table*}",
            rf"\caption{{{' '.join([table.title + '.', *table.notes]).translate(_LATEX)}}}",
            r"\centering",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * len(table.heads)}}}",
            r"\toprule",
            *heads,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table*}",
            "",
        ]
    )


FORMATS: Mapping[str, Callable[[Table], str]] = {"text": text, "markdown": markdown, "latex": latex}
"""How a table is to_text; `csv` beside them writes `accuracies` as it is."""


def main(arguments: Sequence[str]) -> None:
    """Print the tables of every group."""
    parser = Parser(
        prog="python -m analysis.tables", description="Table 3 and what belongs to it, one for each group of seeds."
    )
    parser.add_argument("storage", nargs="+", help="storage or experiment's folder, a path or an fsspec URL")
    parser.add_argument("--format", choices=(*FORMATS, "csv"), default="text", help="default: text")
    options = parser.parse_args(arguments)
    found = [(group, of_group(group, read_predictions(group))) for group in load(*options.storage).evaluated]
    if options.format == "csv":
        frames = [measured.assign(group=group.title) for group, (measured, *_) in found]
        pd.concat(frames).to_csv(sys.stdout, index=False)
        return
    if all_of_them := overview([(group, measured) for group, (measured, *_) in found]):
        print(FORMATS[options.format](all_of_them))
    for _, (_, _, made, remarks) in found:
        print("\n".join([*map(FORMATS[options.format], made), *remarks]))


if __name__ == "__main__":
    sys.exit(run(main))
