"""The predictions of a group in one pass: who was right on which image, and what the gate trusted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.results import ColumnKey, Group

_KEYS = ["model", "attack", "source", "epsilon", "steps"]
_ROWS = 1 << 17
"""Rows in memory at once: enough to be fast, few enough that ten million fit on any laptop."""


@dataclass(frozen=True)
class Predictions:
    """What the models of a group did with the test images.

    Attributes:
        correct: for each model and column an array of shape (seeds, examples): 1 right, 0 wrong, -1 not tested.
        gates: for each column a frame with one row a label, over all seeds: `examples`, `entropy` (summed over
            them, bits) and a column for each expert (its weights, summed).
    """

    correct: Mapping[tuple[str, ColumnKey], NDArray[np.int8]]
    gates: Mapping[ColumnKey, pd.DataFrame]


def read_predictions(group: Group) -> Predictions:
    """Read the predictions of all seeds, some rows at a time.

    Raises:
        InvalidInput: if a file cannot be read.
    """
    found: dict[tuple[str, ColumnKey], list[tuple[int, NDArray[np.int32], NDArray[np.bool_]]]] = {}
    gates: dict[ColumnKey, pd.DataFrame] = {}
    for seed, run in enumerate(group.runs):
        for rows in run.batches("predictions", [*_KEYS, "example", "label", "prediction", "gate"], _ROWS):
            example = rows["example"].to_numpy().astype(np.int32)
            label = rows["label"].to_numpy()
            right = label == rows["prediction"].to_numpy()
            gate, entropy, at = _gates(rows["gate"].combine_chunks(), len(group.experts))
            for model, place, index in _columns(rows):
                found.setdefault((model, place), []).append((seed, example[index], right[index]))
                weighed = index[at[index] >= 0]
                if len(weighed):
                    of = pd.DataFrame(gate[at[weighed]], columns=list(group.experts))
                    sums = of.assign(entropy=entropy[at[weighed]], examples=1.0).groupby(label[weighed]).sum()
                    gates[place] = sums.add(gates[place], fill_value=0) if place in gates else sums
    examples = max((int(example.max()) + 1 for parts in found.values() for _, example, _ in parts), default=0)
    correct = {}
    for key, parts in found.items():
        correct[key] = np.full((len(group.runs), examples), -1, np.int8)
        for seed, example, right in parts:
            correct[key][seed, example] = right
    return Predictions(correct, gates)


def _columns(rows: pa.Table) -> Iterator[tuple[str, ColumnKey, NDArray[np.int64]]]:
    """Models and columns, and which rows are theirs."""
    numbered = rows.select(_KEYS).append_column("row", pa.array(np.arange(len(rows))))
    found = numbered.group_by(_KEYS, use_threads=False).aggregate([("row", "list")])
    for i, key in enumerate(found.select(_KEYS).to_pylist()):
        index = found["row_list"][i].values.to_numpy()
        yield key["model"], (key["attack"], key["source"], key["epsilon"], key["steps"]), index


def _gates(column: pa.ListArray, experts: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
    """Weights, shape (rows with a gate, experts), their entropies in bits, and where each row has them or -1."""
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    weights = pc.list_flatten(column).to_numpy().reshape(-1, experts)
    entropy = -np.sum(weights * np.log2(np.maximum(weights, 1e-30)), axis=1)
    return weights, entropy, np.where(valid, np.cumsum(valid) - 1, -1)
