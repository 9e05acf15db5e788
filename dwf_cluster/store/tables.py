"""The Parquet tables: their schemas, and rows that are replaced and never duplicated.

A table is the folder `results/<table>/` with one file for each job (`metrics`: for each model), so no two tasks write
to the same file, and `pandas.read_parquet(folder)` reads all of them. A writer has all rows of its file in memory and
always writes the whole file.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dwf_cluster.store.files import Store
from dwf_cluster.store.retry import NotAFile, StorageFailed

_LABELS = [("experiment", pa.string()), ("preset", pa.string()), ("dataset", pa.string()), ("seed", pa.int64())]
_time = pa.timestamp("us", tz="UTC")

_FOOTER = 16_384
"""Bytes at the end of a file that contain its footer, with the number of rows: four times the longest one so far."""


def _schema(*fields: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([*_LABELS, *fields])


COLUMN = [
    ("model", pa.string()),
    ("attack", pa.string()),
    ("source", pa.string()),
    ("norm", pa.string()),
    ("epsilon", pa.float64()),
    ("step_size", pa.float64()),
    ("steps", pa.int64()),
    ("restarts", pa.int64()),
    ("eot", pa.int64()),
]
"""The key of `evaluations`: no two rows of an experiment agree in all of these."""

_COST = [
    ("perturbation", pa.float64()),
    ("gradients", pa.int64()),
    ("seconds", pa.float64()),
]

SCHEMAS: Mapping[str, pa.Schema] = {
    "metrics": _schema(
        ("stage", pa.string()),
        ("model", pa.string()),
        ("epoch", pa.int64()),
        ("step", pa.int64()),
        ("loss", pa.float64()),
        ("clean_accuracy", pa.float64()),
        ("probe_pgd_accuracy", pa.float64()),
        ("learning_rate", pa.float64()),
        ("images_per_second", pa.float64()),
        ("seconds", pa.float64()),
        ("device", pa.string()),
        ("probe_split", pa.string()),
        ("kept", pa.bool_()),
        ("expert_shares", pa.list_(pa.float32())),
    ),
    "evaluations": _schema(
        *COLUMN,
        ("examples", pa.int64()),
        ("correct", pa.int64()),
        ("accuracy", pa.float64()),
        ("accuracy_low", pa.float64()),
        ("accuracy_high", pa.float64()),
        *_COST,
    ),
    "shards": _schema(
        *COLUMN,
        ("family", pa.string()),
        ("first", pa.int64()),
        ("examples", pa.int64()),
        ("correct", pa.int64()),
        *_COST,
    ),
    "predictions": _schema(
        ("model", pa.string()),
        ("attack", pa.string()),
        ("source", pa.string()),
        ("norm", pa.string()),
        ("epsilon", pa.float64()),
        ("steps", pa.int64()),
        ("example", pa.int64()),
        ("label", pa.int64()),
        ("prediction", pa.int64()),
        ("margin", pa.float32()),
        ("confidence", pa.float32()),
        ("gate", pa.list_(pa.float32())),
    ),
    "checks": _schema(
        ("model", pa.string()),
        ("check", pa.string()),
        ("value", pa.float64()),
        ("limit", pa.float64()),
        ("fired", pa.bool_()),
        ("meaning", pa.string()),
        ("p", pa.float64()),
        ("could_fire", pa.bool_()),
        ("examples", pa.int64()),
    ),
    "jobs": _schema(
        ("stage", pa.string()),
        ("model", pa.string()),
        ("task", pa.string()),
        ("state", pa.string()),
        ("started", _time),
        ("finished", _time),
        ("seconds", pa.float64()),
        ("attempts", pa.int64()),
        ("host", pa.string()),
        ("device", pa.string()),
        ("devices", pa.list_(pa.string())),
        ("gpus", pa.float64()),
        ("peak_memory_bytes", pa.int64()),
        ("python_version", pa.string()),
        ("torch_version", pa.string()),
        ("ray_version", pa.string()),
        ("dwf_cluster_version", pa.string()),
        ("git_commit", pa.string()),
        ("note", pa.string()),
        ("cudnn_version", pa.string()),
        ("tf32", pa.bool_()),
    ),
}


MAX_ROWS = {"predictions": 50_000_000}
MAX_ROWS_ELSEWHERE = 1_000_000
MAX_FILE_BYTES = 2 << 30
"""Limits of one file: a few kilobytes on a disk can decompress to more than the memory."""


def refuse_large(table: str, metadata: pq.FileMetaData) -> None:
    """Refuse a file that is too large, by its footer, before its rows are read.

    Raises:
        pa.ArrowInvalid: if the file has more rows or bytes than a file of this table may have.
    """
    rows, largest = metadata.num_rows, MAX_ROWS.get(table, MAX_ROWS_ELSEWHERE)
    if rows > largest:
        raise pa.ArrowInvalid(f"{rows} rows, allowed are {largest}")
    size = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    if size > MAX_FILE_BYTES:
        raise pa.ArrowInvalid(f"{size} bytes decompressed, allowed are {MAX_FILE_BYTES}")


def folder(table: str) -> str:
    """A table's folder below the experiment's."""
    return f"results/{table}"


def write(store: Store, table: str, file: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one file of a table, with the store's labels in each row; replace the rows that it had.

    Raises:
        KeyError: if a row has a column that is not in the schema.
        ValueError: if the store has no labels.
    """
    schema, labels = SCHEMAS[table], _labels(store)
    rows = [{**row, **labels} for row in rows]
    unknown = {column for row in rows for column in row} - set(schema.names)
    if unknown:
        raise KeyError(f"{table} has no column {sorted(unknown)}")
    _write(store, table, file, pa.Table.from_pylist(rows, schema=schema))


