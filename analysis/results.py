"""The results of experiments: their folders, grouped over seeds, with their Parquet tables as frames."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds

from analysis.folder import ExperimentFolder, find
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.defences.rows import rows
from dwf_cluster.evaluation.column import CURVES
from dwf_cluster.evaluation.registry import PAPER, Column, all_columns, columns
from dwf_cluster.experiment import Experiment
from dwf_cluster.presets import invocation
from dwf_cluster.settings import InvalidInput, flat, printable, to_text
from dwf_cluster.store import tables

_SETTINGS_IN_TITLE = 4
"""Settings that a title names; the report lists all of them."""

_NAME_CHARACTERS = 100
"""Characters of a setting and its value in a title."""


@dataclass(frozen=True)
class Group:
    """Experiments that differ only in their seed.

    Attributes:
        title: the preset, and the settings that distinguish the group from others of that preset.
        runs: one experiment for each seed, in rising order of seeds.
    """

    title: str
    runs: tuple[ExperimentFolder, ...]

    @property
    def experiment(self) -> Experiment:
        """The experiment of the first seed."""
        return self.runs[0].experiment

    @property
    def settings(self) -> Mapping[str, Any]:
        """Every field except the seed, by its dotted name, as `--set` takes it."""
        return self.runs[0].settings

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, rising."""
        return tuple(run.experiment.seed for run in self.runs)

    @property
    def changed(self) -> Mapping[str, Any]:
        """The settings that `--set` needs in addition to `--preset`."""
        _, different = invocation(self.experiment)
        known = flat(self.experiment.model_dump(mode="json"))
        return {name: value for name, value in self.settings.items() if name in different or name not in known}

    @property
    def name(self) -> str:
        """The title as the name of a folder."""
        return re.sub(r"[^A-Za-z0-9.=_-]+", "-", self.title).strip("-")

    @cached_property
    def sections(self) -> dict[str, tuple[str, ...]]:
        """Heading and models of each group of rows of the result table, in the table's order.

        The groups of `defences.rows`, then models that no ModelSpec describes, of another version.
        """
        experiment = self.experiment
        groups = rows(experiment.models, experiment.baselines)
        sections = {heading: tuple(spec.name for spec in specs) for heading, specs in groups.items()}
        undescribed = tuple(dict.fromkeys(name for run in self.runs for name in run.undescribed_models()))
        return sections | ({"of another version": undescribed} if undescribed else {})

    @property
    def models(self) -> tuple[str, ...]:
        """The models in the order of the result table's rows."""
        return tuple(model for models in self.sections.values() for model in models)

    @property
    def defended(self) -> str:
        """The model that the experiment is about."""
        return self.experiment.defended.name

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of the defended model's experts, in the order of the gate's outputs; without a gate, its parents."""
        defended = self.experiment.defended
        return defended.experts or defended.parents

    @property
    def columns(self) -> tuple[Column, ...]:
        """The paper's columns, those of other suites, `worst_case`; `transfer` has tables of its own."""
        experiment = self.experiment
        return tuple(all_columns(experiment.evaluation, experiment.threats, experiment.suites(*experiment.models)))

    @property
    def paper_columns(self) -> tuple[Column, ...]:
        """The columns of the paper's table 3."""
        return tuple(columns(self.experiment.evaluation, self.experiment.threats, PAPER))

    @property
    def curve_columns(self) -> tuple[Column, ...]:
        """The columns of the suite `curves`, which have figures and stand in no table."""
        evaluation = self.experiment.evaluation
        return tuple(columns(evaluation, self.experiment.threats, CURVES)) if CURVES in evaluation.beyond else ()

    def frame(
        self, table: str, columns: Sequence[str] | None = None, where: ds.Expression | None = None
    ) -> pd.DataFrame:
        """A table of all seeds.

        Args:
            table: one of `metrics`, `evaluations`, `predictions`, `jobs`, `checks`, `shards`.
            columns: the columns to read; all by default.
            where: a condition on the rows to read, e.g. `pyarrow.dataset.field("model") == "mixture"`.

        Returns:
            The columns of docs/results.md, and `group`, the group's title. Strings are categories.

        Raises:
            InvalidInput: as `ExperimentFolder.rows`.
        """
        merged = pa.concat_tables([run.rows(table, columns, where) for run in self.runs])
        frame: pd.DataFrame = merged.to_pandas(strings_to_categorical=True)
        return frame.assign(group=pd.Categorical([self.title] * len(frame), [self.title]))


