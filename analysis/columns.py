"""The key of a column: the fields that identify one attack at one strength in every table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pandas as pd

from dwf_cluster.evaluation.registry import Column


class ColumnKey(NamedTuple):
    """The fields that identify a column within an experiment; None where a field has no meaning."""

    attack: str
    source: str | None
    norm: str | None
    epsilon: float | None
    steps: int | None


COLUMN_FIELDS = list(ColumnKey._fields)
"""The key's fields, as columns of every table."""

CELL_FIELDS = ["model", *COLUMN_FIELDS]
"""The fields that identify a cell of the result table: a model in a column."""


def column_key(column: Column) -> ColumnKey:
    """The key of a column."""
    return ColumnKey(column.attack, column.source, column.norm, column.epsilon, column.steps)


def key_of_row(row: Any) -> ColumnKey:
    """The key of a frame's row, in which a field without meaning is NaN."""
    fields = (row.source, row.norm, row.epsilon, row.steps)
    source, norm, epsilon, steps = (None if pd.isna(value) else value for value in fields)
    return ColumnKey(row.attack, source, norm, epsilon, None if steps is None else int(steps))


def column_name(column: Column) -> str:
    """The title of a column on one line."""
    return " ".join(column.title.split())


def each(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows of a frame, with its columns as attributes (whose names no type checker can see)."""
    yield from frame.itertuples(index=False)
