"""Shards of the test set are merged into one row of `evaluations` for each model and column."""

from __future__ import annotations

from dwf_cluster.evaluation import merge
from dwf_cluster.store import Store, tables

FILES = {"evaluate-benign-paper": ["evaluate-benign-paper-0", "evaluate-benign-paper-24"]}


def _shard(store: Store, number: int, first: int, correct: int) -> None:
    row = {"model": "benign", "attack": "clean", "family": "paper", "first": first, "examples": 20}
    row |= {"correct": correct, "perturbation": 0.0, "gradients": 0, "seconds": 1.0}
    tables.write(store, "shards", FILES["evaluate-benign-paper"][number], [row])


def test_a_missing_file_is_merged_once_all_shards_exist(store: Store) -> None:
    _shard(store, 0, 0, 5)
    assert merge.unmerged(store, FILES) == []
    _shard(store, 1, 24, 10)
    assert merge.unmerged(store, FILES) == list(FILES)
    merge.merge(store, FILES)
    (row,) = tables.read(store, "evaluations").to_pylist()
    assert (row["examples"], row["correct"], row["accuracy"], row["seconds"]) == (40, 15, 0.375, 2.0)
    assert merge.unmerged(store, FILES) == []


def test_shards_that_are_computed_again_are_merged_again(store: Store) -> None:
    for number, first in enumerate((0, 24)):
        _shard(store, number, first, 5)
    merge.merge(store, FILES)
    merge.forget(store, ["evaluate-pgd-1-paper"])
    assert merge.unmerged(store, FILES) == []
    merge.forget(store, FILES)
    _shard(store, 1, 24, 10)
    merge.merge(store, FILES)
    (row,) = tables.read(store, "evaluations").to_pylist()
    assert row["correct"] == 15
