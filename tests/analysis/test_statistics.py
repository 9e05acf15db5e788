"""Intervals and tests agree with textbooks and slow computations, and keep their error rates."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from analysis import Group, load
from analysis.columns import column_key, each, key_of_row
from analysis.predictions import Predictions, read_predictions
from analysis.statistics import ALPHA, comparisons, hochberg, holm, paired, primary_columns, sign_flip
from benchmarks.analysis import make_up
from benchmarks.error_rates import candidates, draw, new_p, old_p, rejections
from dwf_cluster.evaluation.merge import wilson
from dwf_cluster.presets import build

TOLERANCE = 0.001
"""Chance that a test whose false positive rate is exactly 5 % is found to be above it in these simulations."""

SIMULATIONS = 300


def _is_at_most_five_percent(rejected: int, simulations: int) -> bool:
    return rejected <= stats.binom.isf(TOLERANCE, simulations, ALPHA)


def test_the_wilson_interval_agrees_with_the_literature() -> None:
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@settings(deadline=None)  # the machine may be busy
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 50))
def test_one_seed_is_mcnemars_exact_test_of_the_images_that_differ(b: int, c: int, alike: int) -> None:
    first = np.array([[1] * b + [0] * c + [1] * (alike + 1)], np.int8)
    second = np.array([[0] * b + [1] * c + [1] * (alike + 1)], np.int8)
    result, reverse = paired(first, second), paired(second, first)
    assert result.p == pytest.approx(stats.binomtest(b, b + c).pvalue if b + c else 1.0, rel=1e-9)
    assert reverse == pytest.approx((-result.difference, -result.high, -result.low, result.p))
    assert result.low <= 0 <= result.high or result.p < ALPHA


@settings(deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_the_sign_flip_test_agrees_with_all_flips(differences: list[int]) -> None:
    signs = np.array(list(itertools.product([-1, 1], repeat=len(differences))))
    flipped = np.abs(signs @ np.array(differences))
    assert sign_flip(np.array(differences)) == pytest.approx((flipped >= abs(sum(differences))).mean(), abs=1e-12)


def test_five_images_of_two_seeds_establish_nothing() -> None:
    """The asymptotic test of the sums gave p = 0.025; that of five signs gives 0.0625."""
    second = np.ones((2, 400), np.int8)
    second[:, :5] = 0
    result = paired(np.ones((2, 400), np.int8), second)
    assert result.p >= 2 * 0.5**5 - 1e-12
    assert result.low <= 0


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_variances_are_those_of_the_classical_analysis(seeds: int) -> None:
    """Without an effect of the image, and with many images, the interval is Student's over the seeds."""
    random = np.random.default_rng(0)
    first = random.random((seeds, 40_000)) < random.normal(0.6, 0.02, (seeds, 1))
    second = random.random((seeds, 40_000)) < random.normal(0.6, 0.02, (seeds, 1))
    by_seed = first.mean(axis=1) - second.mean(axis=1)
    interval = stats.ttest_1samp(by_seed, 0).confidence_interval()
    result = paired(first, second)
    assert result.difference == pytest.approx(by_seed.mean())
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high), abs=0.001)


def test_the_type_of_the_results_does_not_matter() -> None:
    first, second = (np.random.default_rng(0).random((2, 3, 200)) < 0.7).astype(np.int8)
    expected = paired(first, second)
    assert paired(first.astype(float), second.tolist()) == expected
    assert paired(first.astype(bool), second.astype(np.float32)) == expected


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([[1, 0]], [[1, 0], [1, 1]], "shapes"),
        ([1, 0], [1, 1], "shapes"),
        (np.ones((2, 0)), np.ones((2, 0)), "shapes"),
        ([[1, -1]], [[1, 1]], "0 \\(wrong\\) or 1"),
        ([[1, 0.5]], [[1, 1]], "0 \\(wrong\\) or 1"),
        ([[1, np.nan]], [[1, 1]], "0 \\(wrong\\) or 1"),
    ],
)
def test_what_are_no_results_of_the_same_images_is_refused(first: object, second: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        paired(first, second)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seeds", "examples", "seed_std"),
    [(1, 360, 0.0), (3, 360, 0.0), (3, 360, 0.011), (3, 10_000, 0.011), (5, 360, 0.011), (5, 3_000, 0.011)],
)
def test_equal_methods_differ_in_at_most_five_percent_of_simulations(
    seeds: int, examples: int, seed_std: float
) -> None:
    """With one seed the hypothesis is that the two trained models are equally accurate, so they have no spread.

    Of equal methods with one seed nothing is established: `test_tables.test_one_seed_makes_no_cell_bold`.
    """
    p = rejections(new_p, SIMULATIONS, 0.0, seeds, examples, seed_std)
    assert _is_at_most_five_percent(int((p < ALPHA).sum()), SIMULATIONS)


