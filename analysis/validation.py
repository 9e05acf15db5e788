"""What the rows of a table may hold, checked once where they are read, so that nothing behind it meets a surprise.

Files in a table's folder can be anybody's: another tool's Parquet, another experiment's, a damaged one. The first value
that no run writes is named, with what is allowed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from dwf_cluster.data.registry import DATASETS
from dwf_cluster.experiment import Experiment
from dwf_cluster.settings import InvalidInput, printable

MAX_EXAMPLES = 10_000_000
"""Test images of a data set that is read from a file; of the others the number is known."""

_FINITE = sys.float_info.max
_COUNT = (0, 1e15)
_SHARE = (0, 1)

Range = tuple[float, float]

_REQUIRED = {
    "evaluations": ("model", "attack", "examples", "correct", "accuracy"),
    "predictions": ("model", "attack", "example", "label", "prediction"),
    "metrics": ("model", "epoch", "seconds"),
    "checks": ("model", "check", "fired"),
    "jobs": ("model", "stage"),
    "shards": ("model", "attack", "first", "examples", "correct"),
}
"""Columns without which a row means nothing; in others null stands for what has no meaning, or was not recorded."""

_RANGES: Mapping[str, Range] = {
    "epsilon": (0, 1000),
    "step_size": (0, 1000),
    "steps": _COUNT,
    "restarts": _COUNT,
    "eot": _COUNT,
    "correct": _COUNT,
    "first": _COUNT,
    "accuracy": _SHARE,
    "accuracy_low": _SHARE,
    "accuracy_high": _SHARE,
    "clean_accuracy": _SHARE,
    "probe_pgd_accuracy": _SHARE,
    "label": (0, 9999),
    "prediction": (0, 9999),
    "epoch": (1, 1e9),
    "loss": (-_FINITE, _FINITE),
    "seconds": (0, _FINITE),
    "gpus": (0, 1e6),
    "gradients": (0, _FINITE),
    "perturbation": (0, _FINITE),
}
"""Smallest and largest value of a number, ends included. A range of its own: `examples` and `example`."""


def validate(rows: pa.Table, table: str, experiment: Experiment, models: Sequence[str] | None) -> None:
    """Check rows of one experiment's table.

    Args:
        rows: some or all columns, of the types of `SCHEMAS`.
        table: that they are of.
        experiment: that they must belong to.
        models: of the experiment, in any order; None: not known, another version has written it.

    Raises:
        InvalidInput: that names the first column, value and what is allowed.
    """
    try:
        rows.validate(full=True)  # text that is no UTF-8
    except pa.ArrowInvalid as error:
        raise InvalidInput(printable(error, 200)) from None
    names = set(rows.column_names)
    for name in _REQUIRED[table]:
        if name in names and rows[name].null_count:
            raise InvalidInput(f"{name}: null cannot be used")
    if "seed" in names:
        _among(rows, "seed", [experiment.seed])
    for name in ("model", "source"):
        if models is not None and name in names:
            _among(rows, name, (*models, None))  # null in `model` has been refused above
    largest = _max_examples(experiment)
    ranges = {**_RANGES, "examples": (1, largest), "example": (0, largest - 1)}
    for name in rows.column_names:
        if name in ranges:
            _within(rows, name, ranges[name])
    if {"correct", "examples"} <= names:
        _none(rows, "correct", pc.greater(rows["correct"], rows["examples"]), "at most examples")
    if "gate" in names:
        _gates(rows, experiment.defended.networks)
    if table == "evaluations" and {"model", "attack", "source", "epsilon", "steps"} <= names:
        _once(rows, ["model", "attack", "source", "epsilon", "steps"])


def _max_examples(experiment: Experiment) -> int:
    data = experiment.data
    return data.test_examples or (DATASETS[data.source].test if data.source in DATASETS else MAX_EXAMPLES)


def _among(rows: pa.Table, name: str, allowed: Sequence[object]) -> None:
    values = pa.array(allowed, rows.schema.field(name).type)
    shown = ", ".join(str(value) for value in allowed if value is not None)
    _none(rows, name, pc.invert(pc.is_in(rows[name], values)), shown)


def _within(rows: pa.Table, name: str, allowed: Range) -> None:
    low, high = allowed
    values = rows[name].cast(pa.float64(), safe=False)
    inside = pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high))  # NaN is neither
    _none(rows, name, pc.invert(inside), f"{low:.15g} to {high:.15g}")


def _none(rows: pa.Table, name: str, wrong: pa.ChunkedArray, allowed: str) -> None:
    """Refuse the column if any of its values is wrong."""
    where = pc.index(wrong, True).as_py()
    if where >= 0:
        value = printable(rows[name][where].as_py(), 80)
        raise InvalidInput(f"{name}: {value!r} cannot be used: allowed is {printable(allowed, 200)}")


def _gates(rows: pa.Table, experts: int) -> None:
    gates = rows["gate"]
    lengths = pc.list_value_length(gates)
    wrong = pc.index(pc.not_equal(lengths, experts), True).as_py()
    if wrong >= 0:
        raise InvalidInput(f"gate: {lengths[wrong].as_py()} weights cannot be used: the mixture has {experts} experts")
    weights = pc.list_flatten(gates)
    inside = pc.and_(pc.greater_equal(weights, 0), pc.less_equal(weights, 1.001))  # rounded sums
    if weights.null_count or not pc.all(inside, min_count=0).as_py():
        raise InvalidInput("gate: weights outside 0 to 1 cannot be used")


def _once(rows: pa.Table, keys: Sequence[str]) -> None:
    counted = rows.select(keys).group_by(keys, use_threads=False).aggregate([([], "count_all")])
    twice = pc.index(pc.greater(counted["count_all"], 1), True).as_py()
    if twice >= 0:
        which = ", ".join(str(counted[key][twice].as_py()) for key in keys if counted[key][twice].is_valid)
        raise InvalidInput(f"model: {printable(which, 80)!r} cannot be used twice: allowed is one row for each column")
