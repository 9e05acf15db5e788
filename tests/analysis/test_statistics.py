"""Intervals and tests agree with textbooks and scipy, and keep their error rates."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis import Group
from analysis.columns import column_key, each, key_of_row
from analysis.predictions import Predictions
from analysis.statistics import bootstrap, comparisons, holm, mcnemar, wilson


def test_the_wilson_interval_agrees_with_the_literature() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 50))
def test_mcnemar_with_one_seed_is_the_exact_binomial_test_of_the_images_that_differ(b: int, c: int, alike: int) -> None:
    first = np.array([[1] * b + [0] * c + [1] * alike], np.int8)
    second = np.array([[0] * b + [1] * c + [1] * alike], np.int8)
    expected = stats.binomtest(b, b + c).pvalue if b + c else 1.0
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(second, first) == mcnemar(first, second)


def test_mcnemar_with_equal_seeds_is_the_chi_squared_test() -> None:
    first, second = np.array([[1] * 30 + [0] * 14 + [1] * 9]), np.array([[0] * 30 + [1] * 14 + [1] * 9])
    chi_squared = (30 - 14) ** 2 / (30 + 14)
    twice = mcnemar(np.repeat(first, 2, axis=0), np.repeat(second, 2, axis=0))
    assert twice == pytest.approx(stats.chi2.sf(chi_squared, 1))


def test_mcnemar_does_not_count_seeds_as_more_images() -> None:
    """Models that differ on each image, equally with all seeds, but not in accuracy: 5 % of the tests may reject."""
    random = np.random.default_rng(0)
    rejected = 0
    for _ in range(400):
        wins = random.random(200) < 0.5
        rejected += mcnemar(np.tile(wins, (5, 1)), np.tile(~wins, (5, 1))) < 0.05
    assert 0.02 < rejected / 400 < 0.08  # a third if the seeds counted as independent


def test_holm_agrees_with_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_is_at_most_bonferroni_and_keeps_the_order(p: list[float]) -> None:
    corrected = holm(p)
    assert (corrected >= np.array(p) - 1e-12).all()
    assert (corrected <= np.minimum(1, np.array(p) * len(p)) + 1e-12).all()
    assert (np.diff(corrected[np.argsort(p, kind="stable")]) >= 0).all()


def test_the_bootstrap_agrees_with_scipy_and_is_repeatable() -> None:
    random = np.random.default_rng(0)
    differences = random.choice([-1.0, 0.0, 1.0], size=(500, 2), p=[0.1, 0.6, 0.3])
    low, high = bootstrap(differences)
    for i in range(2):
        expected = stats.bootstrap((differences[:, i],), np.mean, method="percentile", rng=1).confidence_interval
        assert (low[i], high[i]) == pytest.approx(tuple(expected), abs=0.006)
    repeated, _ = bootstrap(differences)
    assert (repeated == low).all()


def test_every_pair_is_compared_in_every_column_on_all_images(cifar10: Group, predictions: Predictions) -> None:
    rows = comparisons(cifar10, predictions)
    models, pairs = len(cifar10.models), len(cifar10.models) * (len(cifar10.models) - 1) // 2
    assert models == 7
    assert len(rows) == (17 + 1) * pairs  # noise; only the mixture has a column pgd_gate
    measured = cifar10.frame("evaluations")
    clean = measured[measured.attack == "clean"].groupby("model", observed=True).accuracy.mean()
    for row in each(rows[rows.attack == "clean"]):
        assert row.difference == pytest.approx(clean[row.model] - clean[row.other])
        assert row.low <= row.difference <= row.high
    one = next(each(rows))
    first, second = (predictions.correct[model, key_of_row(one)] for model in (one.model, one.other))
    assert one.p == mcnemar(first, second)
    by_seed = first.mean(axis=1) - second.mean(axis=1)
    assert one.std == pytest.approx(by_seed.std(ddof=1))
    assert one.p_seeds == pytest.approx(stats.ttest_rel(first.mean(axis=1), second.mean(axis=1)).pvalue)
    assert rows.p_holm.to_numpy() == pytest.approx(holm(rows.p))


def test_a_model_without_all_images_is_not_compared(cifar10: Group, predictions: Predictions) -> None:
    clean = column_key(cifar10.columns[0])
    cut = predictions.correct["benign", clean].copy()
    cut[1, 7] = -1
    rows = comparisons(cifar10, Predictions(dict(predictions.correct) | {("benign", clean): cut}, predictions.gates))
    compared = rows[rows.attack == "clean"]
    assert "benign" not in {*compared.model, *compared.other}
    assert "benign" in {*rows.model, *rows.other}
