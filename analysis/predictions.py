"""The predictions of a group, read in one pass: which model classifies which image correctly, and gate weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.columns import CELL_FIELDS, COLUMN_FIELDS, ColumnKey
from analysis.results import Group

_ROWS = 1 << 17
"""Rows in memory at once: enough to be fast, few enough that ten million rows fit on any laptop."""


@dataclass(frozen=True)
class Predictions:
    """The predictions of a group's models for the test images.

    Attributes:
        correct: for each model and column an array of shape (seeds, examples): 1 correct, 0 wrong, -1 not tested.
        gates: for each column a frame of the defended model's gate with one row a label, over all seeds: `examples`,
            `entropy` (summed over them, bits) and a column for each expert (its weights, summed). Empty if the
            defended model has no gate.
    """

    correct: Mapping[tuple[str, ColumnKey], NDArray[np.int8]]
    gates: Mapping[ColumnKey, pd.DataFrame]


def read_predictions(group: Group) -> Predictions:
    """Read the predictions of all seeds, a limited number of rows at a time.

    Raises:
        InvalidInput: if a file cannot be read.
    """
    shards: dict[tuple[str, ColumnKey], list[tuple[int, NDArray[np.int32], NDArray[np.bool_]]]] = {}
    gates: dict[ColumnKey, pd.DataFrame] = {}
    for seed, run in enumerate(group.runs):
        for rows in run.batches("predictions", [*CELL_FIELDS, "example", "label", "prediction", "gate"], _ROWS):
            example = rows["example"].to_numpy().astype(np.int32)
            label = rows["label"].to_numpy()
            correct = label == rows["prediction"].to_numpy()
            gate = rows["gate"].combine_chunks()
            for model, key, index in _cells(rows):
                shards.setdefault((model, key), []).append((seed, example[index], correct[index]))
                if model == group.defended and group.experts:
                    sums = _gate_sums(gate.take(pa.array(index)), label[index], group.experts)
                    if len(sums):
                        gates[key] = sums.add(gates[key], fill_value=0) if key in gates else sums
    return Predictions(_assembled(shards, len(group.runs)), gates)


def _assembled(
    shards: Mapping[tuple[str, ColumnKey], list[tuple[int, NDArray[np.int32], NDArray[np.bool_]]]], seeds: int
) -> dict[tuple[str, ColumnKey], NDArray[np.int8]]:
    examples = max((int(example.max()) + 1 for parts in shards.values() for _, example, _ in parts), default=0)
    arrays = {}
    for cell, parts in shards.items():
        arrays[cell] = np.full((seeds, examples), -1, np.int8)
        for seed, example, correct in parts:
            arrays[cell][seed, example] = correct
    return arrays


def _cells(rows: pa.Table) -> Iterator[tuple[str, ColumnKey, NDArray[np.int64]]]:
    """Each model and column, with the indices of its rows."""
    numbered = rows.select(CELL_FIELDS).append_column("row", pa.array(np.arange(len(rows))))
    grouped = numbered.group_by(CELL_FIELDS, use_threads=False).aggregate([("row", "list")])
    for i, cell in enumerate(grouped.select(CELL_FIELDS).to_pylist()):
        index = grouped["row_list"][i].values.to_numpy()
        yield cell["model"], ColumnKey(*(cell[field] for field in COLUMN_FIELDS)), index


def _gate_sums(gates: pa.ListArray, label: NDArray[np.int64], experts: tuple[str, ...]) -> pd.DataFrame:
    """Sums over the rows with a gate, one row for each label: a column an expert, `entropy` (bits) and `examples`."""
    valid = gates.is_valid().to_numpy(zero_copy_only=False)
    weights = pc.list_flatten(gates).to_numpy().reshape(-1, len(experts))
    entropy = -np.sum(weights * np.log2(np.maximum(weights, 1e-30)), axis=1)
    frame = pd.DataFrame(weights, columns=list(experts)).assign(entropy=entropy, examples=1.0)
    return frame.groupby(label[valid]).sum()
