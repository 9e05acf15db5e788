"""Reading predictions in one pass gives what pandas gives with all of them in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import analysis.predictions
from analysis import Group, load
from analysis.columns import CELL_FIELDS, column_key, each, key_of_row
from analysis.predictions import Predictions, read_predictions


def test_predictions_add_up_to_the_evaluations(cifar10: Group, predictions: Predictions) -> None:
    rows = cifar10.frame("evaluations", [*CELL_FIELDS, "seed", "correct"])
    assert len(predictions.correct) * 3 == len(rows)
    for row in each(rows):
        correct = predictions.correct[row.model, key_of_row(row)]
        assert int((correct[row.seed] == 1).sum()) == row.correct
        assert (correct >= 0).all()


def test_gate_weights_are_summed_over_images_and_seeds(cifar10: Group, predictions: Predictions) -> None:
    frame = cifar10.frame("predictions", ["model", "attack", "steps", "label", "gate"])
    frame = frame[(frame.model == "mixture") & (frame.attack == "pgd") & (frame.steps == 50)]
    weights = np.stack(list(frame.gate))
    entropy = -(weights * np.log2(weights)).sum(1)
    (column,) = (c for c in cifar10.columns if c.attack == "pgd" and c.steps == 50)
    sums = predictions.gates[column_key(column)]
    for label in range(10):
        of_class = (frame.label == label).to_numpy()
        assert sums.examples[label] == of_class.sum()
        assert sums.entropy[label] == pytest.approx(entropy[of_class].sum(), rel=1e-4)
        assert sums.loc[label, list(cifar10.experts)].to_numpy() == pytest.approx(weights[of_class].sum(0), rel=1e-4)


def test_predictions_do_not_depend_on_the_order_or_grouping_of_rows(
    digits: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_predictions(digits)
    folder = Path(shutil.copytree(digits.runs[0].path, tmp_path / "digits"))
    table = pq.read_table(folder / "results" / "predictions")
    for file in (folder / "results" / "predictions").iterdir():
        file.unlink()
    order = np.random.default_rng(0).permutation(len(table))
    pq.write_table(table.take(order), folder / "results" / "predictions" / "all.parquet", row_group_size=1000)
    monkeypatch.setattr(analysis.predictions, "_ROWS", 300)
    (group,) = load(str(folder)).groups
    pieces = read_predictions(group)
    assert pieces.correct.keys() == whole.correct.keys()
    assert all((pieces.correct[key] == whole.correct[key]).all() for key in whole.correct)
    for key, sums in whole.gates.items():
        assert pieces.gates[key].sort_index().to_numpy() == pytest.approx(sums.sort_index().to_numpy(), rel=1e-4)
    for key, answers in whole.answers.items():
        assert pieces.answers[key].confusion.equals(answers.confusion)
        assert pieces.answers[key].bins == pytest.approx(answers.bins)
