"""From slices of the test set to one row of `evaluations` for each model and column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dwf_cluster.store import tables
from dwf_cluster.store.files import Store


def unmerged(store: Store, families: Mapping[str, Sequence[str]]) -> list[str]:
    """Files of `evaluations` that are missing and can be written, because all of their shards exist.

    Args:
        store: holds the tables.
        families: for each file of `evaluations`, the files of its shards, in the order of the test set.
    """
    shards, merged = tables.files(store, "shards"), tables.files(store, "evaluations")
    return [file for file, parts in families.items() if file not in merged and shards.issuperset(parts)]


def merge(store: Store, families: Mapping[str, Sequence[str]]) -> None:
    """Write the files of `evaluations` that are missing; arguments as of `unmerged`."""
    for file in unmerged(store, families):
        rows = tables.read(store, "shards", families[file]).to_pylist()
        tables.write(store, "evaluations", file, _summed(rows))


def forget(store: Store, files: Iterable[str]) -> None:
    """Remove files of `evaluations` whose shards are about to be made anew."""
    if stale := set(files):
        for file in tables.files(store, "evaluations") & stale:
            tables.remove(store, "evaluations", file)


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