def copy(source: Store, store: Store, table: str, file: str, **columns: Any) -> None:
    """Copy one file of another experiment's table, as rows of this store's experiment, with some columns changed.

    Raises:
        ValueError: if the store has no labels.
    """
    rows = read(source, table, [file])
    for name, value in {**_labels(store), **columns}.items():
        field = rows.schema.field(name)
        column = pa.repeat(pa.scalar(value, field.type), len(rows))
        rows = rows.set_column(rows.schema.get_field_index(name), field, column)
    _write(store, table, file, rows)


def _labels(store: Store) -> dict[str, Any]:
    if store.labels is None:
        raise ValueError(f"{store.root}: a store without labels cannot write rows; make it with Experiment.store()")
    return asdict(store.labels)


def read(store: Store, table: str, only: Sequence[str] | None = None) -> pa.Table:
    """The rows of a table, or of its files `only`; files that do not exist have none."""
    names = sorted(files(store, table)) if only is None else only
    return pa.concat_tables([SCHEMAS[table].empty_table(), *(_read_file(store, table, name) for name in names)])


def metrics_until(store: Store, model: str, epoch: int) -> list[dict[str, Any]]:
    """The rows of a model's first `epoch` epochs, in order."""
    rows: list[dict[str, Any]] = read(store, "metrics", [model]).sort_by("epoch").to_pylist()
    return [row for row in rows if row["epoch"] <= epoch]


def dead_experts(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """A sentence for each expert that its gate gives no image of the probe in the model's last epoch.

    Such an expert is not trained any more, and the model is smaller than it looks.

    Args:
        rows: of `metrics`, of one experiment.
    """
    last: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if row["epoch"] >= last.get(row["model"], row)["epoch"]:
            last[row["model"]] = row
    return [
        f"{row['model']}: its gate gives expert {number} of {len(row['expert_shares'])} no image of the probe in epoch "
        f"{row['epoch']}"
        for row in last.values()
        if row["expert_shares"] is not None
        for number, share in enumerate(row["expert_shares"], start=1)
        if share == 0
    ]


def remove(store: Store, table: str, file: str) -> None:
    """Remove one file of a table, if it exists."""
    store.remove(_path(table, file))


def files(store: Store, table: str) -> frozenset[str]:
    """Names of a table's files, without `.parquet`."""
    return frozenset(name.removesuffix(".parquet") for name in store.names(folder(table)))


def count(store: Store) -> dict[str, int]:
    """Number of rows of each table."""
    return {table: sum(row_counts(store, table, files(store, table)).values()) for table in SCHEMAS}


def row_counts(store: Store, table: str, names: Iterable[str]) -> dict[str, int]:
    """Number of rows of each of these files of a table that exists. Reads only the ends of the files."""
    names = sorted(names)
    try:
        ends = store.read_ends([_path(table, name) for name in names], _FOOTER)
    except NotAFile:
        ends = [_content(store, table, name) for name in names]  # raises at the folder
    counts = {}
    for name, end in zip(names, ends, strict=True):
        if end is not None:
            try:
                counts[name] = pq.read_metadata(pa.BufferReader(end)).num_rows
            except pa.ArrowException:  # a longer footer, or a damaged file
                counts[name] = len(_read_file(store, table, name))
    return counts


def _path(table: str, file: str) -> str:
    return f"{folder(table)}/{file}.parquet"


def _content(store: Store, table: str, file: str) -> bytes | None:
    try:
        return store.read(_path(table, file))
    except NotAFile:
        raise _damaged(store, table, file, "it is a folder") from None


def _read_file(store: Store, table: str, file: str) -> pa.Table:
    schema = SCHEMAS[table]
    content = _content(store, table, file)
    if content is None:
        return schema.empty_table()
    try:
        parquet = pq.ParquetFile(pa.BufferReader(content), pre_buffer=False)
        refuse_large(table, parquet.metadata)
        # Without Arrow's threads: one that outlives the interpreter crashes the process.
        rows = parquet.read(use_threads=False)
        # Columns that the file lacks, because an older version wrote it, become null.
        merged = pa.concat_tables([schema.empty_table(), rows], promote_options="permissive")
        return with_norm(merged.select(schema.names).cast(schema))
    except pa.ArrowException as error:
        raise _damaged(store, table, file, str(error).strip().splitlines()[0]) from None


def with_norm(rows: pa.Table) -> pa.Table:
    """Rows that an earlier version wrote have no norm: it follows from the attack. Corruptions never have one."""
    if not {"attack", "norm"} <= set(rows.column_names) or not rows["norm"].null_count:
        return rows
    was_l2 = pc.is_in(rows["attack"], pa.array(["pgd_l2", "apgd_l2"]))
    has_none = pc.or_(pc.equal(rows["attack"], "clean"), pc.starts_with(rows["attack"], "corruption_"))
    was_linf = pc.invert(pc.or_(has_none, was_l2))
    norm = pc.coalesce(rows["norm"], pc.case_when(pc.make_struct(was_l2, was_linf), "l2", "linf"))
    return rows.set_column(rows.schema.get_field_index("norm"), "norm", norm)


def _damaged(store: Store, table: str, file: str, reason: str) -> StorageFailed:
    path = store.path(_path(table, file))
    return StorageFailed(
        f"{path}: not the Parquet file that was written ({reason}); remove it, and the same command computes it again"
    )


def _write(store: Store, table: str, file: str, rows: pa.Table) -> None:
    buffer = io.BytesIO()
    pq.write_table(rows, buffer, compression="zstd")
    store.write(_path(table, file), buffer.getvalue())
