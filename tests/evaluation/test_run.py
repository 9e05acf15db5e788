"""The suites: shards and predictions of one model, and how they are merged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.attacks.pgd import fgsm, pgd
from dwf_cluster.data.device import to_float
from dwf_cluster.data.sources import Images
from dwf_cluster.defences.registry import METHODS
from dwf_cluster.determinism import Draws
from dwf_cluster.evaluation import merge
from dwf_cluster.evaluation.registry import Column, columns, suite_names
from dwf_cluster.evaluation.run import check, evaluate
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Mixture
from dwf_cluster.presets import build
from dwf_cluster.store import Store, tables

from ..conftest import TINY, InDouble, untrained_model

CPU = torch.device("cpu")
EVERYTHING = [
    *TINY,
    "evaluation.pgd_steps=1,3",
    "evaluation.restart_steps=4",
    "evaluation.adaptive_steps=4",
    "evaluation.beyond=pgd_gate,pgd_expert,pgd_route,pgd_momentum,pgd_cw,pgd_l2,pgd_l1,pgd_targeted,apgd,apgd_l2,"
    "square,autoattack,noise,curves,transfer",
    "evaluation.targets=2",
    "evaluation.curve_multiples=0.5,1",
    "evaluation.curve_steps=3",
    "evaluation.curve_restarts=2",
    "evaluation.apgd_steps=6",
    "evaluation.square_queries=10",
]


@pytest.fixture
def everything() -> Experiment:
    return build("digits", 0, EVERYTHING)


def _models(experiment: Experiment, images: Images) -> dict[str, torch.nn.Module]:
    """Experts and mixture, untrained, in double precision: rounding must decide nothing."""
    experts = {name: untrained_model(experiment, images, name) for name in experiment.names if name != "mixture"}
    for model in (mixture := untrained_model(experiment, images, "mixture"), *experts.values()):
        model.train()
        for _ in range(3):
            model(to_float(torch.tensor(images.x_train)))
    return {name: InDouble(model) for name, model in experts.items()} | {"mixture": mixture.double()}


def _suites(experiment: Experiment, name: str) -> tuple[str, ...]:
    """Suites that a model is attacked by; the last, `checks`, attacks nothing that counts."""
    return suite_names(experiment.evaluation, METHODS[experiment.spec(name).method].has_gate)[:-1]


def _evaluated(
    experiment: Experiment, images: Images, name: str, suite: str, shard: slice = slice(0, 40)
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    models = _models(experiment, images)
    if name == "mixture":
        models["mixture"] = _PixelsInDouble(models["mixture"])
    wanted = models if "transfer" in experiment.evaluation.beyond and suite == "paper" else {name: models[name]}
    return _evaluate(experiment, wanted, name, suite, images.x_test[shard], images.y_test[shard], shard.start)


def _evaluate(
    experiment: Experiment,
    models: dict[str, torch.nn.Module],
    name: str,
    suite: str,
    x: np.ndarray[Any, Any],
    y: np.ndarray[Any, Any],
    first: int = 0,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    settings = (experiment.evaluation, experiment.threats)
    return evaluate(models, name, suite, x, y, *settings, seed=experiment.seed, device=CPU, first=first)


class _PixelsInDouble(Mixture):
    """A mixture in double precision that takes images in single precision."""

    def __init__(self, mixture: torch.nn.Module) -> None:
        assert isinstance(mixture, Mixture)
        super().__init__((InDouble(e) for e in mixture.experts), InDouble(mixture.gate))


def _own(predictions: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    keys = ("model", "attack", "source", "epsilon", "steps")
    return [p for p in predictions if all(p[key] == row[key] for key in keys)]


@pytest.mark.parametrize("name", ["fgsm-1", "mixture"])
def test_every_column_of_every_suite_counts_its_correct_predictions(
    everything: Experiment, images: Images, name: str
) -> None:
    for suite in _suites(everything, name):
        rows, predictions = _evaluated(everything, images, name, suite)
        attacked = [row for row in rows if row["attack"] != "transfer"]
        assert [{key: row[key] for key in Column("clean").settings} for row in attacked] == [
            column.settings for column in columns(everything.evaluation, everything.threats, suite)
        ]
        for row in rows:
            own = _own(predictions, row)
            assert [p["example"] for p in own] == list(range(40))
            assert sum(p["prediction"] == p["label"] for p in own) == row["correct"]
            assert all((p["margin"] > 0) == (p["prediction"] == p["label"]) for p in own)
            assert row["perturbation"] <= (row["epsilon"] or 0) + 1e-6
            assert all((p["gate"] is None) == (row["model"] != "mixture") for p in own)


def test_each_of_the_17_columns_is_the_attack_run_alone_on_the_whole_model(
    everything: Experiment, images: Images
) -> None:
    """The slow, obvious way: a run for each column, nothing shared, nothing dropped, nothing folded."""
    model = _models(everything, images)["fgsm-1"].eval()
    rows, predictions = _evaluated(everything, images, "fgsm-1", "paper")
    x, y = to_float(torch.tensor(images.x_test)), torch.tensor(images.y_test)
    threat = everything.threat
    ball = Ball("linf", threat.epsilon)
    generators = [Draws((0, "fgsm-1", "paper", i)).generator("attack") for i in range(40)]
    starts = [x, *(ball.random_point(x, generators) for _ in range(1, everything.evaluation.restarts))]

    def right(images: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model(images).argmax(1) == y

    def run(steps: int, start: torch.Tensor = x) -> list[torch.Tensor]:
        return [it.x for it in pgd(model, x, y, ball, step_size=threat.step_size, steps=steps, start=start)]

    for row in rows:
        if row["attack"] == "clean":
            expected = right(x)
        elif row["attack"] == "fgsm":
            expected = right(fgsm(x, differentiate(model, x, y)[0], row["epsilon"]))
        elif row["attack"] == "pgd_restarts":
            expected = torch.stack([right(z) for start in starts for z in run(row["steps"], start)]).all(0)
        elif row["attack"] != "transfer":
            expected = right(run(row["steps"])[-1])
        if row["attack"] != "transfer":
            correct = [p["prediction"] == p["label"] for p in _own(predictions, row)]
            assert correct == expected.tolist(), row
    accuracies = {row["attack"]: row["correct"] for row in rows}
    assert accuracies["pgd_restarts"] < accuracies["clean"]


def test_transfer_tests_the_images_of_one_model_on_each_other(everything: Experiment, images: Images) -> None:
    rows, predictions = _evaluated(everything, images, "benign", "paper")
    transferred = [row for row in rows if row["attack"] == "transfer"]
    assert [(row["model"], row["source"]) for row in transferred] == [
        (name, "benign") for name in ("fgsm-1", "pgd-1", "mixture")
    ]
    models = _models(everything, images)
    x, y = to_float(torch.tensor(images.x_test)), torch.tensor(images.y_test)
    ball = Ball("linf", everything.pgd.epsilon)
    *_, made = pgd(models["benign"].eval(), x, y, ball, step_size=everything.pgd.step_size, steps=3)
    for name in ("fgsm-1", "pgd-1"):
        (row,) = (row for row in transferred if row["model"] == name)
        with torch.no_grad():
            assert [p["prediction"] for p in _own(predictions, row)] == models[name].eval()(made.x).argmax(1).tolist()


def test_gradients_are_counted_where_they_are_spent(
    everything: Experiment, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, counted = torch.autograd.grad, []

    def counting(total: torch.Tensor, leaf: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        counted.append(len(leaf))
        return real(total, leaf, **options)

    monkeypatch.setattr(torch.autograd, "grad", counting)
    for suite in _suites(everything, "mixture"):
        counted.clear()
        rows, _ = _evaluated(everything, images, "mixture", suite)
        assert sum(row["gradients"] for row in rows) == sum(counted), suite
        spent = [row["gradients"] for row in rows if row["attack"] != "transfer"]
        if suite == "paper":
            # One gradient serves nine strengths and PGD-1; PGD-3 continues from it; the adaptive run from PGD-3.
            assert spent[:12] == [0, 40, *[0] * 8, 0, 80]
            *_, restarts, adaptive = spent
            assert adaptive == 40
            assert restarts < 40 * 4  # another start of four steps, less the images that were fooled already


def test_more_eot_samples_are_a_run_of_their_own(images: Images) -> None:
    experiment = build("digits", 0, [*EVERYTHING, "evaluation.eot=2"])
    rows, _ = _evaluated(experiment, images, "benign", "paper")
    (row,) = (row for row in rows if row["attack"] == "pgd_adaptive")
    assert row["gradients"] == 40 * 4 * 2
    assert row["eot"] == 2


def test_the_mixtures_predictions_carry_the_gates_weights_on_the_attacked_image(
    tiny: Experiment, images: Images
) -> None:
    mixture = untrained_model(tiny, images, "mixture")
    _, predictions = _evaluate(tiny, {"mixture": mixture}, "mixture", "paper", images.x_test, images.y_test)
    frozen_mixture = frozen(mixture)
    x, y = to_float(torch.tensor(images.x_test)), torch.tensor(images.y_test)
    ball = Ball("linf", tiny.pgd.epsilon)
    *_, attacked = pgd(frozen_mixture, x, y, ball, step_size=tiny.pgd.step_size, steps=2)
    last = torch.tensor([p["gate"] for p in predictions if p["attack"] == "pgd" and p["steps"] == 2])
    assert last.shape == (40, 3)
    torch.testing.assert_close(last, mixture.gate(attacked.x))


def test_shards_of_the_test_set_give_the_same_rows_as_the_whole(
    everything: Experiment, images: Images, store: Store
) -> None:
    """Draws belong to an image's place in the test set, so neither shards nor batches change them."""
    small = build("digits", 0, [*EVERYTHING, "evaluation.batch_size=8"])
    for suite in ("paper", "apgd", "square"):
        shards = [slice(0, 16), slice(16, 32), slice(32, 40)]
        predictions = []
        for number, shard in enumerate(shards):
            rows, part = _evaluated(small, images, "fgsm-1", suite, shard)
            tables.write(store, "shards", f"{suite}-{number}", rows)
            predictions += part
        merge.merge(store, {suite: [f"{suite}-{number}" for number in range(3)]})
        merged = tables.read(store, "evaluations", [suite]).to_pylist()
        whole, whole_predictions = _evaluated(everything, images, "fgsm-1", suite)
        for row, expected in zip(merged, whole, strict=True):
            for key in ("model", "attack", "source", "epsilon", "steps", "examples", "correct", "gradients"):
                assert row[key] == expected[key]
            assert row["perturbation"] == pytest.approx(expected["perturbation"], abs=1e-7)
        for row in whole:
            ours, theirs = _own(predictions, row), _own(whole_predictions, row)
            assert [p["example"] for p in ours] == list(range(40))
            assert [p["margin"] for p in ours] == pytest.approx([p["margin"] for p in theirs], abs=1e-5)


