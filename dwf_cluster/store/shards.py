"""From slices of the test set to one row of `evaluations` for each model and column."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dwf_cluster.store import tables
from dwf_cluster.store.files import Store


def merge(store: Store, file: str, shards: Sequence[str]) -> None:
    """Write a family's rows of `evaluations`, in the order of the test set, if all its shards are there.

    Args:
        store: holds the table `shards`.
        file: to write.
        shards: files of the family's shards, in the order of the test set.
    """
    if tables.exists(store, "evaluations", file) or not all(tables.exists(store, "shards", f) for f in shards):
        return
    from scipy.stats import binomtest  # slow to import; not needed where all is done

    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in tables.read(store, "shards", shards).to_pylist():
        key = tuple(row[name] for name, _ in tables.COLUMN)
        if key not in merged:
            merged[key] = {name: value for name, value in row.items() if name not in ("family", "first")}
            continue
        sums = merged[key]
        for name in ("examples", "correct", "gradients", "seconds"):
            sums[name] += row[name]
        sums["perturbation"] = max(sums["perturbation"], row["perturbation"])
    for row in merged.values():
        interval = binomtest(row["correct"], row["examples"]).proportion_ci(confidence_level=0.95, method="wilson")
        row["accuracy"] = row["correct"] / row["examples"]
        row["accuracy_low"], row["accuracy_high"] = float(interval.low), float(interval.high)
    tables.write(store, "evaluations", file, list(merged.values()))
