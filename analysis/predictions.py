"""The predictions of a group, read in one pass: which model classifies which image correctly, gate weights, and what
the defended model answers and how sure it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from analysis.columns import CELL_FIELDS, COLUMN_FIELDS, ColumnKey
from analysis.results import Group

_ROWS = 1 << 17
"""Rows in memory at once: enough to be fast, few enough that ten million rows fit on any laptop."""

BINS = 15
"""Bins of equal width that the top probability is counted in, as in Guo et al. 2017."""

_ANSWERED = ("clean", "worst_case", "pgd_restarts")
"""Attacks for which the answers of the defended model are counted: clean images, and the worst case."""


@dataclass(frozen=True)
class Answers:
    """What the defended model answers in one column, and how sure it is.

    Attributes:
        confusion: `seed` (index in `Group.seeds`), `label`, `prediction` and `images`, the number of them.
        bins: for each seed and bin of the top probability, shape (seeds, BINS, 3): images, sum of their top
            probabilities, images that are classified correctly. Bin m has the probabilities above m / BINS, up to
            (m + 1) / BINS.
        unrated: images without a top probability, which earlier versions did not store.
    """

    confusion: pd.DataFrame
    bins: NDArray[np.float64]
    unrated: int


@dataclass(frozen=True)
class Predictions:
    """The predictions of a group's models for the test images.

    Attributes:
        correct: for each model and column an array of shape (seeds, examples): 1 correct, 0 wrong, -1 not tested.
        gates: for each column a frame of the defended model's gate with one row a label, over all seeds: `examples`,
            `entropy` (summed over them, bits) and a column for each expert (its weights, summed). Empty if the
            defended model has no gate.
        answers: of the defended model, on clean images and in the columns of the worst case.
    """

    correct: Mapping[tuple[str, ColumnKey], NDArray[np.int8]]
    gates: Mapping[ColumnKey, pd.DataFrame]
    answers: Mapping[ColumnKey, Answers] = field(default_factory=dict)


def read_predictions(group: Group) -> Predictions:
    """Read the predictions of all seeds, a limited number of rows at a time.

    Raises:
        InvalidInput: if a file cannot be read.
    """
    shards: dict[tuple[str, ColumnKey], list[tuple[int, NDArray[np.int32], NDArray[np.bool_]]]] = {}
    gates: dict[ColumnKey, pd.DataFrame] = {}
    answers: dict[ColumnKey, _AnswerSums] = {}
    names = [*CELL_FIELDS, "example", "label", "prediction", "confidence", "gate"]
    for seed, run in enumerate(group.runs):
        for rows in run.batches("predictions", names, _ROWS):
            example = rows["example"].to_numpy().astype(np.int32)
            label, prediction = rows["label"].to_numpy(), rows["prediction"].to_numpy()
            correct = label == prediction
            confidence = rows["confidence"].to_numpy()  # null becomes NaN
            gate = rows["gate"].combine_chunks()
            for model, key, index in _cells(rows):
                shards.setdefault((model, key), []).append((seed, example[index], correct[index]))
                if model == group.defended and group.experts:
                    sums = _gate_sums(gate.take(pa.array(index)), label[index], group.experts)
                    if len(sums):
                        gates[key] = sums.add(gates[key], fill_value=0) if key in gates else sums
                if model == group.defended and key.attack in _ANSWERED:
                    sums_of_key = answers.setdefault(key, _AnswerSums(len(group.runs)))
                    sums_of_key.add(seed, label[index], prediction[index], confidence[index])
    counted = {key: sums.answers() for key, sums in answers.items()}
    return Predictions(_assembled(shards, len(group.runs)), gates, counted)


class _AnswerSums:
    """Counts of the answers in one column, over batches of rows."""

    def __init__(self, seeds: int) -> None:
        self._confusion: list[pd.DataFrame] = []
        self._bins = np.zeros((seeds, BINS, 3))
        self._unrated = 0

    def add(
        self, seed: int, label: NDArray[np.int64], prediction: NDArray[np.int64], confidence: NDArray[np.float32]
    ) -> None:
        frame = pd.DataFrame({"seed": seed, "label": label, "prediction": prediction})
        self._confusion.append(frame.value_counts(sort=False).rename("images").reset_index())
        is_rated = ~np.isnan(confidence)
        self._unrated += int((~is_rated).sum())
        rated = confidence[is_rated].astype(np.float64)
        bins = np.clip(np.ceil(rated * BINS).astype(np.int64) - 1, 0, BINS - 1)
        correct = (label == prediction)[is_rated].astype(np.float64)
        for i, weights in enumerate((np.ones_like(rated), rated, correct)):
            self._bins[seed, :, i] += np.bincount(bins, weights, BINS)

    def answers(self) -> Answers:
        """The sums of all batches."""
        counts = pd.concat(self._confusion).groupby(["seed", "label", "prediction"]).images.sum()
        return Answers(counts.reset_index(), self._bins, self._unrated)


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
