"""Paired tests of models over what was drawn, seeds and images, and corrections for multiple tests.

Every seed is tested on the same images, so the difference of two models with one seed on one image is `mean + effect of
the seed + effect of the image + remainder` (a crossed design with random effects).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from analysis.columns import COLUMN_FIELDS, ColumnKey, column_key
from analysis.predictions import Predictions
from analysis.results import Group
from dwf_cluster.evaluation.merge import CONFIDENCE
from dwf_cluster.evaluation.registry import WORST_CASE

_RESULTS = ["examples", "seeds", "difference", "low", "high", "p", "std", "p_corrected"]
_COLUMNS = ["model", "other", *COLUMN_FIELDS, "primary", "incomplete", *_RESULTS]

WORST_CASES = (WORST_CASE, "pgd_restarts")
"""Attacks whose column is the headline under attack: the first that was measured."""

ALPHA = 1 - CONFIDENCE
"""Level of significance: a test is significant if its p is below."""

_LEAST_P = 1e-100
"""Smaller p-values are not computed: Student's critical values would overflow."""


class Paired(NamedTuple):
    """A difference of two accuracies, measured on the same images with the same seeds.

    Attributes:
        difference: accuracy of the first minus that of the second, -1..1.
        low, high: 95 % interval over seeds and images; with one seed over images alone. -1..1.
        p: two-sided p-value of the hypothesis that they are equally accurate, 0..1.
    """

    difference: float
    low: float
    high: float
    p: float


def paired(first: ArrayLike, second: ArrayLike) -> Paired:
    """Compare two models, or two settings.

    With one seed: McNemar's exact test (1947), a statement about these two trained models and further images. With
    several: a statement about further seeds and images. The variance between few seeds is badly known, so each variance
    has a critical value of its own, Student's for the seeds and the normal one for the images (Banerjee, Sankhya 22,
    1960). The coverage of this interval is at least nominal for every ratio of the variances, because the distribution
    function of chi-squared with one degree of freedom is concave. The exact sign-flip test over images must reject too:
    a few images that differ have no normal distribution.

    Args:
        first, second: 1 correct, 0 wrong, shape (seeds, examples), of any numeric type.

    Raises:
        ValueError: if the shapes differ or are empty, or a value is neither 0 nor 1.
    """
    differences = _differences(first, second)
    mean, step = float(differences.mean()), 1 / differences.size  # the mean is a multiple of the step
    seed_variance, image_variance = _variances(differences)
    seeds = len(differences)

    def squared_half_width(alpha: float) -> float:
        student = special.stdtrit(seeds - 1, alpha / 2) if seeds > 1 else 0.0
        return float(student**2 * seed_variance + special.ndtri(alpha / 2) ** 2 * image_variance)

    p = sign_flip(differences.sum(axis=0))
    if seeds > 1:  # with continuity correction
        p = max(p, _level(squared_half_width, max(abs(mean) - step, 0.0) ** 2))
    half_width = math.sqrt(squared_half_width(ALPHA)) + step
    low, high = max(mean - half_width, -1.0), min(mean + half_width, 1.0)
    if p >= ALPHA:  # if few images differ, the exact test is the stricter one
        low, high = min(low, 0.0), max(high, 0.0)
    return Paired(mean, low, high, p)


