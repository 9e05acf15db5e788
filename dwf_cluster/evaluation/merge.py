"""Merge shards of the test set into one row of `evaluations` for each model and column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dwf_cluster.store import tables
from dwf_cluster.store.files import Store

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


def unmerged(store: Store, shards: Mapping[str, Sequence[str]]) -> list[str]:
    """Files of `evaluations` that are missing and can be written, because all of their shards exist.

    Args:
        store: holds the tables.
        shards: for each file of `evaluations`, the files of its shards, in the order of the test set.
    """
    written, merged = tables.files(store, "shards"), tables.files(store, "evaluations")
    return [file for file, parts in shards.items() if file not in merged and written.issuperset(parts)]


def merge(store: Store, shards: Mapping[str, Sequence[str]]) -> None:
    """Write the files of `evaluations` that are missing; arguments as of `unmerged`."""
    for file in unmerged(store, shards):
        rows = tables.read(store, "shards", shards[file]).to_pylist()
        tables.write(store, "evaluations", file, merged_rows(rows))


def forget(store: Store, files: Iterable[str]) -> None:
    """Remove files of `evaluations` whose shards are about to be computed again."""
    if stale := set(files):
        for file in tables.files(store, "evaluations") & stale:
            tables.remove(store, "evaluations", file)


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
