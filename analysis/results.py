"""What experiments have measured: their folders found, grouped over seeds, and their Parquet tables read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
from pydantic import BaseModel

from analysis.validation import validate
from dwf_cluster.evaluation.registry import PAPER, Column, columns
from dwf_cluster.experiment import Experiment, invocation
from dwf_cluster.settings import InvalidInput, flat, printable, regular_file, to_text
from dwf_cluster.store import StorageFailed, Store, tables

ColumnKey = tuple[str, str | None, float | None, int | None]
"""Attack, source, epsilon, steps: what tells the columns of one experiment apart in every table."""

_NAMED = 4
"""Settings that a title names; the report lists them all."""

_NAME_CHARACTERS = 100
"""Of a setting and its value in a title."""

_EXPERIMENT = "experiment.json"

_DEEPEST = 20
"""Objects and lists within each other that it may have."""


@dataclass(frozen=True)
class ExperimentFolder:
    """The folder of one experiment.

    Attributes:
        url: its path or URL, as the user has given it.
        store: the same, to read from.
        settings: every field of its `experiment.json` but the seed, by its dotted name.
        experiment: the same, as far as this version knows the fields.
    """

    url: str
    store: Store
    settings: Mapping[str, Any]
    experiment: Experiment

    @property
    def path(self) -> str:
        """Its path on the store's file system."""
        return str(self.store.files._strip_protocol(self.store.root))

    @property
    def models(self) -> tuple[str, ...]:
        """Experts in the order of the gate's outputs, baselines, the mixture."""
        return self.experiment.names

    @property
    def is_of_this_version(self) -> bool:
        """Whether every setting is known, and with them every model."""
        return set(self.settings) <= set(flat(self.experiment.model_dump(mode="json")))

    def parquet(self, table: str) -> list[str]:
        """Paths of a table's files, sorted; unfinished ones, whose names begin with a dot, left out.

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
        """A table, nothing but the footers of its files read yet; a column that a file lacks is null.

        Raises:
            InvalidInput: if a file is no Parquet, or larger than a table's file may be.
        """
        files, schema = self.store.files, tables.SCHEMAS[table]
        if not (paths := self.parquet(table)):
            return ds.dataset(schema.empty_table())
        found = ds.dataset(paths, schema=schema, format="parquet", filesystem=files)
        with self._reading(table), ThreadPoolExecutor(16) as pool:
            for metadata in pool.map(lambda fragment: fragment.metadata, found.get_fragments()):
                tables.refuse_large(table, metadata)
        return found

    def rows(self, table: str, columns: Sequence[str] | None = None, where: ds.Expression | None = None) -> pa.Table:
        """A table's rows, validated; arguments as for `Group.frame`.

        Raises:
            InvalidInput: if a file is no Parquet, its columns are of another type, or a run writes no such value.
        """
        found = self.dataset(table)
        with self._reading(table):
            rows = found.to_table(columns=list(columns) if columns else None, filter=where)
        self.validate(table, rows)
        return rows

    def batches(self, table: str, columns: Sequence[str], size: int) -> Iterator[pa.Table]:
        """As `rows`, at most `size` rows at a time."""
        found = self.dataset(table)
        with self._reading(table):
            for batch in found.to_batches(columns=columns, batch_size=size, batch_readahead=2, fragment_readahead=2):
                if len(batch):
                    rows = pa.Table.from_batches([batch])
                    self.validate(table, rows)
                    yield rows

    def validate(self, table: str, rows: pa.Table) -> None:
        """Check rows of a table.

        Raises:
            InvalidInput: if a value is none that a run writes.
        """
        try:
            validate(rows, table, self.experiment, self.models if self.is_of_this_version else None)
        except InvalidInput as error:
            raise InvalidInput(f"{self.url}: table {table} cannot be used: {error}") from None

    @contextmanager
    def _reading(self, table: str) -> Iterator[None]:
        try:
            yield
        except InvalidInput:
            raise
        except OSError as error:  # of the store; of a damaged page too
            raise StorageFailed(f"{self.url}: table {table} cannot be read: {_line(error)}") from None
        except (pa.ArrowException, ValueError) as error:
            raise InvalidInput(f"{self.url}: table {table} cannot be read: {_line(error)}") from None


@dataclass(frozen=True)
class Group:
    """Experiments that differ in nothing but their seed.

    Attributes:
        title: the preset and the settings that tell the group from others of that preset.
        runs: one for each seed, seeds rising.
    """

    title: str
    runs: tuple[ExperimentFolder, ...]

    @property
    def experiment(self) -> Experiment:
        """Their settings; the seed is that of the first."""
        return self.runs[0].experiment

    @property
    def settings(self) -> Mapping[str, Any]:
        """Every field but the seed, by its dotted name, as `--set` takes it."""
        return self.runs[0].settings

    @property
    def seeds(self) -> tuple[int, ...]:
        """Their seeds, rising."""
        return tuple(run.experiment.seed for run in self.runs)

    @property
    def changed(self) -> Mapping[str, Any]:
        """The settings that `--set` must be given beside `--preset`."""
        _, differ = invocation(self.experiment)
        known = flat(self.experiment.model_dump(mode="json"))
        return {name: value for name, value in self.settings.items() if name in differ or name not in known}

    @property
    def name(self) -> str:
        """The title as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9.=_-]+", "-", self.title).strip("-")

    @property
    def models(self) -> tuple[str, ...]:
        """Experts in the order of the gate's outputs, baselines, the mixture."""
        return self.runs[0].models

    @property
    def experts(self) -> tuple[str, ...]:
        """Experts in the order of the gate's outputs."""
        return self.experiment.defended.parents

    @property
    def columns(self) -> tuple[Column, ...]:
        """The paper's columns, then those beyond; `transfer` has tables of its own."""
        return tuple(self.experiment.columns)

    @property
    def paper_columns(self) -> tuple[Column, ...]:
        """The columns of the paper's table 3."""
        return tuple(columns(self.experiment.evaluation, self.experiment.threat, PAPER))

    def frame(
        self, table: str, columns: Sequence[str] | None = None, where: ds.Expression | None = None
    ) -> pd.DataFrame:
        """A table over all seeds.

        Args:
            table: one of `metrics`, `evaluations`, `predictions`, `jobs`, `checks`, `shards`.
            columns: only these; all by default.
            where: only rows for which this holds, e.g. `pyarrow.dataset.field("model") == "mixture"`.

        Returns:
            Columns as docs/results.md has them, and `group`, the group's title. Strings are categories.

        Raises:
            InvalidInput: as `ExperimentFolder.rows`.
        """
        rows = pa.concat_tables([run.rows(table, columns, where) for run in self.runs])
        frame: pd.DataFrame = rows.to_pandas(strings_to_categorical=True)
        return frame.assign(group=pd.Categorical([self.title] * len(frame), [self.title]))