def test_equal_methods_were_different_by_the_old_rule() -> None:
    p = rejections(old_p, 100, 0.0, 3, 10_000, 0.011)
    assert (p < ALPHA).mean() > 0.3
    assert (p < ALPHA / 855).mean() > 0.05


@pytest.mark.parametrize(
    ("seeds", "gain", "seed_std", "power"),
    [(1, 0.02, 0.0, 0.9), (3, 0.05, 0.005, 0.9), (5, 0.05, 0.011, 0.9)],
)
def test_a_real_difference_is_found(seeds: int, gain: float, seed_std: float, power: float) -> None:
    """Methods that differ by 2 or 5 points on 10,000 images."""
    assert (rejections(new_p, 60, gain, seeds, 10_000, seed_std) < ALPHA).mean() > power


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_the_error_rate_does_not_depend_on_whether_seeds_or_images_vary_more(seeds: int, share: float) -> None:
    rejected = candidates(seeds, share, 0.0)
    assert _is_at_most_five_percent(int(rejected["Banerjee"].sum()), 20_000)


def test_simpler_procedures_have_higher_error_rates() -> None:
    assert candidates(2, 0.9, 0.0)["Satterthwaite"].mean() > 0.10
    assert candidates(5, 0.5, 0.0)["both must reject"].mean() > 0.07
    assert candidates(3, 0.9, 0.0)["images alone"].mean() > 0.40
    assert candidates(3, 0.1, 0.0)["seeds alone (paired t)"].mean() > 0.20


def test_one_model_among_nine_equal_rivals_is_rarely_different_from_any() -> None:
    random, simulations, found = np.random.default_rng(0), 150, 0
    for _ in range(simulations):
        model, *rivals = draw(random, (0.0,) * 10, 3, 360, 0.02)
        found += hochberg([paired(model, rival).p for rival in rivals]).min() < ALPHA
    assert _is_at_most_five_percent(found, simulations)


def test_holm_agrees_with_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]).tolist() == [1, 1]


def test_hochberg_agrees_with_the_textbook() -> None:
    assert hochberg([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.04, 0.04, 0.02])
    assert hochberg([0.04, 0.049, 0.01]).max() < ALPHA  # all are below alpha, so all stay


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_corrections_are_at_most_bonferroni_and_keep_the_order(p: list[float]) -> None:
    for corrected in (holm(p), hochberg(p)):
        assert (corrected >= np.array(p) - 1e-12).all()
        assert (corrected <= np.minimum(1, np.array(p) * len(p)) + 1e-12).all()
        assert (np.diff(corrected[np.argsort(p, kind="stable")]) >= 0).all()
    assert (hochberg(p) <= holm(p) + 1e-12).all()


def test_every_pair_is_compared_in_every_column_on_all_images(cifar10: Group, predictions: Predictions) -> None:
    rows = comparisons(cifar10, predictions)
    models, pairs = len(cifar10.models), len(cifar10.models) * (len(cifar10.models) - 1) // 2
    assert models == 7
    columns = [column for column in cifar10.columns if column.attack not in ("pgd_gate", "worst_case")]
    assert len(columns) == 17 + 2  # noise and autoattack; only the mixture has a column pgd_gate
    assert (rows.attack != "worst_case").sum() == len(columns) * pairs
    measured = cifar10.frame("evaluations")
    clean = measured[measured.attack == "clean"].groupby("model", observed=True).accuracy.mean()
    for row in each(rows[rows.attack == "clean"]):
        assert row.difference == pytest.approx(clean[row.model] - clean[row.other])
        assert row.low <= row.difference <= row.high
    one = next(each(rows))
    first, second = (predictions.correct[model, key_of_row(one)] for model in (one.model, one.other))
    assert one.p == paired(first, second).p
    by_seed = first.mean(axis=1) - second.mean(axis=1)
    assert one.std == pytest.approx(by_seed.std(ddof=1))


