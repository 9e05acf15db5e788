"""Accuracy by class, confusion and calibration are what pandas gives with every row in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from analysis import Group, load
from analysis.class_tables import answered, calibration, class_accuracies, class_tables, confusion_matrix
from analysis.columns import ColumnKey
from analysis.figures import FigureData, draw
from analysis.predictions import BINS, Answers, Predictions, read_predictions
from tests.analysis.conftest import EXAMPLES


@pytest.fixture(scope="session")
def rows(cifar10: Group) -> pd.DataFrame:
    """The raw rows of the mixture under PGD with restarts."""
    names = ["seed", "model", "attack", "label", "prediction", "confidence"]
    frame = pd.concat(
        pd.read_parquet(file, columns=names)
        for run in cifar10.runs
        for file in Path(run.path).glob("results/predictions/evaluate-mixture-paper*.parquet")
    )
    return frame[(frame.model == "mixture") & (frame.attack == "pgd_restarts")].reset_index()


@pytest.fixture(scope="session")
def attacked(cifar10: Group, predictions: Predictions) -> Answers:
    clean, column = answered(cifar10, predictions)
    assert (clean.name, column.name) == ("clean", "pgd_restarts")
    return column.answers


def test_accuracy_by_class_is_the_mean_over_seeds(rows: pd.DataFrame, attacked: Answers) -> None:
    correct = (rows.label == rows.prediction).groupby([rows.label, rows.seed]).mean().unstack()
    shown = class_accuracies(attacked).set_index("label")
    assert shown["mean"].to_numpy() == pytest.approx(correct.mean(axis=1).to_numpy())
    assert shown["std"].to_numpy() == pytest.approx(correct.std(axis=1).to_numpy())
    assert ((shown.low < shown["mean"]) & (shown["mean"] < shown.high)).all()
    assert shown.images.sum() == EXAMPLES
    wrong = rows[(rows.label == 3) & (rows.prediction != 3)].prediction.value_counts()
    assert wrong[shown.other[3]] == wrong.max()
    assert shown.share[3] == pytest.approx(wrong.max() / (rows.label == 3).sum())


def test_the_confusion_matrix_is_a_crosstab(rows: pd.DataFrame, attacked: Answers) -> None:
    expected = pd.crosstab(rows.label, rows.prediction, normalize="index") * 100
    assert confusion_matrix(attacked) == pytest.approx(expected.to_numpy())


def test_the_calibration_error_is_that_of_every_image_in_turn(rows: pd.DataFrame, attacked: Answers) -> None:
    """Guo et al. 2017, equations 2 to 4, with a loop over bins and images."""
    shown = calibration(attacked)
    assert shown is not None
    for seed in range(3):
        own = rows[rows.seed == seed]
        gaps, weights = [], []
        for m in range(BINS):
            inside = own[(own.confidence > m / BINS) & (own.confidence <= (m + 1) / BINS)]
            if len(inside):
                accuracy = (inside.label == inside.prediction).mean()
                gaps.append(abs(accuracy - inside.confidence.astype(float).mean()))
                weights.append(len(inside) / len(own))
        assert shown.ece[seed] == pytest.approx(np.dot(gaps, weights), abs=1e-6)
        assert shown.mce[seed] == pytest.approx(max(gaps), abs=1e-6)
        assert shown.confidence[seed] == pytest.approx(own.confidence.mean(), abs=1e-6)
        assert shown.accuracy[seed] == pytest.approx((own.label == own.prediction).mean())


def test_tables_and_figures_show_them(cifar10: Group, predictions: Predictions, data: FigureData) -> None:
    (by_class, confusion, calibrated), remarks = class_tables(cifar10, predictions)
    assert not remarks
    assert [label for label, _ in by_class.rows] == [str(i) for i in range(10)]
    assert len(confusion.heads) == 10
    assert [label for label, _ in calibrated.rows] == ["clean", "pgd_restarts"]
    figure = draw("reliability", data)
    assert figure is not None
    answers = predictions.answers[next(key for key in predictions.answers if key.attack == "clean")]
    images, _, correct = answers.bins.sum(0).T
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == pytest.approx(100 * correct[images > 0] / images[images > 0])
    figure = draw("confusion", data)
    assert figure is not None
    assert np.asarray(figure.axes[0].images[0].get_array()).shape == (10, 10)


def test_of_many_classes_the_least_robust_are_shown_and_no_matrix(cifar10: Group) -> None:
    confusion = pd.DataFrame({"seed": 0, "label": range(100), "prediction": 0, "images": 7})
    key = ColumnKey("clean", None, None, None, None)
    (by_class,), remarks = class_tables(
        cifar10, Predictions({}, {}, {key: Answers(confusion, np.zeros((3, BINS, 3)), 700)})
    )
    assert len(by_class.rows) == 20
    assert "The 20 least robust of 100 classes." in by_class.notes
    assert remarks


@pytest.fixture
def changed(digits: Group, tmp_path: Path) -> Path:
    """A copy of the experiment of one seed, to be changed."""
    return Path(shutil.copytree(digits.runs[0].path, tmp_path / "digits"))


def test_rows_of_an_earlier_version_have_no_calibration_and_say_so(changed: Path) -> None:
    for file in changed.glob("results/predictions/*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["confidence"]), file)
    (group,) = load(str(changed)).groups
    predictions = read_predictions(group)
    tables, (remark,) = class_tables(group, predictions)
    assert remark.startswith("Calibration (clean, pgd_restarts): not shown")
    assert [table.title.split(": ")[1].split()[0] for table in tables] == ["accuracy", "confusion"]
    assert draw("reliability", FigureData(group, pd.DataFrame(), predictions)) is None


def test_the_worst_case_is_shown_where_it_is_stored(changed: Path) -> None:
    (file,) = changed.glob("results/predictions/evaluate-mixture-paper*.parquet")
    rows = pq.read_table(file).to_pandas()
    worst = rows[rows.attack == "pgd_restarts"].assign(attack="worst_case", steps=None, prediction=0)
    table = pq.read_table(file).schema.empty_table().from_pandas(worst, pq.read_schema(file), preserve_index=False)
    pq.write_table(table, file.with_name("evaluate-mixture-worst_case.parquet"))
    (group,) = load(str(changed)).groups
    _, column = answered(group, read_predictions(group))
    assert column.name == "worst_case"
    assert (confusion_matrix(column.answers)[:, 0] == 100).all()
