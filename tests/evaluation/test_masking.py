"""Each check for gradient masking fires for a model that was built to have the fault, and rarely for honest models."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.data.device import to_float
from dwf_cluster.data.sources import Images, load
from dwf_cluster.evaluation.check_cost import check_queries
from dwf_cluster.evaluation.run import check
from dwf_cluster.evaluation.settings import Evaluation, Threat
from dwf_cluster.evaluation.significance import ALARM_RATE, LEVEL, TESTS, TOLERANCE, beyond, reversed_order
from dwf_cluster.evaluation.stronger import stronger
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.presets import build
from dwf_cluster.store import tables

COUNT, EPSILON, STEP_SIZE, STEPS = 64, 0.15, 0.03, 5
THREAT = Threat(EPSILON, STEP_SIZE)
NEVER_FOR_PLAIN_MODELS = {"nan", "probabilities", "random", "train_mode", "perturbation"}
TESTED = {"one_step", "more_steps", "converged", "restarts", "scale_free", "transfer", "black_box", "huge_epsilon"}

Rows = Mapping[str, Mapping[str, Any]]


@pytest.fixture(scope="module")
def images() -> Images:
    return load(build("digits").data, Path())


def _network(kind: str) -> nn.Module:
    if kind == "mixture":
        experts = [_network("perceptron"), _network("convolutional"), _network("convolutional")]
        return Mixture(experts, Gate(3, (1, 8, 8), (0.3,), (0.37,), 16))
    if kind == "perceptron":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    convolutions = nn.Conv2d(1, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 12, 3, stride=2, padding=1), nn.ReLU()
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(192, 10))


def _trained(images: Images, kind: str, seed: int, epsilon: float = 0.0, steps: int = 0) -> nn.Module:
    """A small classifier of digits, trained for a second: on clean images, or on PGD from random starts."""
    x, y = to_float(torch.tensor(images.x_train)), torch.tensor(images.y_train)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _network(kind)
        optimizer = torch.optim.Adam(model.parameters(), 4e-3)
        for _ in range(6):
            for batch in torch.randperm(len(x)).split(128):
                attacked, labels, ball = x[batch], y[batch], Ball("linf", epsilon)
                if steps:
                    start = (attacked + epsilon * (2 * torch.rand_like(attacked) - 1)).clamp(0, 1)
                    run = pgd(model, attacked, labels, ball, step_size=2 * epsilon / steps, steps=steps, start=start)
                    *_, last = run
                    attacked = last.x
                optimizer.zero_grad()
                F.cross_entropy(model(attacked), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sound(images: Images) -> nn.Module:
    return _trained(images, "convolutional", 0)


@pytest.fixture(scope="module")
def other(images: Images) -> nn.Module:
    return _trained(images, "perceptron", 1)


def _checks(model: nn.Module, images: Images, count: int = COUNT, **others: nn.Module) -> Rows:
    """Rows of the table `checks`, from the function that the tasks of the pipeline call."""
    settings = Evaluation(probe_steps=STEPS), THREAT
    x, y = images.x_test[:count], images.y_test[:count]
    rows = check(model, "model", x, y, *settings, seed=0, device=torch.device("cpu"), others=others)
    return {row["check"]: row for row in rows}


def test_a_sound_model_shows_no_sign_and_says_which_checks_could_fire(
    sound: nn.Module, other: nn.Module, images: Images
) -> None:
    checks = _checks(sound, images, other=other)
    assert {name for name, row in checks.items() if row["fired"]} == set()
    assert set(checks) == NEVER_FOR_PLAIN_MODELS | TESTED | {"zero_gradients"}
    assert len(TESTED | {"stronger"}) == TESTS
    assert {name for name, row in checks.items() if row["p"] is not None} == TESTED
    assert {name for name, row in checks.items() if not row["could_fire"]} == NEVER_FOR_PLAIN_MODELS
    for name in TESTED:
        assert "the smallest gap that is a sign is" in checks[name]["meaning"]


def test_without_other_models_or_images_left_a_check_cannot_fire(sound: nn.Module, images: Images) -> None:
    assert not _checks(sound, images)["transfer"]["could_fire"]
    few = _checks(sound, images, count=1)
    assert not any(few[name]["could_fire"] or few[name]["fired"] for name in TESTED)
    assert "the test needs" in few["restarts"]["meaning"]


# ---------------------------------------------------------------------------------------------- models with faults


class Fault(nn.Module):
    """A model with something done to its inputs or outputs."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
        after: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.after(self.model(self.before(x)))
        return logits