class Results:
    """The tables of all experiments of a storage as tidy frames, each read when it is first used.

    Columns are those of docs/results.md, and `group`: experiments that differ only in their seed share one.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = tuple(groups)

    @property
    def evaluated(self) -> tuple[Group, ...]:
        """The groups that have evaluations; the others are still running, or were stopped before.

        Raises:
            InvalidInput: if there is none.
        """
        evaluated = tuple(group for group in self.groups if any(run.parquet("evaluations") for run in group.runs))
        if not evaluated:
            url = self.groups[0].runs[0].url
            raise InvalidInput(f"{url}: cannot be used: it has no evaluations yet, `--stages evaluate` makes them")
        return evaluated

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
        """One row for each experiment, model and check for gradient masking."""
        return self.frame("checks")

    @cached_property
    def jobs(self) -> pd.DataFrame:
        """One row for each experiment and task."""
        return self.frame("jobs")

    @cached_property
    def predictions(self) -> pd.DataFrame:
        """One row for each experiment, model, column and test image. Large; `frame` reads a part of it."""
        return self.frame("predictions")

    def frame(
        self, table: str, columns: Sequence[str] | None = None, where: ds.Expression | None = None
    ) -> pd.DataFrame:
        """A table of all groups; arguments as for `Group.frame`."""
        frame = pd.concat([group.frame(table, columns, where) for group in self.groups], ignore_index=True)
        strings = [field.name for field in tables.SCHEMAS[table] if pa.types.is_string(field.type)]
        present = [name for name in (*strings, "group") if name in frame]
        return frame.astype(dict.fromkeys(present, "category"))  # the categories of groups differ


def kind(spec: ModelSpec) -> ModelSpec:
    """Everything that describes a model except its name: models of a kind are trained in the same way."""
    return replace(spec, name="")


def load(*storages: str) -> Results:
    """Find experiments.

    Args:
        storages: paths or fsspec URLs (`./runs`, `s3://bucket/prefix`) of storages, or of experiments' own folders.

    Raises:
        InvalidInput: if there is no experiment, or its `experiment.json` cannot be used.
    """
    return Results(_grouped([run for storage in storages for run in find(storage)]))


def _grouped(runs: Sequence[ExperimentFolder]) -> list[Group]:
    by_settings: dict[str, dict[int, ExperimentFolder]] = {}
    for run in runs:  # a folder that is named twice counts once
        key = json.dumps(run.settings, sort_keys=True)
        by_settings.setdefault(key, {}).setdefault(run.experiment.seed, run)
    seeds = [tuple(by_seed[seed] for seed in sorted(by_seed)) for by_seed in by_settings.values()]
    groups = [Group(_title(members[0], [other[0] for other in seeds]), members) for members in seeds]
    return sorted(groups, key=lambda group: (group.experiment.preset, group.title))


def _title(run: ExperimentFolder, others: Sequence[ExperimentFolder]) -> str:
    preset = run.experiment.preset
    siblings = [other.settings for other in others if other.experiment.preset == preset]
    different = [name for name, value in run.settings.items() if any(other.get(name) != value for other in siblings)]
    parts = [printable(f"{name}={to_text(run.settings[name])}", _NAME_CHARACTERS) for name in different]
    if len(parts) > _SETTINGS_IN_TITLE:  # the signature distinguishes groups that share these settings
        more = len(parts) - _SETTINGS_IN_TITLE
        parts = [*parts[:_SETTINGS_IN_TITLE], f"{more} more ({run.experiment.signature})"]
    return ", ".join([preset, *parts])
