"""The folders of experiments below a storage, their `experiment.json`, and their Parquet tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
from pydantic import BaseModel

from analysis.validation import validate
from dwf_cluster.defences.registry import recipe_names
from dwf_cluster.evaluation.registry import extra_names
from dwf_cluster.experiment import Experiment
from dwf_cluster.settings import InvalidInput, flat, one_line, regular_file
from dwf_cluster.store import StorageFailed, Store, tables

_EXPERIMENT = "experiment.json"

_MAX_DEPTH = 20
"""Levels of nested objects and lists in it."""


@dataclass(frozen=True)
class ExperimentFolder:
    """The folder of one experiment.

    Attributes:
        url: its path or URL, as the user gave it.
        store: reads from it.
        settings: every field of its `experiment.json` except the seed, by dotted name.
        experiment: the same settings, without those that this version does not know.
        is_of_this_version: whether this version knows all of its settings, and therefore all of its models.
    """

    url: str
    store: Store
    settings: Mapping[str, Any]
    experiment: Experiment
    is_of_this_version: bool

    @property
    def path(self) -> str:
        """Its path on the store's file system."""
        return str(self.store.files._strip_protocol(self.store.root))

    def undescribed_models(self) -> list[str]:
        """Models that were evaluated, but that no ModelSpec of this version describes."""
        if self.is_of_this_version:
            return []  # rows of other models are refused
        names = dict.fromkeys(self.rows("evaluations", ["model"])["model"].to_pylist())
        return [name for name in names if name not in self.experiment.names]

    def parquet(self, table: str) -> list[str]:
        """Paths of a table's files, sorted; without unfinished ones, whose names begin with a dot.

        Raises:
            InvalidInput: if one of them is a directory, a pipe or a device.
        """
        folder = f"{self.path}/{tables.folder(table)}"
        names = self.store.names(tables.folder(table))
        paths = [f"{folder}/{name}" for name in names if name.endswith(".parquet")]
        for path in paths if self.store.is_local else ():
            regular_file(path, f"{self.url}: table {table}")
        return paths

    def dataset(self, table: str) -> ds.Dataset:
        """A table, lazily: only the footers of its files are read. A column that a file lacks is null.

        Raises:
            InvalidInput: if a file is not Parquet, or larger than a table's file may be.
        """
        files, schema = self.store.files, tables.SCHEMAS[table]
        if not (paths := self.parquet(table)):
            return ds.dataset(schema.empty_table())
        dataset = ds.dataset(paths, schema=schema, format="parquet", filesystem=files)
        with self._reading(table), ThreadPoolExecutor(16) as pool:
            for metadata in pool.map(lambda fragment: fragment.metadata, dataset.get_fragments()):
                tables.refuse_large(table, metadata)
        return dataset

    def rows(self, table: str, columns: Sequence[str] | None = None, where: ds.Expression | None = None) -> pa.Table:
        """A table's rows, validated; arguments as for `Group.frame`.

        Raises:
            InvalidInput: if a file is not Parquet, a column has another type, or a value is not one that a run writes.
        """
        dataset = self.dataset(table)
        with self._reading(table):
            rows = tables.with_norm(dataset.to_table(columns=list(columns) if columns else None, filter=where))
        self.validate(table, rows)
        return rows

    def batches(self, table: str, columns: Sequence[str], size: int) -> Iterator[pa.Table]:
        """As `rows`, at most `size` rows at a time."""
        dataset = self.dataset(table)
        with self._reading(table):
            for batch in dataset.to_batches(columns=columns, batch_size=size, batch_readahead=2, fragment_readahead=2):
                if len(batch):
                    rows = tables.with_norm(pa.Table.from_batches([batch]))
                    self.validate(table, rows)
                    yield rows

    def validate(self, table: str, rows: pa.Table) -> None:
        """Check rows of a table.

        Raises:
            InvalidInput: if a value is not one that a run writes.
        """
        try:
            validate(rows, table, self.experiment, allow_other_models=not self.is_of_this_version)
        except InvalidInput as error:
            raise InvalidInput(f"{self.url}: table {table} cannot be used: {error}") from None

    @contextmanager
    def _reading(self, table: str) -> Iterator[None]:
        try:
            yield
        except InvalidInput:
            raise
        except OSError as error:  # from the store, or from a damaged page
            raise StorageFailed(f"{self.url}: table {table} cannot be read: {one_line(error)}") from None
        except (pa.ArrowException, ValueError) as error:
            raise InvalidInput(f"{self.url}: table {table} cannot be read: {one_line(error)}") from None


def find(storage: str) -> list[ExperimentFolder]:
    """The experiments of a storage; or, if it is an experiment's folder, that experiment.

    Raises:
        InvalidInput: if there is no experiment, or its `experiment.json` cannot be used.
        StorageFailed: if it cannot be read.
    """
    store = Store(storage, "")
    if content := store.read(_EXPERIMENT):
        root, _, folder = store.url.rstrip("/").rpartition("/")
        at_top = not root or root.endswith(":/")  # a bucket, or the root of a disk
        return [_folder(storage.rstrip("/"), store if at_top else Store(root, folder), content)]
    names = store.names("")
    contents = store.read_all([f"{name}/{_EXPERIMENT}" for name in names])
    folders = [
        _folder(f"{storage.rstrip('/')}/{name}", Store(storage, name), content)
        for name, content in zip(names, contents, strict=True)
        if content is not None
    ]
    if not folders:
        raise InvalidInput(
            f"storage: {storage!r} cannot be used: it holds no experiment.json, "
            "allowed are a storage of experiments or an experiment's folder"
        )
    return folders


def _folder(url: str, store: Store, content: bytes | StorageFailed) -> ExperimentFolder:
    if isinstance(content, StorageFailed):
        raise content
    try:
        fields = json.loads(content.decode())
        known = _known_fields(Experiment, fields)
        _keep_known_names(known)
        experiment = Experiment.from_json(json.dumps(known))
        if _depth(fields) > _MAX_DEPTH:
            raise ValueError(f"nested more than {_MAX_DEPTH} deep")
        settings = flat(experiment.model_dump(mode="json")) | flat(fields)  # an older version lacks some
        del settings["seed"]
        settings.pop("save_adversarial", None)  # decides no number: such experiments belong to one group
    # Not JSON, not an object, a value out of range, or too deep.
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"{url}/{_EXPERIMENT}: {one_line(error)}") from None
    return ExperimentFolder(url, store, settings, experiment, known == fields)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _known_fields(part: type[BaseModel], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this version knows; another version may have written others."""
    if not isinstance(fields, Mapping):
        raise TypeError(f"{str(fields)[:80]!r} is no object with the fields of an experiment")
    inner = {name: info.annotation for name, info in part.model_fields.items() if name in fields}
    return {
        name: _known_fields(kind, fields[name])
        if isinstance(kind, type) and issubclass(kind, BaseModel)
        else fields[name]
        for name, kind in inner.items()
    }


def _keep_known_names(fields: dict[str, Any]) -> None:
    """Remove baselines and suites that this version does not know."""
    if isinstance(baselines := fields.get("baselines"), list):
        fields["baselines"] = [name for name in baselines if name in recipe_names()]
    evaluation = fields.get("evaluation", {})
    if isinstance(extra := evaluation.get("beyond"), list):
        evaluation["beyond"] = [name for name in extra if name in extra_names()]
