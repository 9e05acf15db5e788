"""What the experts do is read from the right rows."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import Group
from analysis.expert_tables import error_correlation, expert_tables, summary, transfer_matrix
from analysis.figures import FigureData, draw
from analysis.predictions import Predictions
from analysis.tables import accuracies


@pytest.fixture(scope="session")
def rows(cifar10: Group) -> pd.DataFrame:
    """The raw rows of the suite `experts`."""
    frames = [
        pd.read_parquet(file)
        for run in cifar10.runs
        for file in Path(run.path).glob("results/predictions/evaluate-mixture-experts*.parquet")
    ]
    return pd.concat(frames, ignore_index=True)


def _accuracy(rows: pd.DataFrame, attack: str, source: str) -> float:
    own = rows[(rows.attack == attack) & (rows.source == source)]
    return float((own.label == own.prediction).mean())


def test_the_summary_has_each_experts_own_rows(
    cifar10: Group, measured: pd.DataFrame, predictions: Predictions, rows: pd.DataFrame
) -> None:
    frame = summary(cifar10, measured, predictions)
    assert frame is not None
    for expert in cifar10.experts:
        for name, attack in (
            ("clean", "expert_clean"),
            ("pgd", "expert_pgd"),
            ("dropped_clean", "expert_dropped_clean"),
            ("dropped_pgd", "expert_dropped_pgd"),
        ):
            assert frame.loc[expert, name] == pytest.approx(_accuracy(rows, attack, expert))
    assert frame.weight_clean.sum() == pytest.approx(1, abs=1e-5)
    assert frame.weight_pgd.sum() == pytest.approx(1, abs=1e-5)


def test_transfer_is_from_the_expert_across_to_the_expert_down(
    cifar10: Group, measured: pd.DataFrame, rows: pd.DataFrame
) -> None:
    matrix = transfer_matrix(cifar10, measured)
    for i, tested in enumerate(cifar10.experts):
        for j, source in enumerate(cifar10.experts):
            assert matrix[i, j] == pytest.approx(_accuracy(rows, f"expert_transfer_{tested}", source))


def test_error_correlation_is_that_of_errors_over_images_of_each_seed(
    cifar10: Group, measured: pd.DataFrame, predictions: Predictions, rows: pd.DataFrame
) -> None:
    own = rows[rows.attack == "expert_pgd"].assign(error=lambda r: (r.label != r.prediction).astype(float))
    matrices = [
        part.pivot(index="example", columns="source", values="error")[list(cifar10.experts)].corr().to_numpy()
        for _, part in own.groupby("seed")
    ]
    assert error_correlation(cifar10, measured, predictions, "expert_pgd") == pytest.approx(np.mean(matrices, axis=0))


def test_an_expert_without_errors_has_no_correlation(
    cifar10: Group, measured: pd.DataFrame, predictions: Predictions
) -> None:
    never = {
        cell: np.ones_like(correct) if cell[1].source == "benign" else correct
        for cell, correct in predictions.correct.items()
    }
    matrix = error_correlation(cifar10, measured, Predictions(never, {}), "expert_pgd")
    assert np.isnan(matrix[0]).all()
    assert matrix[1, 1] == pytest.approx(1)


def test_tables_and_figures_show_them(
    cifar10: Group, measured: pd.DataFrame, predictions: Predictions, data: FigureData
) -> None:
    experts, transfer, correlation = expert_tables(cifar10, measured, predictions)
    assert [label for label, _ in experts.rows] == [*cifar10.experts, "whole mixture"]
    clean = measured[(measured.model == "mixture") & (measured.attack == "clean")]["mean"].item()
    assert experts.rows[-1][1][2].startswith(f"{100 * clean:.1f}")
    assert [label for label, _ in transfer.rows] == [label for label, _ in correlation.rows] == list(cifar10.experts)
    figure = draw("expert_transfer", data)
    assert figure is not None
    assert np.asarray(figure.axes[0].images[0].get_array()) == pytest.approx(100 * transfer_matrix(cifar10, measured))
    figure = draw("gate_and_accuracy", data)
    assert figure is not None
    frame = summary(cifar10, measured, predictions)
    assert frame is not None
    assert figure.axes[0].lines[1].get_xdata() == pytest.approx(100 * frame.pgd)


def test_an_experiment_without_the_suite_has_no_such_tables(digits: Group) -> None:
    assert expert_tables(digits, accuracies(digits), Predictions({}, {})) == []


def test_missing_rows_of_one_expert_are_blank(cifar10: Group, measured: pd.DataFrame, predictions: Predictions) -> None:
    partial = measured[~((measured.attack == "expert_pgd") & (measured.source == "benign"))]
    frame = summary(cifar10, partial, predictions)
    assert frame is not None
    assert math.isnan(frame.pgd["benign"])
    tables = expert_tables(cifar10, partial, predictions)
    assert tables[0].rows[0][1][3] == ""
    assert np.isnan(error_correlation(cifar10, partial, predictions, "expert_pgd")).all()