def test_a_merge_waits_for_every_shard_and_computes_wilson_intervals(
    tiny: Experiment, images: Images, store: Store
) -> None:
    rows, _ = _evaluated(tiny, images, "benign", "paper")
    tables.write(store, "shards", "first", rows)
    merge.merge(store, {"merged": ["first", "second"]})
    assert not tables.files(store, "evaluations")
    merge.merge(store, {"merged": ["first"]})
    for row in tables.read(store, "evaluations", ["merged"]).to_pylist():
        n, p, z = 40, row["accuracy"], 1.959963984540054
        centre, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert row["accuracy_low"] == pytest.approx((centre - half) / (1 + z * z / n), abs=1e-9)
        assert row["accuracy_high"] == pytest.approx((centre + half) / (1 + z * z / n), abs=1e-9)


def test_the_test_set_is_read_a_batch_at_a_time(images: Images, tmp_path: Path) -> None:
    class Watched(np.ndarray):  # type: ignore[type-arg]
        read: list[int] = []  # noqa: RUF012

        def __getitem__(self, key: Any) -> Any:
            rows_read = super().__getitem__(key)
            self.read.append(len(rows_read) if rows_read.ndim == 4 else 1)
            return np.asarray(rows_read)

    np.save(tmp_path / "x.npy", images.x_test)
    streamed = np.load(tmp_path / "x.npy", mmap_mode="r").view(Watched)
    experiment = build("digits", 0, [*TINY, "evaluation.batch_size=16"])
    model = untrained_model(experiment, images, "benign")
    rows, _ = _evaluate(experiment, {"benign": model}, "benign", "paper", streamed, images.y_test)
    assert rows[0]["examples"] == 40
    assert Watched.read == [16, 16, 8]


def test_each_model_is_checked_for_masking(tiny: Experiment, images: Images) -> None:
    model = untrained_model(tiny, images, "benign")
    settings = (images.x_test[:8], images.y_test[:8], tiny.evaluation, tiny.threat)
    rows = check(model, "benign", *settings, seed=tiny.seed, device=CPU)
    assert {row["check"] for row in rows} >= {"nan", "probabilities", "black_box", "huge_epsilon"}
    assert {(row["model"], row["examples"]) for row in rows} == {("benign", 8)}
