"""One pass over the predictions finds what pandas finds with all of them in memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import analysis.outcomes
import numpy as np
import pyarrow.parquet as pq
import pytest

from analysis import Group, load
from analysis.predictions import Predictions, read_predictions
from analysis.results import column_key, each, key_of_row


def test_it_adds_up_to_the_evaluations(cifar10: Group, found: Predictions) -> None:
    rows = cifar10.frame("evaluations", ["model", "attack", "source", "epsilon", "steps", "seed", "correct"])
    assert len(found.correct) * 3 == len(rows)
    for row in each(rows):
        right = found.correct[row.model, key_of_row(*row[1:5])]
        assert int((right[row.seed] == 1).sum()) == row.correct
        assert (right >= 0).all()


def test_gates_are_means_over_images_and_seeds(cifar10: Group, found: Predictions) -> None:
    frame = cifar10.frame("predictions", ["model", "attack", "steps", "label", "gate"])
    frame = frame[(frame.model == "mixture") & (frame.attack == "pgd") & (frame.steps == 50)]
    weights = np.stack(list(frame.gate))
    entropy = -(weights * np.log2(weights)).sum(1)
    (column,) = (c for c in cifar10.columns if c.attack == "pgd" and c.steps == 50)
    sums = found.gates[column_key(column)]
    for label in range(10):
        here = (frame.label == label).to_numpy()
        assert sums.examples[label] == here.sum()
        assert sums.entropy[label] == pytest.approx(entropy[here].sum(), rel=1e-4)
        assert sums.loc[label, list(cifar10.experts)].to_numpy() == pytest.approx(weights[here].sum(0), rel=1e-4)


def test_rows_may_come_in_any_order_and_in_any_pieces(
    digits: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read_predictions(digits)
    folder = Path(shutil.copytree(digits.runs[0].path, tmp_path / "digits"))
    table = pq.read_table(folder / "results" / "predictions")
    for file in (folder / "results" / "predictions").iterdir():
        file.unlink()
    order = np.random.default_rng(0).permutation(len(table))
    pq.write_table(table.take(order), folder / "results" / "predictions" / "all.parquet", row_group_size=1000)
    monkeypatch.setattr(analysis.outcomes, "_ROWS", 300)
    (group,) = load(str(folder)).groups
    pieces = read_predictions(group)
    assert pieces.correct.keys() == whole.correct.keys()
    assert all((pieces.correct[key] == whole.correct[key]).all() for key in whole.correct)
    for where, sums in whole.gates.items():
        assert pieces.gates[where].sort_index().to_numpy() == pytest.approx(sums.sort_index().to_numpy(), rel=1e-4)
