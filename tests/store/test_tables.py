"""Parquet tables: fixed schemas, rows replaced and never doubled, readable with plain pandas."""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
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


def test_a_file_that_is_written_again_replaces_its_rows(store: Store, tiny: Experiment) -> None:
    for losses in ([3.0, 2.0], [1.0]):
        rows = [_row(tiny, epoch, loss) for epoch, loss in enumerate(losses, start=1)]
        tables.write(store, "metrics", "pgd-1", rows)
    assert [(row["epoch"], row["loss"]) for row in tables.read(store, "metrics").to_pylist()] == [(1, 1.0)]


def test_rows_belong_to_the_experiment_that_writes_them_whatever_they_said_before(tiny: Experiment) -> None:
    other = tiny.model_copy(update={"seed": 7})
    (row,) = tables.rows_of(tiny, [{"epoch": 1}])
    assert (row["experiment"], row["seed"], row["epoch"]) == (other.signature, 7, 1)


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
            "remove it, and the same command computes it again",
            str(failed.value),
        )


@pytest.mark.parametrize("table", tables.SCHEMAS)
def test_a_folder_in_the_place_of_a_file_is_named(store: Store, table: str) -> None:
    tables.write(store, table, "whole", [])
    Path(store.path(f"results/{table}/joint.parquet")).mkdir()
    said = rf"results/{table}/joint\.parquet: not the Parquet file that was written \(it is a folder\); remove it, "
    for look in (lambda: tables.read(store, table), lambda: tables.count(store)):
        with pytest.raises(StorageFailed, match=said):
            look()


def test_rows_of_an_older_version_lack_what_it_did_not_know(store: Store, tiny: Experiment) -> None:
    tables.write(store, "jobs", "joint", [{"task": "joint", "devices": ["n1: cpu"]}])
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


def test_rows_are_counted_without_reading_the_files_whole(
    store: Store, tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_copied_rows_are_the_other_experiments_with_what_is_changed(store: Store, tiny: Experiment) -> None:
    tables.write(store, "metrics", "pgd-1", [_row(tiny, 1, 0.5), _row(tiny, 2, 0.25)])
    other = build("digits", 7, [*TINY])
    own = other.store(store.url)
    tables.copy(store, own, other, "metrics", "pgd-1", stage="joint")
    rows = tables.read(own, "metrics").to_pylist()
    assert [(row["epoch"], row["loss"], row["stage"]) for row in rows] == [(1, 0.5, "joint"), (2, 0.25, "joint")]
    assert {(row["experiment"], row["seed"], row["dataset"]) for row in rows} == {(other.signature, 7, "digits")}
