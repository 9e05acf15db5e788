"""From slices of the test set to one row of `evaluations` for each model and column."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dwf_cluster.store import tables
from dwf_cluster.store.files import Store


def merge(store: Store, families: Mapping[str, Sequence[str]]) -> None:
    """Write the rows of `evaluations`, in the order of the test set, of each family whose shards are all there.

    Args:
        store: holds the table `shards`.
        families: for each file to write, the files of its shards, in the order of the test set.
    """
    there, merged = tables.files(store, "shards"), tables.files(store, "evaluations")
    for file, parts in families.items():
        if file not in merged and there.issuperset(parts):
            tables.write(store, "evaluations", file, _summed(tables.read(store, "shards", parts).to_pylist()))


def _summed(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    from scipy.stats import binomtest  # slow to import; not needed where all is done

    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
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
    return list(merged.values())