def test_the_primary_family_is_the_defended_model_against_each_rival(cifar10: Group, predictions: Predictions) -> None:
    rows = comparisons(cifar10, predictions)
    primary = rows[rows.primary]
    keys = primary_columns(cifar10, predictions)
    assert [key.attack for key in keys] in (["clean", "worst_case"], ["clean", "pgd_restarts"])
    rivals = set(cifar10.models) - {cifar10.defended}
    for key in keys:
        family = primary[primary.attack == key.attack]
        assert set(family.model) == {cifar10.defended}
        assert set(family.other) == rivals
        assert family.p_corrected.to_numpy() == pytest.approx(np.minimum(2 * hochberg(family.p), 1))
    assert len(primary) == 2 * len(rivals)
    assert rows[~rows.primary].p_corrected.isna().all()


def test_results_with_a_worst_case_are_judged_by_it(cifar10: Group, predictions: Predictions) -> None:
    restarts = next(key for key in map(column_key, cifar10.columns) if key.attack == "pgd_restarts")
    worst = restarts._replace(attack="worst_case", steps=None)
    columns = [column for column in cifar10.columns if column.attack != "worst_case"]
    columns.append(replace(columns[-1], attack="worst_case", norm="linf", epsilon=restarts.epsilon, steps=None))
    assert column_key(columns[-1]) == worst
    group = type("WithWorstCase", (), {"columns": columns, "experiment": cifar10.experiment})()
    correct = {(model, worst): array for (model, key), array in predictions.correct.items() if key == restarts}
    with_worst = Predictions(dict(predictions.correct) | correct, predictions.gates)
    assert primary_columns(group, with_worst)[-1] == worst


def test_pgd_stands_in_for_no_worst_case_where_a_gate_gives_each_image_to_one_expert(tmp_path: Path) -> None:
    families = {}
    for kind in ("soft", "hard"):
        make_up(tmp_path / kind, build("digits", 0, [f"gate.kind={kind}"]), 40)
        (group,) = load(str(tmp_path / kind)).groups
        families[kind] = [key.attack for key in primary_columns(group, read_predictions(group))]
    assert families == {"soft": ["clean", "pgd_restarts"], "hard": ["clean"]}


@pytest.mark.parametrize("missing", ["a shard", "a seed", "everything"])
def test_a_rival_that_lacks_results_is_incomplete_and_counts(
    cifar10: Group, predictions: Predictions, missing: str
) -> None:
    clean = column_key(cifar10.columns[0])
    correct = dict(predictions.correct)
    if missing == "everything":
        del correct["benign", clean]
    else:
        correct["benign", clean] = correct["benign", clean].copy()
        correct["benign", clean][(1, slice(0, 8)) if missing == "a shard" else 1] = -1
    rows = comparisons(cifar10, Predictions(correct, predictions.gates))
    family = rows[(rows.attack == "clean") & rows.primary]
    assert set(family.other[family.incomplete.astype(bool)]) == {"benign"}
    (lacking,) = each(family[family.other == "benign"])
    assert np.isnan(lacking.p)
    assert lacking.p_corrected == 1
    complete = family[family.other != "benign"]
    assert complete.p_corrected.to_numpy() == pytest.approx(np.minimum(2 * hochberg([*complete.p, 1]), 1)[:-1])
    explored = rows[(rows.attack == "clean") & ~rows.primary]
    assert "benign" not in {*explored.model, *explored.other}


def test_a_column_of_the_first_images_is_compared_on_them(cifar10: Group, predictions: Predictions) -> None:
    noise = next(key for key in map(column_key, cifar10.columns) if key.attack == "noise")
    correct = {cell: array.copy() for cell, array in predictions.correct.items()}
    for (_, key), array in correct.items():
        if key == noise:
            array[:, 50:] = -1
    rows = comparisons(cifar10, Predictions(correct, predictions.gates))
    assert set(rows.examples[rows.attack == "noise"]) == {50}
