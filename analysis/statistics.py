"""Intervals and paired tests: what the test images, and their number, allow to be said.

McNemar's test and the bootstrap ask whether two trained models differ on further images of the same kind. They say
nothing of further seeds: that is what the standard deviation and the t-test over seeds are for.
"""

from __future__ import annotations

import functools
import itertools
import math

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from analysis.predictions import Predictions
from analysis.results import Group, column_key

CONFIDENCE = 0.95
"""Of every interval; a test's p must be below what is left."""

ALPHA = 1 - CONFIDENCE
RESAMPLES = 1000
"""Of the bootstrap: the ends of its 95 % intervals rest on 25 resamples each."""


def wilson(correct: int, examples: int) -> tuple[float, float]:
    """95 % Wilson interval of a share, 0..1 (Wilson 1927).

    Args:
        correct: 0..examples.
        examples: at least 1.

    Raises:
        ValueError: if a count is out of range.
    """
    interval = stats.binomtest(correct, examples).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar(first: ArrayLike, second: ArrayLike) -> float:
    """Two-sided p that two models are equally often right, tested on the same images.

    With one seed McNemar's exact test (1947). With several, an image's results hang together, so its differences are
    added up over the seeds first (Durkalski et al. 2003, asymptotic; McNemar's chi-squared if there is one seed).

    Args:
        first, second: 1 right, 0 wrong, shape (seeds, examples).

    Returns:
        1 if they never differ.
    """
    difference = np.subtract(first, second, dtype=np.int64)
    summed = difference.sum(axis=0)
    if len(difference) == 1:
        only_first, only_second = int((summed > 0).sum()), int((summed < 0).sum())
        tail = special.bdtr(
            min(only_first, only_second), only_first + only_second, 0.5
        )  # binomtest's, a thousandth its time
        return min(1.0, 2 * float(tail))
    spread = math.sqrt((summed**2).sum())
    return float(2 * stats.norm.sf(abs(summed.sum()) / spread)) if spread else 1.0


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """p-values corrected for their number: the chance of one false finding among all stays below alpha (Holm 1979)."""
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(stepped, 1)
    return corrected


def bootstrap(differences: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """95 % percentile intervals of means over images, the images drawn with replacement (Efron 1979).

    Args:
        differences: shape (examples, comparisons). All comparisons see the same draws, which are always the same.

    Returns:
        Lower and upper ends, shape (comparisons,).
    """
    values = np.asarray(differences, dtype=np.float32)
    means = _draws(len(values)) @ values / len(values)
    low, high = np.quantile(means.astype(np.float64), [ALPHA / 2, 1 - ALPHA / 2], axis=0)
    return low, high


@functools.lru_cache(maxsize=1)  # columns share the test set
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


def comparisons(group: Group, found: Predictions) -> pd.DataFrame:
    """Every pair of models in every column, on the same images.

    Only models that all seeds were tested of, on all images.

    Returns:
        One row a pair and column: `model`, `other`, `attack`, `source`, `epsilon`, `steps`, `examples`, `seeds`,
        `difference` (accuracy of `model` less that of `other`, -1..1), `low`, `high` (95 % bootstrap interval over
        images), `p` (`mcnemar`), `p_holm` (`holm` over all rows), `std` (of the difference, over seeds) and
        `p_seeds` (paired t-test over seeds, not corrected), both NaN for one seed.
    """
    parts = []
    for column in group.columns:
        correct = {model: found.correct.get((model, column_key(column))) for model in group.models}
        tested = {model: of for model, of in correct.items() if of is not None and (of >= 0).all()}
        pairs = list(itertools.combinations(tested, 2))
        if not pairs:
            continue
        mean = {model: of.mean(axis=0) for model, of in tested.items()}
        differences = np.stack([mean[model] - mean[other] for model, other in pairs], axis=1)
        low, high = bootstrap(differences)
        right = {model: of.sum(axis=1, dtype=np.int64) for model, of in tested.items()}
        of_seeds = np.stack([right[model] - right[other] for model, other in pairs], axis=1)  # whole images: exact
        parts.append(
            pd.DataFrame(pairs, columns=["model", "other"]).assign(
                **dict(zip(("attack", "source", "epsilon", "steps"), column_key(column), strict=True)),
                examples=len(differences),
                seeds=len(group.runs),
                difference=differences.mean(axis=0),
                low=low,
                high=high,
                p=[mcnemar(tested[model], tested[other]) for model, other in pairs],
                std=pd.DataFrame(of_seeds).std().to_numpy() / len(differences),
                p_seeds=_paired_t(of_seeds),
            )
        )
    if not parts:
        return pd.DataFrame(columns=["model", "other", "attack", "source", "epsilon", "steps", "p", "p_holm"])
    rows = pd.concat(parts, ignore_index=True)
    return rows.assign(p_holm=holm(rows.p))
