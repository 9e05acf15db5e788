"""The settings of a sweep beside each other: accuracies of their defended models, and paired tests between them.

A *setting* is a group of experiments that differ only in their seed, of a sweep or not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.columns import each, key_of_row
from analysis.formats import Table, mean_and_std, signed
from analysis.predictions import Predictions
from analysis.results import Group
from analysis.statistics import ALPHA, Paired, holm, paired, primary_columns
from dwf_cluster.evaluation.settings import Threat

CLEAN = "clean"

INCOMPLETE, OTHER_ATTACK, UPPER_BOUND = "incomplete", "other attack", "upper bound"
"""Cells of a pair that is not compared: the two have other seeds or images; they are attacked in other ways; a gate
gives each image to one expert, and there is no worst case, only attacks that follow the straight-through gradient."""


@dataclass(frozen=True)
class Setting:
    """The defended model of a group.

    Attributes:
        group: the experiments.
        measured: result of `tables.accuracies`.
        correct: by `clean` and the name of the worst case (`statistics.primary_columns`): 1 correct, 0 wrong, -1 not
            tested, shape (seeds, examples). Without those that were not measured.
    """

    group: Group
    measured: pd.DataFrame
    correct: Mapping[str, NDArray[np.int8]]

    @staticmethod
    def of(group: Group, measured: pd.DataFrame, predictions: Predictions) -> Setting:
        """The setting of a group.

        Args:
            group: the experiments.
            measured: result of `tables.accuracies`.
            predictions: result of `read_predictions`; most of it is not kept.
        """
        cells = ((group.defended, key) for key in primary_columns(group, predictions))
        correct = {
            key.attack: predictions.correct[model, key] for model, key in cells if (model, key) in predictions.correct
        }
        return Setting(group, measured, correct)

    @property
    def threat(self) -> Threat:
        """The primary threat model."""
        return self.group.experiment.threat

    @property
    def selects(self) -> bool:
        """Whether the defended model gives each image to one expert."""
        return self.group.defended in self.group.experiment.selecting

    @property
    def suites(self) -> set[str]:
        """Names of the suites that the defended model is attacked by."""
        return set(self.group.experiment.suites(self.group.experiment.defended))


def setting_tables(settings: Sequence[Setting]) -> list[Table]:
    """The tables of all settings; none for a single one."""
    if len(settings) < 2:
        return []
    between = differences(settings)
    return [overview(settings), *([between] if between else [])]


def overview(settings: Sequence[Setting]) -> Table:
    """The accuracies of all settings: clean, in the worst case, under the longest PGD.

    Settings that are evaluated under different threat models have columns of their own.
    """
    cells = [_headline(setting) for setting in settings]
    balls = dict.fromkeys((setting.threat.norm, setting.threat.epsilon) for setting in settings)
    several, norms = len(balls) > 1, len({norm for norm, _ in balls}) > 1
    order = {name: i for i, name in enumerate((CLEAN, "worst_case", "pgd_restarts", "pgd"))}
    heads: dict[tuple[str, Any], tuple[str, str]] = {}
    for name, ball in sorted({key for row in cells for key in row}, key=lambda key: (order[key[0]], *(key[1] or ()))):
        mark = f"@{f'{ball[0]} ' if norms else ''}{ball[1]:.4g}" if several and ball else ""
        longest = "longest" if name == "pgd" else ""
        heads[name, ball] = name.removeprefix("pgd_"), f"{longest} {mark}".strip()
    rows, is_partial = [], False
    for setting, row in zip(settings, cells, strict=True):
        seeds = len(setting.group.seeds)
        shown = [_accuracy(row.get(key), seeds) for key in heads]
        is_partial |= any("/" in cell for cell in shown)
        rows.append((setting.group.title, [str(seeds), *shown]))
    notes = ["Mean ± standard deviation over seeds."]
    notes += (
        ["In brackets seeds measured / all: the mean leaves seeds out, so it is not compared."] if is_partial else []
    )
    if bounds := [setting.group.title for setting in settings if setting.selects]:
        notes.append(
            f"Upper bounds: pgd and restarts of {'; '.join(bounds)}, which give each image to one expert; their "
            "straight-through gradient is not the model's. Compare the worst case."
        )
    title = "accuracy of the defended model in percent, all settings"
    return Table(title, [("seeds", ""), *heads.values()], rows, notes=notes, corner="settings")


def _headline(setting: Setting) -> dict[tuple[str, tuple[str, float] | None], Any]:
    """The rows of `tables.accuracies` that the overview shows, by the attack and, except for clean, the ball."""
    threat = setting.threat
    ball = threat.norm, threat.epsilon
    rows: dict[tuple[str, tuple[str, float] | None], Any] = {}
    for row in each(setting.measured[setting.measured.model == setting.group.defended]):
        key = key_of_row(row)
        if key.attack == CLEAN:
            rows[CLEAN, None] = row
        elif key.attack in ("worst_case", "pgd_restarts", "pgd") and (key.norm, key.epsilon) == ball:
            rows[key.attack, ball] = row  # steps rise: the longest is the last
    if ("worst_case", ball) in rows:
        rows.pop(("pgd_restarts", ball), None)
    return rows


def _accuracy(row: Any, seeds: int) -> str:
    if row is None:
        return ""
    return mean_and_std(row.mean, row.std) + (f" ({row.seeds}/{seeds})" if row.seeds < seeds else "")


def differences(settings: Sequence[Setting]) -> Table | None:
    """Accuracy of each setting minus that of each other one on the same images with the same seeds, in points.

    Compared are settings that share preset, data and number of test images; None if there are no two of these. A cell
    is bold if p is below 0.05 after Holm, over all pairs, clean and worst case, with several seeds.
    """
    pairs = [(a, b) for a, b in itertools.combinations(settings, 2) if _is_comparable(a, b)]
    if not pairs:
        return None
    worst = next((name for name in ("worst_case", "pgd_restarts") if any(name in s.correct for s in settings)), None)
    attacks = [CLEAN, *([worst] if worst else [])]
    results = [[_compare(first, second, attack) for attack in attacks] for first, second in pairs]
    p = np.array([[_p(result) for result in row] for row in results])
    counted = ~np.isnan(p)
    p[counted] = holm(p[counted])
    names = [f"{first.group.title} minus {second.group.title}" for first, second in pairs]
    return Table(
        "difference of the defended models between settings, percentage points",
        [(attack.removeprefix("pgd_"), "") for attack in attacks],
        [(name, [_interval(result) for result in row]) for name, row in zip(names, results, strict=True)],
        frozenset((int(i), int(j)) for i, j in np.argwhere(p < ALPHA) if len(pairs[i][0].group.seeds) > 1),
        _notes(pairs, results, int(counted.sum())),
        corner="settings",
    )


def _is_comparable(first: Setting, second: Setting) -> bool:
    one, other = first.group.experiment, second.group.experiment
    return one.preset == other.preset and one.data == other.data


def _compare(first: Setting, second: Setting, attack: str) -> Paired | str:
    """The paired test of two settings under an attack, or why there is none."""
    one, other = first.group.experiment, second.group.experiment
    is_same = (one.threat, one.evaluation) == (other.threat, other.evaluation)
    if attack != CLEAN and not (is_same and (first.suites == second.suites or attack != "worst_case")):
        return OTHER_ATTACK
    if attack not in (CLEAN, "worst_case") and (first.selects or second.selects):
        return UPPER_BOUND
    arrays = [setting.correct.get(attack) for setting in (first, second)]
    if first.group.seeds != second.group.seeds or arrays[0] is None or arrays[1] is None:
        return INCOMPLETE
    if arrays[0].shape != arrays[1].shape:
        return INCOMPLETE
    images = (arrays[0] >= 0).any(axis=0) | (arrays[1] >= 0).any(axis=0)
    results = [array[:, images] for array in arrays if array is not None]
    if any((result < 0).any() for result in results):
        return INCOMPLETE
    return paired(*results)


def _p(result: Paired | str) -> float:
    """The p-value that the correction counts: 1 for a pair that is incomplete, NaN for one that is no comparison."""
    return result.p if isinstance(result, Paired) else 1.0 if result == INCOMPLETE else math.nan


def _interval(result: Paired | str) -> str:
    if isinstance(result, str):
        return result
    difference, low, high = (signed(100 * value) for value in (result.difference, result.low, result.high))
    return f"{difference} [{low}, {high}]"


def _notes(
    pairs: Sequence[tuple[Setting, Setting]], results: Sequence[Sequence[Paired | str]], tests: int
) -> list[str]:
    has_seeds = any(len(first.group.seeds) > 1 for first, _ in pairs)
    drawn = "seeds and images" if has_seeds else "images (one seed: a statement about these trained models)"
    cells = {cell for row in results for cell in row if isinstance(cell, str)}
    notes = [
        f"Paired over {drawn}. In brackets the 95 % interval, not corrected. Bold: p < {ALPHA:.2g} after Holm over "
        f"{tests} comparisons; never with one seed."
    ]
    if INCOMPLETE in cells:
        notes.append(
            "Incomplete: the two settings are not measured with the same seeds on the same images, and not compared."
        )
    if UPPER_BOUND in cells:
        notes.append(
            "Upper bound: the gate gives each image to one expert, and no attack was measured that does not follow the "
            "straight-through gradient; `--stages evaluate` adds the worst case."
        )
    if OTHER_ATTACK in cells:
        notes.append(
            "Other attack: the two settings are evaluated under different threat models or by different attacks; "
            "evaluation.epsilon and evaluation.step_size give all settings one threat model, and evaluation.beyond the "
            "same attacks, such as pgd_route for soft gates too."
        )
    return notes
