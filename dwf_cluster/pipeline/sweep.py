"""A sweep: experiments that vary some fields of one experiment."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dwf_cluster.experiment import Experiment
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput, to_text

MAX_TRIALS = 1000
"""Limit of one sweep."""

_NOT_VARIED = ("data.", "preset", "seed", "checkpoint_minutes")
"""Fields that cannot be varied: all trials share one data set, seeds are given as `seeds=0..4`, and the last changes no
number."""


@dataclass(frozen=True)
class Trial:
    """One experiment of a sweep.

    Attributes:
        varied: values of the fields that the sweep varies, by their dotted names, and the seed.
        experiment: the whole experiment.
    """

    varied: Mapping[str, Any]
    experiment: Experiment

    @property
    def name(self) -> str:
        """The varied values, as people read them: `pgd.steps=10 seed=3`."""
        return _name(self.varied)

    @property
    def setting(self) -> str:
        """The name without the seed, which trials that differ only in their seeds share."""
        return _name({field: value for field, value in self.varied.items() if field != "seed"})


def _name(values: Mapping[str, Any]) -> str:
    return " ".join(f"{field}={to_text(value)}" for field, value in values.items())


@dataclass(frozen=True)
class Sweep:
    """Experiments that differ in the varied fields, and in nothing else.

    Attributes:
        trials: the experiments.
        asha: whether settings that fall behind are stopped early.
    """

    trials: tuple[Trial, ...]
    asha: bool

    @property
    def folder(self) -> str:
        """Folder of the sweep's own files, below the storage URL; the same trials have the same folder."""
        signatures = sorted(trial.experiment.signature for trial in self.trials)
        digest = hashlib.sha256(json.dumps([signatures, self.asha]).encode()).hexdigest()
        return f"sweeps/{self.trials[0].experiment.preset}-{digest[:10]}"

    @property
    def names(self) -> dict[str, str]:
        """Names of the trials, by the folders of their experiments."""
        return {trial.experiment.folder: trial.name for trial in self.trials}

    @property
    def settings(self) -> dict[str, list[Trial]]:
        """The trials of each setting, which differ only in their seeds, by `Trial.setting`."""
        settings: dict[str, list[Trial]] = {}
        for trial in self.trials:
            settings.setdefault(trial.setting, []).append(trial)
        return settings


def sweep(
    preset: str,
    assignments: Sequence[str],
    varied: Sequence[str],
    seeds: Sequence[int | None],
    samples: int | None,
    asha: bool,
) -> Sweep:
    """The sweep of a command line: each combination of values, or a random sample of them, with each seed.

    Args:
        preset, assignments: what all trials have in common, as for `experiment.build`.
        varied: `dotted.field=value`; a field that is given several times takes each of the values.
        seeds: of each combination; None: the preset's.
        samples: number of combinations to draw, always the same ones; None: all.
        asha: whether settings that fall behind are stopped early.

    Raises:
        InvalidInput: for the first value that cannot be used.
    """
    values = _values(varied)
    combinations = math.prod(map(len, values.values()))
    chosen: Iterable[int] = range(combinations)
    if samples and samples < combinations:
        chosen = sorted(random.Random(0).sample(range(combinations), samples))
    if min(samples or combinations, combinations) * len(seeds) > MAX_TRIALS:
        raise InvalidInput(
            f"--sweep: {combinations} combinations with {len(seeds)} seeds cannot be run: allowed are 1 to "
            f"{MAX_TRIALS} trials; --samples draws some"
        )
    trials = []
    for number in chosen:
        combination = _combination(values, number)
        experiment = build(preset, None, [*assignments, *(f"{field}={text}" for field, text in combination.items())])
        fields = {field: functools.reduce(getattr, field.split("."), experiment) for field in values}
        for seed in seeds:
            seeded = experiment if seed is None else experiment.model_copy(update={"seed": seed})
            trials.append(Trial(fields | ({} if seed is None else {"seed": seed}), seeded))
    _check_different(trials)
    if asha:
        _check_comparable([trial.experiment for trial in trials])
    return Sweep(tuple(trials), asha)


def _values(varied: Sequence[str]) -> dict[str, list[str]]:
    """The values of each varied field, as text."""
    values: dict[str, list[str]] = {}
    for assignment in varied:
        field, separator, text = (part.strip() for part in assignment.partition("="))
        if not separator:
            raise InvalidInput(f"--sweep: {assignment!r} is not of the form dotted.field=value")
        if field.startswith(_NOT_VARIED):
            raise InvalidInput(f"--sweep: {field!r} cannot be varied: allowed is any field but data.*, and seeds=0..4")
        values.setdefault(field, []).append(text)
    return values


def _combination(values: Mapping[str, Sequence[str]], number: int) -> dict[str, str]:
    """One combination of values, by its number: the last field varies fastest."""
    combination, rest = dict[str, str](), number
    for field in reversed(list(values)):
        rest, index = divmod(rest, len(values[field]))
        combination[field] = values[field][index]
    return {field: combination[field] for field in values}


def _check_different(trials: Sequence[Trial]) -> None:
    names: dict[str, str] = {}
    for trial in trials:
        if trial.experiment.folder in names:
            same = names[trial.experiment.folder], trial.name
            raise InvalidInput(f"--sweep: {same[0]!r} and {same[1]!r} cannot both be run: they are the same experiment")
        names[trial.experiment.folder] = trial.name


def _check_comparable(experiments: Sequence[Experiment]) -> None:
    """Fail unless ASHA can compare the probes of experiments: on validation images, and by one attack."""
    if not experiments[0].data.validation_examples:  # of all experiments: `data.*` cannot vary
        raise InvalidInput(
            "--asha: cannot be used with data.validation_examples=null: allowed is a number of training images: it "
            "must not look at test images"
        )
    for name in ("norm", "epsilon", "step_size"):
        values = dict.fromkeys(str(getattr(experiment.threat, name)) for experiment in experiments)
        _check_equal(f"evaluation.{name}", values)
    for name in ("random_start", "probe_steps", "probe_examples"):
        values = dict.fromkeys(str(getattr(experiment.evaluation, name)) for experiment in experiments)
        _check_equal(f"evaluation.{name}", values)


def _check_equal(field: str, values: Iterable[str]) -> None:
    first, *others = values
    if others:
        raise InvalidInput(
            f"{field}: the probes of the trials differ in it ({first}, {others[0]}), so --asha cannot compare them: "
            f"allowed is one value for all trials, --set {field}=..."
        )
