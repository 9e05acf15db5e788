"""A table as text, Markdown or LaTeX. To add a format: a function of a `Table`, and its entry in `FORMATS`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """A table to print, independent of the format.

    Attributes:
        title: the line above the table.
        heads: two lines of heading for each column after the first, which holds the rows' labels.
        rows: label and cells of each row.
        bold: (row, column) of the bold cells, from 0, without the labels' column.
        notes: the lines below the table.
        lines: rows with a rule above them.
        corner: heading of the labels' column.
        groups: rows that begin a group, and its heading, which is a line above the row.
    """

    title: str
    heads: Sequence[tuple[str, str]]
    rows: Sequence[tuple[str, Sequence[str]]]
    bold: frozenset[tuple[int, int]] = frozenset()
    notes: Sequence[str] = ()
    lines: frozenset[int] = frozenset()
    corner: str = "model"
    groups: Mapping[int, str] = field(default_factory=dict)


def text(table: Table) -> str:
    """Plain text with aligned columns; an asterisk marks a bold cell."""
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
    rows = []
    for i, row in enumerate(body):
        rows += [f"── {table.groups[i]} {rule}"[: len(rule)]] if i in table.groups else [rule] * (i in table.lines)
        rows.append(line(row))
    notes = [note.replace("Bold:", "*:").replace("is bold", "has a *") for note in table.notes]
    above = [] if 0 in table.groups else [rule]  # the heading of the first group is in the rule
    return "\n".join([table.title, *map(line, heads), *above, *rows, rule, *notes]) + "\n"


def markdown(table: Table) -> str:
    """GitHub Markdown."""
    heads = [table.corner, *(f"{above} {below}".strip() for above, below in table.heads)]
    rows = []
    for i, (label, cells) in enumerate(table.rows):
        rows += [[f"*{table.groups[i]}*", *[""] * len(table.heads)]] if i in table.groups else []
        rows.append([label, *(f"**{cell}**" if (i, j) in table.bold else cell for j, cell in enumerate(cells))])
    lines = [heads, ["---", *["---:"] * len(table.heads)], *rows]
    return "\n\n".join(
        [f"**{table.title}**", "\n".join(f"| {' | '.join(cells)} |" for cells in lines), *table.notes, ""]
    )


def mean_and_std(mean: float, std: float = math.nan) -> str:
    """A mean and a standard deviation (0..1) in percent, `97.5 ± 0.4`; NaN: blank, no standard deviation."""
    if math.isnan(mean):
        return ""
    return f"{100 * mean:.1f}" + ("" if math.isnan(std) else f" ± {100 * std:.1f}")


def signed(value: float) -> str:
    """A number with its sign; blank for NaN."""
    return "" if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}"  # no -0.0


_LATEX = str.maketrans({c: f"\\{c}" for c in "&%$#_{}"} | {"±": r"$\pm$", "<": "$<$", "~": r"\textasciitilde{}"})


def latex(table: Table) -> str:
    """LaTeX: a float as wide as the text, for the packages booktabs and graphicx."""
    spans = [(name, len(list(cells))) for name, cells in itertools.groupby(above for above, _ in table.heads)]
    above = " & ".join(rf"\multicolumn{{{n}}}{{c}}{{{name.translate(_LATEX)}}}" for name, n in spans)
    ends = list(itertools.accumulate((n for _, n in spans), initial=2))
    rules = " ".join(rf"\cmidrule(lr){{{start}-{end - 1}}}" for start, end in itertools.pairwise(ends))
    below = " & ".join(head.translate(_LATEX) for _, head in table.heads)
    heads = [rf"{table.corner} & {above} \\"] + [rules, rf" & {below} \\"] * any(head for _, head in table.heads)
    body = []
    for i, (label, cells) in enumerate(table.rows):
        if i in table.groups:
            group = rf"\multicolumn{{{1 + len(table.heads)}}}{{l}}{{\textit{{{table.groups[i].translate(_LATEX)}}}}} \\"
            body += [r"\midrule"] * (i > 0) + [group]
        escaped = [
            rf"\textbf{{{cell.translate(_LATEX)}}}" if (i, j) in table.bold else cell.translate(_LATEX)
            for j, cell in enumerate(cells)
        ]
        body += [r"\midrule"] * (i in table.lines) + [f"{' & '.join([label.translate(_LATEX), *escaped])} \\\\"]
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
"""Formats of a table by name. `analysis.tables` also has `csv`, which writes the frame of `accuracies`."""
