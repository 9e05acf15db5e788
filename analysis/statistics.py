"""Confidence intervals and paired tests.

McNemar's test and the bootstrap test whether two trained models differ on further images of the same kind, not with
further seeds, for which there are the standard deviation and the t-test over seeds.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from analysis.columns import COLUMN_FIELDS, column_key
from analysis.predictions import Predictions
from analysis.results import Group
from dwf_cluster.evaluation.merge import CONFIDENCE

_FIELDS = ["model", "other", *COLUMN_FIELDS]

ALPHA = 1 - CONFIDENCE
"""Level of significance: a test is significant if its p is below."""

RESAMPLES = 1000
"""Resamples of the bootstrap; each end of its 95 % intervals rests on 25 of them."""


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sided p-value of the hypothesis that two models are equally accurate, tested on the same images.

    With one seed, McNemar's exact test (1947). With several, the results of an image are not independent, so its
    differences are added up over the seeds first (Durkalski et al. 2003, asymptotic; McNemar's chi-squared for one).

    Args:
        first, second: 1 correct, 0 wrong, shape (seeds, examples).

    Returns:
        0..1; 1 if the models never differ.
    """
    difference = np.subtract(first, second, dtype=np.int64)
    summed = difference.sum(axis=0)
    if len(difference) == 1:
        only_first, only_second = int((summed > 0).sum()), int((summed < 0).sum())
        # The p-value of scipy's binomtest in a thousandth of its time.
        tail = special.bdtr(min(only_first, only_second), only_first + only_second, 0.5)
        return min(1.0, 2 * float(tail))
    spread = math.sqrt((summed**2).sum())
    return float(2 * stats.norm.sf(abs(summed.sum()) / spread)) if spread else 1.0


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """p-values corrected for multiple tests: the chance of any false rejection stays below alpha (Holm 1979)."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def bootstrap(differences: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % percentile intervals of means over images, the images drawn with replacement (Efron 1979).

    Args:
        differences: shape (examples, comparisons). All comparisons use the same draws, and every call the same ones.

    Returns:
        Lower and upper ends, shape (comparisons,).
    """
    values = np.asarray(differences, dtype=np.float32)
    means = _draws(len(values)) @ values / len(values)
    low, high = np.quantile(means.astype(np.float64), [ALPHA / 2, 1 - ALPHA / 2], axis=0)
    return low, high


@functools.lru_cache(maxsize=1)  # all columns have the same test set
def _draws(examples: int) -> NDArray[np.float32]:
    """How often each image is drawn in each resample, shape (resamples, examples)."""
    random = np.random.default_rng(0)
    draws = (random.integers(examples, size=examples) for _ in range(RESAMPLES))
    return np.stack([np.bincount(draw, minlength=examples).astype(np.float32) for draw in draws])


def _paired_t(differences: NDArray[np.int64]) -> NDArray[np.float64]:
    """p of a paired t-test for each column of shape (seeds, comparisons); NaN where seeds do not vary."""
    varies = np.ptp(differences, axis=0) > 0
    p = np.full(differences.shape[1], np.nan)
    p[varies] = stats.ttest_1samp(differences[:, varies], 0).pvalue
    return p


def comparisons(group: Group, predictions: Predictions) -> pd.DataFrame:
    """Every pair of models in every column, on the same images.

    Only models that were tested with all seeds, on all images.

    Returns:
        One row for each pair and column: `model`, `other`, `attack`, `source`, `epsilon`, `steps`, `examples`, `seeds`,
        `difference` (accuracy of `model` minus that of `other`, -1..1), `low`, `high` (95 % bootstrap interval over
        images), `p` (`mcnemar`), `p_holm` (`holm` over all rows), `std` (of the difference, over seeds) and
        `p_seeds` (paired t-test over seeds, not corrected), both NaN for one seed.
    """
    parts = []
    for column in group.columns:
        arrays = {model: predictions.correct.get((model, column_key(column))) for model in group.models}
        tested = {model: array for model, array in arrays.items() if array is not None and (array >= 0).all()}
        if len(tested) > 1:
            parts.append(_compare(tested).assign(**column_key(column)._asdict()))
    if not parts:
        return pd.DataFrame(columns=[*_FIELDS, "p", "p_holm"])
    rows = pd.concat(parts, ignore_index=True)
    order = [*_FIELDS, *(name for name in rows if name not in _FIELDS)]
    return rows[order].assign(p_holm=holm(rows.p))


def _compare(correct: Mapping[str, NDArray[np.int8]]) -> pd.DataFrame:
    """Every pair of models in one column; arrays of shape (seeds, examples)."""
    pairs = list(itertools.combinations(correct, 2))
    mean = {model: array.mean(axis=0) for model, array in correct.items()}
    differences = np.stack([mean[model] - mean[other] for model, other in pairs], axis=1)
    low, high = bootstrap(differences)
    counts = {model: array.sum(axis=1, dtype=np.int64) for model, array in correct.items()}
    by_seed = np.stack([counts[model] - counts[other] for model, other in pairs], axis=1)  # integers: exact
    return pd.DataFrame(pairs, columns=["model", "other"]).assign(
        examples=len(differences),
        seeds=len(by_seed),
        difference=differences.mean(axis=0),
        low=low,
        high=high,
        p=[mcnemar(correct[model], correct[other]) for model, other in pairs],
        std=pd.DataFrame(by_seed).std().to_numpy() / len(differences),
        p_seeds=_paired_t(by_seed),
    )
