"""Parquet tables: fixed schemas, rows replaced and never doubled, readable with plain pandas."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import pandas as pd
import pytest

from dwf_cluster.experiment import Experiment, build
from dwf_cluster.store import StorageFailed, Store, tables

from ..conftest import TINY


def _row(experiment: Experiment, epoch: int, loss: float) -> dict[str, object]:
    (row,) = tables.rows_of(experiment, [{"stage": "experts", "model": "pgd-1", "epoch": epoch, "loss": loss}])
    return row


def test_the_contracts_columns_are_there() -> None:
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


def test_a_row_of_the_same_key_is_replaced(store: Store, tiny: Experiment) -> None:
    for epoch, loss in [(1, 3.0), (2, 2.0), (1, 1.0)]:
        tables.upsert(store, "metrics", "pgd-1", _row(tiny, epoch, loss), key="epoch")
    rows = tables.read(store, "metrics").to_pylist()
    assert [(row["epoch"], row["loss"]) for row in rows] == [(1, 1.0), (2, 2.0)]


def test_pandas_reads_a_table_of_several_files(store: Store, tiny: Experiment) -> None:
    for model in ("pgd-1", "pgd-2"):
        tables.write(store, "metrics", model, [{**_row(tiny, 1, 1.0), "model": model}])
    frame = pd.read_parquet(store.path("results/metrics"))
    assert sorted(frame.model) == ["pgd-1", "pgd-2"]
    assert set(frame.dataset) == {"digits"}


def test_a_column_outside_the_schema_is_an_error(store: Store) -> None:
    with pytest.raises(KeyError, match="colour"):
        tables.write(store, "metrics", "pgd-1", [{"colour": 1}])


def test_an_unfinished_file_is_not_read(store: Store, tiny: Experiment) -> None:
    tables.write(store, "metrics", "pgd-1", [_row(tiny, 1, 1.0)])
    Path(store.path("results/metrics/.pgd-2.parquet.1.unfinished")).write_bytes(b"PAR1half")
    assert len(pd.read_parquet(store.path("results/metrics"))) == 1
    assert tables.read(store, "metrics").num_rows == 1


def test_a_file_that_is_not_what_was_written_is_named(store: Store, tiny: Experiment) -> None:
    tables.write(store, "metrics", "pgd-1", [_row(tiny, 1, 1.0)])
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
            "remove it, and it is made anew",
            str(failed.value),
        )


def test_rows_of_an_older_version_lack_what_it_did_not_know(store: Store, tiny: Experiment) -> None:
    tables.write(store, "jobs", "joint", tables.rows_of(tiny, [{"task": "joint", "devices": ["n1: cpu"]}]))
    old = pd.read_parquet(store.path("results/jobs/joint.parquet")).drop(columns="devices")
    old.to_parquet(store.path("results/jobs/joint.parquet"))
    (row,) = tables.read(store, "jobs").to_pylist()
    assert (row["task"], row["devices"]) == ("joint", None)


def test_rows_are_counted_and_other_experiments_are_not_looked_at(store: Store, tiny: Experiment) -> None:
    for model in ("pgd-1", "pgd-2"):
        tables.write(store, "metrics", model, [_row(tiny, epoch, 1.0) for epoch in (1, 2, 3)])
    other = Store(store.url, "digits-seed1-0123456789")
    other.write("results/metrics/pgd-1.parquet", b"not to be opened")
    assert tables.count(store) == {**dict.fromkeys(tables.SCHEMAS, 0), "metrics": 6}
    assert tables.read(store, "metrics").num_rows == 6


def test_copied_rows_are_the_other_experiments_with_what_is_changed(store: Store, tiny: Experiment) -> None:
    tables.write(store, "metrics", "pgd-1", [_row(tiny, 1, 0.5), _row(tiny, 2, 0.25)])
    other = build("digits", 7, [*TINY])
    own = Store(store.url, other.folder)
    tables.copy(store, own, other, "metrics", "pgd-1", stage="joint")
    rows = tables.read(own, "metrics").to_pylist()
    assert [(row["epoch"], row["loss"], row["stage"]) for row in rows] == [(1, 0.5, "joint"), (2, 0.25, "joint")]
    assert {(row["experiment"], row["seed"], row["dataset"]) for row in rows} == {(other.signature, 7, "digits")}