class Results:
    """The tables of all experiments of a storage as tidy frames, read when first asked for.

    Columns are those of docs/results.md, and `group`: experiments that differ only in their seed share one.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)

    @property
    def evaluated(self) -> tuple[Group, ...]:
        """The groups that have evaluations; others run still, or were stopped early.

        Raises:
            InvalidInput: if none has.
        """
        found = tuple(group for group in self.groups if any(run.parquet("evaluations") for run in group.runs))
        if not found:
            url = self.groups[0].runs[0].url
            raise InvalidInput(f"{url}: cannot be used: it has no evaluations yet, `--stages evaluate` makes them")
        return found

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """One row for each experiment, model and column of the result table."""
        return self.frame("evaluations")

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row for each experiment, model and epoch of training."""
        return self.frame("metrics")

    @cached_property
    def checks(self) -> pd.DataFrame:
        """One row for each experiment, model and sign of gradient masking."""
        return self.frame("checks")

    @cached_property
    def jobs(self) -> pd.DataFrame:
        """One row for each experiment and task."""
        return self.frame("jobs")

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """One row for each experiment, model, column and test image: large, and larger with `gate`, so see `frame`."""
        return self.frame("predictions")

    def frame(
        self, table: str, columns: Sequence[str] | None = None, where: ds.Expression | None = None
    ) -> pd.DataFrame:
        """A table of all groups, as `Group.frame` has it."""
        frame = pd.concat([group.frame(table, columns, where) for group in self.groups], ignore_index=True)
        strings = [field.name for field in tables.SCHEMAS[table] if pa.types.is_string(field.type)]
        kept = [name for name in (*strings, "group") if name in frame]
        return frame.astype(dict.fromkeys(kept, "category"))  # groups' categories differ


