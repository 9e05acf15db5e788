"""Which values the rows of a table may hold. Rows are checked once, where they are read.

A file in a table's folder may come from another tool or another experiment, or may be damaged. The error names the
first value that no run writes, and what is allowed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from analysis.columns import CELL_FIELDS
from dwf_cluster.data.registry import DATASETS
from dwf_cluster.defences.registry import METHODS, OWN_MODEL
from dwf_cluster.experiment import Experiment
from dwf_cluster.settings import InvalidInput, printable

MAX_EXAMPLES = 10_000_000
"""Test images of a data set that is read from a file; for all others the number is known."""

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
"""Columns that may not be null; in others null means that the value has no meaning, or was not recorded."""

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
    "confidence": _SHARE,
    "epoch": (1, 1e9),
    "loss": (-_FINITE, _FINITE),
    "seconds": (0, _FINITE),
    "gpus": (0, 1e6),
    "gradients": (0, _FINITE),
    "perturbation": (0, _FINITE),
}
"""Smallest and largest value, both allowed. Those of `examples` and `example` depend on the data set."""


def validate(rows: pa.Table, table: str, experiment: Experiment, allow_other_models: bool = False) -> None:
    """Check rows of one experiment's table.

    Args:
        rows: some or all columns, with the types of `SCHEMAS`.
        table: the table's name.
        experiment: the experiment that they must belong to.
        allow_other_models: whether there may be rows of models that the experiment does not name.

    Raises:
        InvalidInput: names the first column and value that cannot be used, and what is allowed.
    """
    try:
        rows.validate(full=True)  # finds text that is not UTF-8
    except pa.ArrowInvalid as error:
        raise InvalidInput(printable(error, 200)) from None
    names = set(rows.column_names)
    for name in _REQUIRED[table]:
        if name in names and rows[name].null_count:
            raise InvalidInput(f"{name}: null cannot be used")
    if "seed" in names:
        _among(rows, "seed", [experiment.seed])
    for name in ("model", "source"):
        if name in names and not allow_other_models:
            experts = _expert_names(experiment) if name == "source" else ()
            _among(rows, name, (*experiment.names, *experts, None))  # null in `model` has been refused above
    largest = _max_examples(experiment)
    ranges = {**_RANGES, "examples": (1, largest), "example": (0, largest - 1)}
    for name in rows.column_names:
        if name in ranges:
            _within(rows, name, ranges[name])
    if {"correct", "examples"} <= names:
        _refuse_if(rows, "correct", pc.greater(rows["correct"], rows["examples"]), "at most examples")
    if "gate" in names:
        _gates(rows, experiment)
    if table == "evaluations" and names.issuperset(CELL_FIELDS):
        _refuse_duplicates(rows, CELL_FIELDS)


def _expert_names(experiment: Experiment) -> Sequence[str]:
    """Names of experts that are no models; of a user's own mixture, for no ModelSpec knows how many it has, many."""
    named = dict.fromkeys(name for spec in experiment.models for name in spec.experts if name not in experiment.names)
    return [*named, *(f"expert-{i}" for i in range(1, 101) if experiment.defended.method == OWN_MODEL)]


def _max_examples(experiment: Experiment) -> int:
    data = experiment.data
    return data.test_examples or (DATASETS[data.source].test if data.source in DATASETS else MAX_EXAMPLES)


def _among(rows: pa.Table, name: str, allowed: Sequence[object]) -> None:
    values = pa.array(allowed, rows.schema.field(name).type)
    shown = ", ".join(str(value) for value in allowed if value is not None)
    _refuse_if(rows, name, pc.invert(pc.is_in(rows[name], values)), shown)


def _within(rows: pa.Table, name: str, allowed: Range) -> None:
    low, high = allowed
    values = rows[name].cast(pa.float64(), safe=False)
    inside = pc.and_(pc.greater_equal(values, low), pc.less_equal(values, high))  # NaN is neither
    _refuse_if(rows, name, pc.invert(inside), f"{low:.15g} to {high:.15g}")


def _refuse_if(rows: pa.Table, name: str, wrong: pa.ChunkedArray, allowed: str) -> None:
    """Refuse the column if any of its values is wrong."""
    row = pc.index(wrong, True).as_py()
    if row >= 0:
        value = printable(rows[name][row].as_py(), 80)
        raise InvalidInput(f"{name}: {value!r} cannot be used: allowed is {printable(allowed, 200)}")


def _gates(rows: pa.Table, experiment: Experiment) -> None:
    """Refuse gate weights that are not one for each expert, or not shares; null where a model has no gate."""
    gates = rows["gate"]
    lengths = pc.list_value_length(gates)
    for spec in experiment.models:
        if METHODS[spec.method].has_gate:
            wrong = pc.not_equal(lengths, spec.networks)
            if "model" in rows.column_names:
                wrong = pc.and_(wrong, pc.equal(rows["model"], spec.name))
            row = pc.index(wrong, True).as_py()
            if row >= 0:
                count = lengths[row].as_py()
                raise InvalidInput(f"gate: {count} weights cannot be used: {spec.name} has {spec.networks} experts")
    weights = pc.list_flatten(gates)
    inside = pc.and_(pc.greater_equal(weights, 0), pc.less_equal(weights, 1.001))  # sums are rounded
    if weights.null_count or not pc.all(inside, min_count=0).as_py():
        raise InvalidInput("gate: weights outside 0 to 1 cannot be used")


def _refuse_duplicates(rows: pa.Table, keys: Sequence[str]) -> None:
    counts = rows.select(keys).group_by(keys, use_threads=False).aggregate([([], "count_all")])
    row = pc.index(pc.greater(counts["count_all"], 1), True).as_py()
    if row >= 0:
        cell = ", ".join(str(counts[key][row].as_py()) for key in keys if counts[key][row].is_valid)
        raise InvalidInput(f"model: {printable(cell, 80)!r} cannot be used twice: allowed is one row for each column")
