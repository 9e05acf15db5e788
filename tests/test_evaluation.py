"""The attack grid: rows and predictions of one model."""

from __future__ import annotations

import math

import pytest
import torch

from dwf_cluster import attacks
from dwf_cluster.data.device import DeviceImages, to_float
from dwf_cluster.data.sources import Images
from dwf_cluster.evaluation import evaluate
from dwf_cluster.experiment import Experiment, build
from dwf_cluster.grid import FAMILIES, columns
from dwf_cluster.training import expert, joint

from .conftest import TINY, InDouble

CPU = torch.device("cpu")


def _evaluated(experiment: Experiment, images: Images, name: str, family: str) -> tuple[list[dict], list[dict]]:
    model = joint.build(experiment, images) if name == "mixture" else expert.build(experiment, images, name)
    return evaluate(experiment, model, name, family, DeviceImages(images, experiment.data, CPU))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_column_counts_its_correct_predictions(tiny: Experiment, images: Images, family: str) -> None:
    rows, predictions = _evaluated(tiny, images, "benign", family)
    assert [(r["attack"], r["epsilon"], r["steps"]) for r in rows] == [
        (c.attack, c.epsilon, c.steps) for c in columns(tiny, family)
    ]
    for row in rows:
        own = [p for p in predictions if all(p[key] == row[key] for key in ("attack", "epsilon", "steps"))]
        assert [p["example"] for p in own] == list(range(40))
        assert sum(p["prediction"] == p["label"] for p in own) == row["correct"]
        assert all((p["margin"] > 0) == (p["prediction"] == p["label"]) for p in own)
        assert row["accuracy"] == row["correct"] / 40
        assert {p["gate"] for p in own} == {None}


def test_intervals_are_wilsons(tiny: Experiment, images: Images) -> None:
    (row,), _ = _evaluated(tiny, images, "benign", "pgd_adaptive")
    n, p, z = 40, row["accuracy"], 1.959963984540054
    centre, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert row["accuracy_low"] == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-9)
    assert row["accuracy_high"] == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-9)


def test_the_mixtures_predictions_carry_the_gates_weights_on_the_attacked_image(
    tiny: Experiment, images: Images
) -> None:
    mixture = joint.build(tiny, images)
    data = DeviceImages(images, tiny.data, CPU)
    _, predictions = evaluate(tiny, mixture, "mixture", "pgd", data)
    view = attacks.frozen(mixture)
    x, y = to_float(data.x_test), data.y_test
    *_, attacked = attacks.pgd(view, x, y, epsilon=tiny.pgd.epsilon, step_size=tiny.pgd.step_size, steps=[2])
    last = torch.tensor([p["gate"] for p in predictions if p["steps"] == 2])
    assert last.shape == (40, 3)
    torch.testing.assert_close(last, mixture.gate(attacked))


def test_gradients_are_counted_where_they_are_spent(tiny: Experiment, images: Images) -> None:
    spent = {family: [r["gradients"] for r in _evaluated(tiny, images, "benign", family)[0]] for family in FAMILIES}
    assert spent["fgsm"] == [0, 40, *[0] * 8]  # one gradient serves nine strengths
    assert spent["pgd"] == [40, 40]  # PGD-2 goes on from PGD-1
    assert 80 <= spent["pgd_restarts"][0] <= 160  # 2 x 2 steps, less what was fooled already
    assert spent["pgd_adaptive"] == [80]


def test_the_size_of_the_attacked_batch_does_not_matter(tiny: Experiment, images: Images) -> None:
    small = build("digits", 0, [*TINY, "evaluation.batch_size=7"])
    model, data = InDouble(expert.build(tiny, images, "benign")), DeviceImages(images, tiny.data, CPU)
    for family in ("fgsm", "pgd"):
        (rows, whole), (cut_rows, cut) = (evaluate(e, model, "benign", family, data) for e in (tiny, small))
        assert [r["correct"] for r in rows] == [r["correct"] for r in cut_rows]
        assert [p["margin"] for p in whole] == pytest.approx([p["margin"] for p in cut], abs=1e-5)