def load(*storages: str) -> Results:
    """Find experiments.

    Args:
        storages: paths or fsspec URLs (`./runs`, `s3://bucket/prefix`) of storages, or of experiments' own folders.

    Raises:
        InvalidInput: if there is no experiment, or its `experiment.json` cannot be used.
    """
    return Results(_grouped([run for storage in storages for run in _find(storage)]))


def column_key(column: Column) -> ColumnKey:
    """What finds a column in every table."""
    return column.attack, column.source, column.epsilon, column.steps


def key_of_row(attack: Any, source: Any, epsilon: Any, steps: Any) -> ColumnKey:
    """The same from a row of a frame, where what has no meaning is NaN."""
    known = (None if pd.isna(value) else value for value in (source, epsilon, steps))
    source, epsilon, steps = known
    return attack, source, epsilon, None if steps is None else int(steps)


def each(frame: pd.DataFrame) -> Iterator[Any]:
    """The rows of a frame, their columns as attributes, which no type checker knows."""
    yield from frame.itertuples(index=False)


def _find(storage: str) -> list[ExperimentFolder]:
    store = Store(storage, "")
    if own := store.read(_EXPERIMENT):
        root, _, folder = store.url.rstrip("/").rpartition("/")
        at_top = not root or root.endswith(":/")  # a bucket, or the root of a disk
        return [_run(storage.rstrip("/"), store if at_top else Store(root, folder), own)]
    names = store.names("")
    runs = []
    for name, content in zip(names, store.read_all([f"{name}/{_EXPERIMENT}" for name in names]), strict=True):
        if content is not None:
            runs.append(_run(f"{storage.rstrip('/')}/{name}", Store(storage, name), content))
    if not runs:
        raise InvalidInput(
            f"storage: {storage!r} cannot be used: it holds no experiment.json, "
            "allowed are a storage of experiments or an experiment's folder"
        )
    return runs


def _run(url: str, store: Store, content: bytes | StorageFailed) -> ExperimentFolder:
    if isinstance(content, StorageFailed):
        raise content
    try:
        fields = json.loads(content.decode())
        experiment = Experiment.from_json(json.dumps(_known(Experiment, fields)))
        if _depth(fields) > _DEEPEST:
            raise ValueError(f"nested more than {_DEEPEST} deep")
        settings = {name: value for name, value in flat(fields).items() if name != "seed"}
    # No JSON, no object, a value out of range, or too deep.
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidInput(f"{url}/{_EXPERIMENT}: {_line(error)}") from None
    return ExperimentFolder(url, store, settings, experiment)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _known(part: type[BaseModel], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this version knows: results may be of another."""
    if not isinstance(fields, Mapping):
        raise TypeError(f"{str(fields)[:80]!r} is no object with the fields of an experiment")
    inner = {name: info.annotation for name, info in part.model_fields.items() if name in fields}
    return {
        name: _known(kind, fields[name]) if isinstance(kind, type) and issubclass(kind, BaseModel) else fields[name]
        for name, kind in inner.items()
    }


def _grouped(runs: Sequence[ExperimentFolder]) -> list[Group]:
    alike: dict[str, dict[int, ExperimentFolder]] = {}
    for run in runs:  # a folder that was named twice counts once
        key = json.dumps(run.settings, sort_keys=True)
        alike.setdefault(key, {}).setdefault(run.experiment.seed, run)
    groups = [tuple(of[seed] for seed in sorted(of)) for of in alike.values()]
    titled = [Group(_title(group[0], [other[0] for other in groups]), group) for group in groups]
    return sorted(titled, key=lambda group: (group.experiment.preset, group.title))


def _title(run: ExperimentFolder, all_of_them: Sequence[ExperimentFolder]) -> str:
    preset = run.experiment.preset
    siblings = [other.settings for other in all_of_them if other.experiment.preset == preset]
    differ = [name for name, value in run.settings.items() if any(other.get(name) != value for other in siblings)]
    named = [printable(f"{name}={to_text(run.settings[name])}", _NAME_CHARACTERS) for name in differ]
    if len(named) > _NAMED:  # the signature tells it from groups that share these
        named = [*named[:_NAMED], f"{len(named) - _NAMED} more ({run.experiment.signature})"]
    return ", ".join([preset, *named])


def _line(error: BaseException) -> str:
    return printable(" ".join(str(error).split()), 200)
