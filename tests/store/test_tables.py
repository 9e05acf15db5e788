"""Parquet tables: fixed schemas, labels in every row, rows replaced and never duplicated, readable with pandas."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dwf_cluster.experiment import Experiment
from dwf_cluster.presets import build
from dwf_cluster.store import StorageFailed, Store, tables

from ..conftest import TINY


def _row(epoch: int, loss: float) -> dict[str, object]:
    return {"stage": "experts", "model": "pgd-1", "epoch": epoch, "loss": loss}


def test_each_schema_has_the_columns_that_users_rely_on() -> None:
    common = {"experiment", "preset", "dataset", "seed"}
    columns = {table: set(schema.names) - common for table, schema in tables.SCHEMAS.items()}
    assert all(common <= set(schema.names) for schema in tables.SCHEMAS.values())
    contract = {
        "metrics": "stage model epoch step loss clean_accuracy probe_pgd_accuracy learning_rate images_per_second "
        "seconds device",
        "evaluations": "model attack epsilon step_size steps restarts eot examples correct accuracy accuracy_low "
        "accuracy_high gradients seconds",
        "predictions": "model attack epsilon steps example label prediction margin gate",
        "jobs": "stage model state started finished seconds attempts host device gpus peak_memory_bytes git_commit",
    }
    for table, names in contract.items():
        assert set(names.split()) <= columns[table]


def test_writing_a_file_again_replaces_its_rows(store: Store) -> None:
    for losses in ([3.0, 2.0], [1.0]):
        rows = [_row(epoch, loss) for epoch, loss in enumerate(losses, start=1)]
        tables.write(store, "metrics", "pgd-1", rows)
    assert [(row["epoch"], row["loss"]) for row in tables.read(store, "metrics").to_pylist()] == [(1, 1.0)]


@pytest.mark.parametrize("table", tables.SCHEMAS)
def test_each_row_of_each_table_has_the_stores_labels(store: Store, tiny: Experiment, table: str) -> None:
    tables.write(store, table, "file", [{"model": "pgd-1"}, {"model": "pgd-2"}])
    labels = {"experiment": tiny.signature, "preset": "digits", "dataset": "digits", "seed": 0}
    rows = tables.read(store, table).to_pylist()
    assert [row["model"] for row in rows] == ["pgd-1", "pgd-2"]
    assert [{column: row[column] for column in labels} for row in rows] == [labels, labels]


def test_the_stores_labels_replace_those_that_a_row_has(store: Store, tiny: Experiment) -> None:
    tables.write(store, "metrics", "pgd-1", [{"epoch": 1, "experiment": "0123456789", "seed": 7}])
    (row,) = tables.read(store, "metrics").to_pylist()
    assert (row["experiment"], row["seed"], row["epoch"]) == (tiny.signature, 0, 1)


def test_a_store_without_labels_refuses_to_write_rows(store: Store) -> None:
    tables.write(store, "metrics", "pgd-1", [_row(1, 1.0)])
    reader = Store(store.url, "digits-seed1-0123456789")
    for write in (
        lambda: tables.write(reader, "metrics", "pgd-1", [_row(1, 1.0)]),
        lambda: tables.write(reader, "metrics", "pgd-1", []),
        lambda: tables.copy(store, reader, "metrics", "pgd-1"),
    ):
        with pytest.raises(ValueError, match=rf"{reader.root}: a store without labels cannot write rows"):
            write()
    assert reader.names("") == []


def test_a_store_without_labels_reads_counts_and_removes_rows(store: Store, tiny: Experiment) -> None:
    tables.write(store, "metrics", "pgd-1", [_row(1, 0.5), _row(2, 0.25)])
    reader = Store(store.url, store.folder)
    assert reader.labels is None
    assert [row["experiment"] for row in tables.read(reader, "metrics").to_pylist()] == [tiny.signature] * 2
    assert [row["loss"] for row in tables.metrics_until(reader, "pgd-1", 1)] == [0.5]
    assert tables.files(reader, "metrics") == {"pgd-1"}
    assert tables.count(reader)["metrics"] == 2
    tables.remove(reader, "metrics", "pgd-1")
    assert tables.count(reader)["metrics"] == 0


def test_pandas_reads_all_files_of_a_table(store: Store) -> None:
    for model in ("pgd-1", "pgd-2"):
        tables.write(store, "metrics", model, [{**_row(1, 1.0), "model": model}])
    frame = pd.read_parquet(store.path("results/metrics"))
    assert sorted(frame.model) == ["pgd-1", "pgd-2"]
    assert set(frame.dataset) == {"digits"}


def test_a_row_with_an_unknown_column_is_refused(store: Store) -> None:
    with pytest.raises(KeyError, match="colour"):
        tables.write(store, "metrics", "pgd-1", [{"colour": 1}])


def test_readers_ignore_unfinished_files(store: Store) -> None:
    tables.write(store, "metrics", "pgd-1", [_row(1, 1.0)])
    Path(store.path("results/metrics/.pgd-2.parquet.1.unfinished")).write_bytes(b"PAR1half")
    assert len(pd.read_parquet(store.path("results/metrics"))) == 1
    assert tables.read(store, "metrics").num_rows == 1


def test_reading_a_damaged_file_names_it(store: Store) -> None:
    tables.write(store, "metrics", "pgd-1", [_row(1, 1.0)])
    whole = store.read("results/metrics/pgd-1.parquet")
    assert whole is not None
    other = io.BytesIO()
    pd.DataFrame({"loss": ["high"]}).to_parquet(other)
    for content in (whole[:-9], b"", pickle.dumps({}), other.getvalue()):
        store.write("results/metrics/pgd-1.parquet", content)
        with pytest.raises(StorageFailed) as failed:
            tables.read(store, "metrics")
        assert re.fullmatch(
            r"/\S+/results/metrics/pgd-1\.parquet: not the Parquet file that was written \(.+\); "
            "remove it, and the same command computes it again",
            str(failed.value),
        )


@pytest.mark.parametrize("table", tables.SCHEMAS)
def test_reading_a_folder_in_place_of_a_file_names_it(store: Store, table: str) -> None:
    tables.write(store, table, "whole", [])
    Path(store.path(f"results/{table}/joint.parquet")).mkdir()
    message = rf"results/{table}/joint\.parquet: not the Parquet file that was written \(it is a folder\); remove it, "
    for read in (lambda: tables.read(store, table), lambda: tables.count(store)):
        with pytest.raises(StorageFailed, match=message):
            read()


def test_columns_that_an_older_version_did_not_write_are_null(store: Store) -> None:
    tables.write(store, "jobs", "joint", [{"task": "joint", "devices": ["n1: cpu"]}])
    old = pd.read_parquet(store.path("results/jobs/joint.parquet")).drop(columns="devices")
    old.to_parquet(store.path("results/jobs/joint.parquet"))
    (row,) = tables.read(store, "jobs").to_pylist()
    assert (row["task"], row["devices"]) == ("joint", None)


def test_counting_and_reading_do_not_open_other_experiments_files(store: Store) -> None:
    for model in ("pgd-1", "pgd-2"):
        tables.write(store, "metrics", model, [_row(epoch, 1.0) for epoch in (1, 2, 3)])
    other = Store(store.url, "digits-seed1-0123456789")
    other.write("results/metrics/pgd-1.parquet", b"not a Parquet file")
    assert tables.count(store) == {**dict.fromkeys(tables.SCHEMAS, 0), "metrics": 6}
    assert tables.read(store, "metrics").num_rows == 6


def test_counting_rows_reads_only_the_ends_of_files(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    rows = [{"model": "pgd-1", "example": n, "margin": m} for n, m in enumerate(random.random(50_000))]
    tables.write(store, "predictions", "a", rows)
    size = store.size("results/predictions/a.parquet")
    assert size
    assert size > 100_000
    sizes: list[int] = []
    read_ends = Store.read_ends

    def counted(store: Store, names: Sequence[str], count: int) -> list[bytes | None]:
        ends = read_ends(store, names, count)
        sizes.extend(len(end or b"") for end in ends)
        return ends

    monkeypatch.setattr(Store, "read_ends", counted)
    monkeypatch.setattr(Store, "read", None)
    assert tables.count(store)["predictions"] == 50_000
    assert 0 < sum(sizes) < size / 5


def test_copying_a_file_changes_the_labels_and_the_given_columns(store: Store) -> None:
    tables.write(store, "metrics", "pgd-1", [_row(1, 0.5), _row(2, 0.25)])
    other = build("digits", 7, [*TINY])
    copy = other.store(store.url)
    tables.copy(store, copy, "metrics", "pgd-1", stage="joint")
    rows = tables.read(copy, "metrics").to_pylist()
    assert [(row["epoch"], row["loss"], row["stage"]) for row in rows] == [(1, 0.5, "joint"), (2, 0.25, "joint")]
    assert {(row["experiment"], row["seed"], row["dataset"]) for row in rows} == {(other.signature, 7, "digits")}