class _Backward(torch.autograd.Function):
    """The identity, with something done to the gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
        ctx.change = change
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return ctx.change(*ctx.saved_tensors, gradient), None


def _with_gradient(model: nn.Module, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> nn.Module:
    return Fault(model, before=lambda x: _Backward.apply(x, change))  # type: ignore[no-untyped-call]


def _quantised(x: torch.Tensor) -> torch.Tensor:
    return (x * 8).round() / 8  # of gradient zero


def _distance(x: torch.Tensor, images: Images) -> torch.Tensor:
    """L-infinity distance to the nearest clean test image, shape (n, 1, 1, 1)."""
    clean = to_float(torch.tensor(images.x_test[:COUNT]))
    return torch.cdist(x.flatten(1), clean.flatten(1), p=torch.inf).amin(1)[:, None, None, None]


def _misleading(images: Images, radius: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Turn the gradient round within a radius of clean images: PGD from the image itself never gets out."""
    return lambda x, gradient: torch.where(_distance(x, images) < radius, -gradient, gradient)


def _true_at_the_image_alone(images: Images) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """One step is the best attack, because every later gradient points back."""
    return lambda x, gradient: torch.where(_distance(x, images) < 1e-6, gradient, -gradient)


def _of_one_pixel(images: Images, radius: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Within a radius of clean images, show an attack one pixel alone, which it moves to the surface first."""
    corner = torch.zeros(1, 1, 8, 8)
    corner[..., 0, 0] = 1
    return lambda x, gradient: torch.where(_distance(x, images) < radius, corner, gradient)


def _turning(images: Images) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The gradient points back once an image has come close to the surface of its ball."""
    return lambda x, gradient: torch.where(_distance(x, images) > EPSILON - STEP_SIZE / 2, -gradient, gradient)


class Grabbing(nn.Module):
    """A model that changes the images that it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(x)
        x.data.add_(0.05)
        return logits


class DetachedSelection(nn.Module):
    """A gate without gradient selects one of ten experts; each expert's gradient says nothing about the gate."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.Linear(64, 100).requires_grad_(False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            nn.init.normal_(self.experts.weight, std=0.01)
        self.experts.bias.data = 10 * torch.eye(10).flatten()  # expert j nearly always answers j

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.gate(x).argmax(1)
        logits: torch.Tensor = self.experts(x.flatten(1)).view(-1, 10, 10)
        return logits[torch.arange(len(x)), chosen]


FAULTS: list[tuple[str, Callable[[nn.Module, Images], nn.Module]]] = [
    ("nan", lambda model, _: Fault(model, after=lambda logits: logits / 0 * 0)),
    ("nan_under_attack", lambda model, _: Fault(model, after=lambda z: z / (z.requires_grad is False))),
    ("probabilities", lambda model, _: Fault(model, after=lambda logits: logits.softmax(1))),
    ("random", lambda model, _: Fault(model, after=lambda logits: logits + torch.randn_like(logits))),
    ("train_mode", lambda model, _: Fault(model, after=lambda logits: logits - logits.mean(0))),
    ("zero_gradients", lambda model, _: Fault(model, before=_quantised)),
    ("zero_gradients", lambda model, _: Fault(model, after=torch.Tensor.detach)),
    ("zero_gradients", lambda model, _: Fault(model, after=lambda logits: logits * 1e4)),
    ("one_step", lambda model, images: _with_gradient(model, _true_at_the_image_alone(images))),
    ("more_steps", lambda model, images: _with_gradient(model, _turning(images))),
    ("converged", lambda model, images: _with_gradient(model, _of_one_pixel(images, 0.14))),
    ("restarts", lambda model, images: _with_gradient(model, _misleading(images, 0.13))),
    ("scale_free", lambda model, _: Fault(model, after=lambda logits: logits * 1e4)),
    ("perturbation", lambda model, _: Grabbing(model)),
    ("transfer", lambda model, _: Fault(model, before=_quantised)),
    ("transfer", lambda model, _: DetachedSelection(model)),
    ("black_box", lambda model, _: Fault(model, before=_quantised)),
    ("black_box", lambda model, _: DetachedSelection(model)),
    ("huge_epsilon", lambda model, _: Fault(model, before=_quantised)),
    ("huge_epsilon", lambda model, _: DetachedSelection(model)),
]


@pytest.mark.parametrize(("name", "broken"), FAULTS, ids=[f"{i}-{name}" for i, (name, _) in enumerate(FAULTS)])
def test_a_fault_is_found_by_its_check(
    sound: nn.Module,
    other: nn.Module,
    images: Images,
    name: str,
    broken: Callable[[nn.Module, Images], nn.Module],
) -> None:
    row = _checks(broken(sound, images), images, other=other)[name]
    assert row["fired"], row
    assert row["could_fire"]
    assert row["value"] > row["limit"]
    assert (row["p"] is None) == (name not in TESTED)
    assert row["p"] is None or row["p"] <= LEVEL


def test_a_model_with_a_misleading_gradient_near_the_image_is_found_by_restarts_alone(
    sound: nn.Module, other: nn.Module, images: Images
) -> None:
    """The pattern of ADVMoE in the paper's table 3: PGD-50 leaves 42.7 %, restarts 8.1 %."""
    checks = _checks(_with_gradient(sound, _misleading(images, 0.13)), images, other=other)
    assert checks["restarts"]["value"] > 0.3
    assert not checks["one_step"]["fired"]
    assert not checks["more_steps"]["fired"]


def test_in_l2_every_attack_stays_in_the_l2_ball_and_square_cannot_contradict(sound: nn.Module, images: Images) -> None:
    settings = Evaluation(probe_steps=STEPS), Threat(0.75, 0.15, "l2")
    x, y = images.x_test[:COUNT], images.y_test[:COUNT]
    rows = check(sound, "model", x, y, *settings, seed=0, device=torch.device("cpu"))
    checks = {row["check"]: row for row in rows}
    assert -0.75 < checks["perturbation"]["value"] < 1e-5
    assert checks["perturbation"]["value"] == pytest.approx(0, abs=1e-5)  # the attacks use the whole ball
    assert not checks["black_box"]["could_fire"]


# ------------------------------------------------------------------------------------ the tests, and `stronger`


def _of(count: int, images: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return np.arange(images) < count


@pytest.mark.parametrize("images", [8, 64, 360])
def test_the_threshold_of_a_gap_is_that_of_scipys_exact_binomial_test(images: int) -> None:
    for count in range(images + 1):
        result = beyond("name", np.ones(images, bool), _of(count, images), "figures")
        p = binomtest(count, images, TOLERANCE, alternative="greater").pvalue
        assert result.p == pytest.approx(p)
        assert result.fired == (p <= LEVEL)


@pytest.mark.parametrize("differing", [0, 3, 8, 40])
def test_the_threshold_of_a_reversed_order_is_that_of_mcnemars_exact_test(differing: int) -> None:
    images = 100
    for only_weak in range(differing + 1):
        weak = ~_of(only_weak, images)
        strong = ~(_of(differing, images) & weak)
        result = reversed_order("name", weak, strong, "figures")
        p = binomtest(only_weak, differing, alternative="greater").pvalue if differing else 1.0
        assert result.p == pytest.approx(p)
        assert result.fired == (p <= LEVEL)
        assert result.value == pytest.approx((2 * only_weak - differing) / images)


def test_the_black_box_has_queries_in_proportion_to_the_image() -> None:
    assert [check_queries(values) for values in (64, 1024, 3 * 32 * 32, 3 * 224 * 224)] == [300, 1666, 5000, 5000]


def _predictions(**fooled: int) -> pa.Table:
    """A hundred images, of which each attack fools the last ones."""
    within = {"model": "model", "norm": "linf", "epsilon": EPSILON, "steps": 10, "source": None, "label": 0}
    rows = [
        {**within, "attack": attack, "example": example, "prediction": int(example >= 100 - count)}
        for attack, count in fooled.items()
        for example in range(50 if attack == "autoattack" else 100)
    ]
    return pa.Table.from_pylist(rows, schema=tables.SCHEMAS["predictions"])


def test_an_attack_of_the_table_that_beats_restarts_is_a_sign() -> None:
    (row,) = stronger(_predictions(pgd=40, pgd_restarts=42, pgd_route=70), "model", THREAT)
    assert row["fired"]
    assert row["value"] == pytest.approx(0.28)
    assert row["meaning"].startswith(
        "PGD with restarts leaves 58.0%, it and all other attacks of the table 30.0%; the strongest beside it is "
        "pgd_route; the smallest gap"
    )
    (row,) = stronger(_predictions(pgd=40, pgd_restarts=42, pgd_route=45), "model", THREAT)
    assert not row["fired"]
    assert row["could_fire"]


def test_attacks_outside_the_threat_model_are_no_sign_and_a_part_of_the_images_is_compared_alone() -> None:
    predictions = _predictions(pgd=40, pgd_restarts=42, pgd_route=70)
    (row,) = stronger(predictions, "model", Threat(EPSILON, STEP_SIZE))
    assert row["examples"] == 100
    assert stronger(predictions, "model", Threat(EPSILON / 2, STEP_SIZE)) == []
    assert stronger(predictions, "model", Threat(EPSILON, STEP_SIZE, "l2")) == []
    assert stronger(predictions, "another", THREAT) == []
    (row,) = stronger(_predictions(pgd=40, pgd_restarts=42, autoattack=70), "model", THREAT)
    assert row["examples"] == 50
    assert row["value"] == pytest.approx(20 / 50)


# -------------------------------------------------------------------------------------------------- honest models


def test_twenty_honest_models_raise_no_more_than_the_stated_rate_of_alarms(images: Images, other: nn.Module) -> None:
    trainings = [("perceptron", 0.0, 0), ("perceptron", 0.1, 3), ("convolutional", 0.0, 0), ("convolutional", 0.1, 3)]
    kinds = [*itertools.product(trainings, range(4)), *itertools.product([("mixture", 0.1, 2)], range(4))]
    models = [_trained(images, kind, seed, epsilon, steps) for (kind, epsilon, steps), seed in kinds]
    alarms = [name for model in models for name, row in _checks(model, images, other=other).items() if row["fired"]]
    assert len(models) == 20
    assert len(alarms) <= ALARM_RATE * len(models), alarms
