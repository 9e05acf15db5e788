"""Our cells beside the paper's, and the FGSM-equivalent epsilon of PGD cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis import paper
from analysis.accuracies import cells_of, equivalent_epsilon, head, is_pgd, percent
from analysis.columns import column_key
from analysis.formats import Table, mean_and_std, signed
from analysis.results import Group
from dwf_cluster.evaluation.registry import Column
from dwf_cluster.settings import printable, to_text


def _difference(row: Any) -> str:
    """Ours minus the paper's in points; blank for PGD, whose epsilon in the paper is another one."""
    return "" if row is None or is_pgd(row.attack) else signed(100 * (row.mean - row.paper))


def beside_paper(group: Group, measured: pd.DataFrame) -> Table | None:
    """Our cells, the paper's and the difference, for the models and columns that both have; None if there are none."""
    cells = cells_of(measured)
    shared = {cell for cell, row in cells.items() if not math.isnan(row.paper)}
    columns = [column for column in group.paper_columns if any(key == column_key(column) for _, key in shared)]
    names = paper.names(group.experiment)
    rows: list[tuple[str, list[str]]] = []
    for model in (model for model in group.models if any(model == name for name, _ in shared)):
        ours = [cells.get((model, column_key(column))) for column in columns]
        rows += [
            (model, [percent(row) for row in ours]),
            (f"paper: {names[model]}", ["" if row is None else mean_and_std(row.paper, row.paper_std) for row in ours]),
            ("difference", [_difference(row) for row in ours]),
        ]
    if not rows:
        return None
    changed = ", ".join(printable(f"{name}={to_text(value)}", 100) for name, value in group.changed.items())
    notes = [paper.pgd_warning(group), *group.experiment.column_notes]
    notes += [f"Settings that differ from the preset: {changed}."] if changed else []
    lines = frozenset(range(3, len(rows), 3))
    return Table(f"{group.title}: beside the paper", [head(c) for c in columns], rows, frozenset(), notes, lines)


def _of_paper(cells: Mapping[tuple[str, float], tuple[float, float]], columns: Sequence[Column]) -> list[str]:
    """Cells of `equivalents` for the paper's cells of one model."""
    curve = [(value, mean) for (attack, value), (mean, _) in cells.items() if attack in ("clean", "fgsm")]
    means = [cells.get((column.attack, column.steps or 0), (math.nan, math.nan))[0] for column in columns]
    return [_epsilon(equivalent_epsilon(curve, mean)) for mean in means]


def _epsilon(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}"


def equivalents(group: Group, measured: pd.DataFrame) -> Table | None:
    """The FGSM-equivalent epsilon of each PGD cell, ours and the paper's; None if there are none."""
    cells, published = cells_of(measured), paper.cells_of_models(group)
    columns = [
        column
        for column in group.paper_columns
        if is_pgd(column.attack) and any(key == column_key(column) for _, key in cells)
    ]
    names = paper.names(group.experiment)
    rows: list[tuple[str, list[str]]] = []
    groups: dict[int, str] = {}
    for heading, models in group.sections.items():
        first = len(rows)
        for model in models:
            ours = [cells.get((model, column_key(column))) for column in columns]
            if any(row is not None for row in ours):
                rows.append((model, [_epsilon(math.nan if row is None else row.fgsm_epsilon) for row in ours]))
                if model in published:
                    rows.append((f"paper: {names[model]}", _of_paper(published[model], columns)))
        groups |= {first: heading} if len(rows) > first else {}
    if not any(cell for _, row in rows for cell in row):
        return None
    threat = group.experiment.threat
    notes = [
        "The epsilon at which FGSM leaves the model the accuracy of this PGD cell: linear between the measured "
        "epsilons, clean images at 0; blank where FGSM leaves it at none of them.",
        f"A correct PGD is never weaker than FGSM at the same epsilon, so no number of ours should be below PGD's "
        f"epsilon, {threat.epsilon:.4g}; and the paper's, which it does not state, is at most the smallest of its "
        f"numbers.",
    ]
    title = f"{group.title}: FGSM-equivalent epsilon of each PGD cell"
    return Table(title, [head(column) for column in columns], rows, notes=notes, groups=groups)