def sign_flip(differences: NDArray[np.int64]) -> float:
    """Two-sided p-value of the exact sign-flip test: each image favours either model with the same chance.

    For one seed this is McNemar's exact test.

    Args:
        differences: number of seeds with which the first model is correct minus that of the second, shape (examples,).
    """
    counts = np.bincount(np.abs(differences))  # images by the size of their difference
    total, largest = abs(int(differences.sum())), int(counts @ np.arange(len(counts)))
    if total == 0:
        return 1.0
    if len(counts) == 2:  # all differences are 1: a binomial tail, exact however small
        tail = special.bdtr((largest - total) // 2, largest, 0.5)
        return min(1.0, 2 * float(tail))
    # The characteristic function of a sum of terms `+size` or `-size` is a product of cosines.
    points = 1 << (2 * largest + 1).bit_length()
    angles = 2 * np.pi * np.arange(points // 2 + 1) / points
    characteristic = np.prod([np.cos(size * angles) ** count for size, count in enumerate(counts) if count], axis=0)
    mass = np.fft.irfft(characteristic, points)
    return float(np.clip(mass[total : points - total + 1].sum(), 0, 1))


def _differences(first: ArrayLike, second: ArrayLike) -> NDArray[np.int64]:
    one, other = np.asarray(first), np.asarray(second)
    if one.ndim != 2 or one.shape != other.shape or not one.size:
        raise ValueError(f"two equal shapes (seeds, examples) are needed, not {one.shape} and {other.shape}")
    if not (np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all()):
        raise ValueError("every result must be 0 (wrong) or 1 (correct)")
    return one.astype(np.int64) - other.astype(np.int64)


def _variances(differences: NDArray[np.int64]) -> tuple[float, float]:
    """Variance of the mean that comes from seeds, with the remainder, and from images; by the mean squares."""
    seeds, examples = differences.shape
    by_seed, by_image = differences.mean(axis=1), differences.mean(axis=0)
    mean = by_seed.mean()
    image_square = seeds * float(((by_image - mean) ** 2).sum()) / max(examples - 1, 1)
    remainder_square = 0.0
    seed_variance = 0.0
    if seeds > 1:
        seed_variance = float(by_seed.var(ddof=1)) / seeds
        residual = differences - by_seed[:, None] - by_image + mean
        remainder_square = float((residual**2).sum()) / max((seeds - 1) * (examples - 1), 1)
    # One more image that differs, so that no interval has width zero (after Agresti and Min, 2005).
    image_variance = max(image_square - remainder_square, 0.0) / differences.size + 1 / examples**2
    return seed_variance, image_variance


def _level(squared_half_width: Callable[[float], float], square: float) -> float:
    """The alpha at which the squared half-width is `square`: the p-value of the interval's test."""
    if square == 0:
        return 1.0
    if squared_half_width(_LEAST_P) <= square:
        return _LEAST_P
    logarithm = optimize.brentq(lambda x: squared_half_width(math.exp(x)) - square, math.log(_LEAST_P), 0.0)
    return math.exp(float(logarithm))


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """p-values corrected for multiple tests: the chance of any false rejection stays below alpha (Holm 1979)."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def hochberg(p: ArrayLike) -> NDArray[np.float64]:
    """p-values corrected for multiple tests that depend on each other positively (Hochberg 1988, Sarkar 1998).

    As `holm`, with more power: if all are below alpha before the correction, all are after it. Tests of one model
    against each of several rivals depend on each other positively, because they share that model.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)[::-1]
    stepped = np.minimum.accumulate(values[order] * np.arange(1, len(values) + 1))
    corrected = np.empty_like(values)
    corrected[order] = stepped
    return corrected


def primary_columns(group: Group, predictions: Predictions) -> list[ColumnKey]:
    """The columns of the primary family: clean images, and the worst case under the primary threat model.

    The worst case is `worst_case`, or, if no model has this column, `pgd_restarts`; not if a model gives each image to
    one expert, because PGD's accuracies are upper bounds there.
    """
    measured = {key for _, key in predictions.correct}
    keys = [key for column in group.columns if (key := column_key(column)) in measured]
    threat = group.experiment.threat
    under_threat = [key for key in keys if (key.norm, key.epsilon) == (threat.norm, threat.epsilon)]
    clean = [key for key in keys if key.attack == "clean"]
    attacks = WORST_CASES[:1] if group.experiment.selecting else WORST_CASES
    worst = [key for attack in attacks for key in under_threat if key.attack == attack]
    return clean + worst[:1]


def is_established(row: Any) -> bool:
    """Whether a row of `comparisons` shows a difference of methods: significant, and over more than one seed.

    One seed shows a difference of two trained models; other seeds of equal methods differ too.
    """
    return bool(row.p_corrected < ALPHA and row.seeds > 1)


def comparisons(group: Group, predictions: Predictions) -> pd.DataFrame:
    """Compare models in every column, on the same images with the same seeds.

    The primary family is the defended model against each rival, which is every other model, in `primary_columns`. Its p
    are corrected: Hochberg over the rivals of a column, Bonferroni over the columns. A rival that lacks a seed or a
    shard is `incomplete` and counts in the correction. All other pairs and columns are exploratory: not corrected, no
    basis for a claim.

    Returns:
        One row for each pair and column: `model`, `other`, `attack`, `source`, `norm`, `epsilon`, `steps`, `primary`,
        `incomplete`, `examples`, `seeds`, `difference` (accuracy of `model` minus that of `other`, -1..1), `low`,
        `high`, `p` (of `paired`), `std` (of the difference, over seeds; NaN for one), `p_corrected` (NaN if
        exploratory). The defended model is always `model`. Numbers of an incomplete pair are NaN; exploratory pairs
        that are incomplete have no row.
    """
    models = [group.defended, *(model for model in group.models if model != group.defended)]
    primary = primary_columns(group, predictions)
    rows: list[dict[str, object]] = []
    for key in dict.fromkeys(map(column_key, group.columns)):
        arrays = {model: predictions.correct[model, key] for model in models if (model, key) in predictions.correct}
        if arrays:
            rows += _compare_all(models, arrays, key, group.defended if key in primary else None)
    frame = pd.DataFrame(rows, columns=_COLUMNS)
    families = frame[frame.primary.astype(bool)].groupby("attack", sort=False)
    for _, family in families:
        frame.loc[family.index, "p_corrected"] = np.minimum(hochberg(family.p.fillna(1)) * len(families), 1)
    return frame


def _compare_all(
    models: Sequence[str], correct: Mapping[str, NDArray[np.int8]], key: ColumnKey, defended: str | None
) -> list[dict[str, object]]:
    """Every pair of models in one column; `defended` only if the column is in the primary family."""
    images = np.any([(array >= 0).any(axis=0) for array in correct.values()], axis=0)
    complete = {model: array[:, images] for model, array in correct.items() if (array[:, images] >= 0).all()}
    rows: list[dict[str, object]] = []
    for model, other in itertools.combinations(models, 2):
        is_primary, is_complete = model == defended, model in complete and other in complete
        row = {"model": model, "other": other, **key._asdict(), "primary": is_primary, "incomplete": not is_complete}
        if is_complete:
            first, second = complete[model], complete[other]
            by_seed = first.mean(axis=1) - second.mean(axis=1)
            std = by_seed.std(ddof=1) if len(by_seed) > 1 else math.nan
            rows.append({**row, "examples": first.shape[1], "seeds": len(first), "std": std})
            rows[-1] |= paired(first, second)._asdict()
        elif is_primary:
            rows.append(row)
    return rows
