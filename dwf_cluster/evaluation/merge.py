"""Merge shards of the test set into one row of `evaluations` for each model and column; combine worst cases."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dwf_cluster.evaluation.registry import CHECKS, worst_case_column
from dwf_cluster.evaluation.settings import Threat
from dwf_cluster.evaluation.stronger import stronger
from dwf_cluster.evaluation.worst_case import WorstCaseFile, largest_perturbation, worst_cases
from dwf_cluster.store import tables
from dwf_cluster.store.files import Store

if TYPE_CHECKING:
    import pyarrow as pa

CONFIDENCE = 0.95
"""Confidence level of the interval of every accuracy."""


def wilson(correct: int, examples: int) -> tuple[float, float]:
    """95 % Wilson interval of a share, 0..1 (Wilson 1927).

    Args:
        correct: 0..examples.
        examples: at least 1.

    Raises:
        ValueError: if a count is out of range.
    """
    from scipy.stats import binomtest  # slow to import; not needed where all is done

    interval = binomtest(correct, examples).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def unmerged(store: Store, shards: Mapping[str, Sequence[str]], worst_cases: Sequence[WorstCaseFile] = ()) -> list[str]:
    """Files of `evaluations` that are missing and can be written, because all that they are made of exists.

    A worst case is missing too if its file of `predictions` is.

    Args:
        store: holds the tables.
        shards: for each file of `evaluations`, the files of its shards, in the order of the test set.
        worst_cases: the files of worst cases.
    """
    written, merged = tables.files(store, "shards"), tables.files(store, "evaluations")
    missing = [file for file, parts in shards.items() if file not in merged and written.issuperset(parts)]
    if not worst_cases:
        return missing
    predicted = tables.files(store, "predictions")
    return missing + [
        worst.file
        for worst in worst_cases
        if not (worst.file in merged and worst.file in predicted) and (written & predicted).issuperset(worst.shards)
    ]


def merge(store: Store, shards: Mapping[str, Sequence[str]], worst_cases: Sequence[WorstCaseFile] = ()) -> None:
    """Write the files of `evaluations` that are missing; arguments as of `unmerged`.

    The worst cases come last: `predictions` and the check `stronger` before `evaluations`, whose file says that all
    are complete.
    """
    missing = unmerged(store, shards, worst_cases)
    by_file = {worst.file: worst for worst in worst_cases}
    for file in missing:
        if file in by_file:
            worst = by_file[file]
            shard_rows, predicted = (tables.read(store, table, worst.shards) for table in ("shards", "predictions"))
            rows, predictions = worst_case_rows(shard_rows, predicted, worst.model, worst.threats)
            tables.write(store, "predictions", file, predictions)
            if checks := stronger(predicted, worst.model, worst.threats[0]):
                tables.write(store, CHECKS, worst.check_file, checks)
        else:
            rows = merged_rows(tables.read(store, "shards", shards[file]).to_pylist())
        tables.write(store, "evaluations", file, rows)


def forget(store: Store, files: Iterable[str]) -> None:
    """Remove files of `evaluations` whose shards are about to be computed again, and the `predictions` of worst cases.

    `evaluations` first: without them, a merge writes the worst case again.
    """
    if stale := set(files):
        for table in ("evaluations", "predictions"):
            for file in tables.files(store, table) & stale:
                tables.remove(store, table, file)


def worst_case_rows(
    shards: pa.Table, predictions: pa.Table, model: str, threats: Sequence[Threat]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The worst case of a model over its attacks: rows of `evaluations` and of `predictions`.

    No attack is run, so `gradients` and `seconds` are 0; `perturbation` is the largest of the attacks that count.

    Args:
        shards: rows of the attacks.
        predictions: of the same attacks, in the order of the result table.
        model: name of the model.
        threats: the threat models; one that no attack counts for has no rows.
    """
    rows: list[dict[str, Any]] = []
    every: list[dict[str, Any]] = []
    for threat in threats:
        worst = worst_cases(predictions, model, [threat]).to_pylist()
        if not worst:
            continue
        every += worst
        correct = sum(row["prediction"] == row["label"] for row in worst)
        counts = {"examples": len(worst), "correct": correct, "gradients": 0, "seconds": 0.0}
        counts["perturbation"] = largest_perturbation(shards, model, threat)
        rows.append({"model": model, **worst_case_column(threat).settings, **counts})
    return merged_rows(rows), every


def merged_rows(shards: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `evaluations` from rows of `shards`: counts are added, accuracies get their Wilson interval."""
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in shards:
        key = tuple(row[name] for name, _ in tables.COLUMN)
        if key not in merged:
            merged[key] = {name: value for name, value in row.items() if name not in ("family", "first")}
            continue
        sums = merged[key]
        for name in ("examples", "correct", "gradients", "seconds"):
            sums[name] += row[name]
        sums["perturbation"] = max(sums["perturbation"], row["perturbation"])
    for row in merged.values():
        row["accuracy"] = row["correct"] / row["examples"]
        row["accuracy_low"], row["accuracy_high"] = wilson(row["correct"], row["examples"])
    return list(merged.values())
