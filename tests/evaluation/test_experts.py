"""The suite `experts` gives what each expert, and each mixture without one, gives alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.evaluation.column import expert_columns
from dwf_cluster.evaluation.experts import WithoutExpert
from dwf_cluster.evaluation.run import evaluate
from dwf_cluster.evaluation.settings import Evaluation, Threat
from dwf_cluster.models.mixture import Gate, Mixture

from ..conftest import InDouble

NAMES = ("benign", "fgsm-1", "pgd-1")
EVALUATION = Evaluation(pgd_steps=(2, 5), batch_size=7)
THREAT = Threat(0.1, 0.03)
OPTIONS: dict[str, Any] = {"seed": 0, "device": torch.device("cpu")}


def _expert() -> nn.Module:
    return InDouble(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4)))


@pytest.fixture(params=[False, True], ids=["soft", "hard"])
def mixture(request: pytest.FixtureRequest) -> Mixture:
    """A mixture in double precision: rounding must decide nothing."""

    class DoubleGate(Gate):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.double())

    torch.manual_seed(0)
    gate = DoubleGate(3, (1, 8, 8), (0.5,), (0.1,), 8, request.param).double()
    gate.layers.register_forward_pre_hook(lambda module, arguments: (arguments[0].double(),))
    return Mixture((_expert() for _ in NAMES), gate).eval()


@pytest.fixture
def images() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return random.random((20, 1, 8, 8), np.float32), random.integers(0, 4, 20)


def _evaluated(mixture: nn.Module, x: Any, y: Any, **options: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    arguments = ("mixture", "experts", x, y, EVALUATION, (THREAT, Threat(0.2, 0.06)))
    rows, predictions = evaluate({"mixture": mixture}, *arguments, **OPTIONS, **options)
    return pd.DataFrame(rows), pd.DataFrame(predictions)


def _last(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The images of PGD-5 on a model."""
    *_, last = pgd(model, x, y, Ball("linf", THREAT.epsilon), step_size=THREAT.step_size, steps=5)
    return last.x


def _without(mixture: Mixture, dropped: int) -> nn.Module:
    """The slow, obvious way, for a soft gate: softmax over the logits of the other experts."""

    class Reduced(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept = [i for i in range(3) if i != dropped]
            weights = mixture.gate.layers[:-1](x.double())[:, kept].softmax(1)
            if mixture.gate.hard:  # in both directions as a straight-through estimator
                hard = torch.eye(2, dtype=weights.dtype)[weights.argmax(1)]
                weights = hard + weights - weights.detach()
            return sum(weights[:, [k]] * mixture.experts[i](x) for k, i in enumerate(kept))  # type: ignore[return-value]

    return Reduced()


def test_every_column_is_the_attack_run_alone(mixture: Mixture, images: tuple[Any, Any]) -> None:
    x, y = torch.tensor(images[0]), torch.tensor(images[1])
    rows, predictions = _evaluated(mixture, *images, experts=NAMES)
    shown: Mapping[tuple[str, str], list[int]] = predictions.groupby(["attack", "source"]).prediction.apply(list)
    on_mixture = _last(mixture, x, y)
    for i, (name, expert) in enumerate(zip(NAMES, mixture.experts, strict=True)):
        reduced = _without(mixture, i)
        with torch.no_grad():
            expected = {
                ("expert_clean", name): expert(x),
                ("expert_pgd", name): expert(on_mixture),
                ("expert_dropped_clean", name): reduced(x),
            }
        expected["expert_dropped_pgd", name] = reduced(_last(reduced, x, y))
        moved = _last(expert, x, y)
        for other, tested in zip(NAMES, mixture.experts, strict=True):
            expected[f"expert_transfer_{other}", name] = tested(moved)
        for key, logits in expected.items():
            assert shown[key] == logits.argmax(1).tolist(), key
    assert rows.model.unique().tolist() == ["mixture"]
    assert predictions.gate.map(sum).to_numpy() == pytest.approx(1)
    by_attack = rows.groupby("attack").gradients.sum()
    assert by_attack["expert_pgd"] == 5 * 20
    assert by_attack["expert_dropped_pgd"] == 3 * 5 * 20


def test_the_columns_are_those_of_the_registry_under_the_primary_threat_model(
    mixture: Mixture, images: tuple[Any, Any]
) -> None:
    rows, _ = _evaluated(mixture, *images, experts=NAMES)
    expected = [tuple(column.settings.values()) for column in expert_columns(EVALUATION, THREAT, NAMES)]
    settings = rows[list(expert_columns(EVALUATION, THREAT, NAMES)[0].settings)].astype(object)
    assert set(settings.where(settings.notna(), None).itertuples(index=False, name=None)) == set(expected)
    assert len(rows) == len(expected)
    assert not rows.duplicated(["attack", "source", "norm", "epsilon", "steps"]).any()


def test_experts_without_names_are_numbered(mixture: Mixture, images: tuple[Any, Any]) -> None:
    rows, _ = _evaluated(mixture, *images)
    assert set(rows.source) == {"expert-1", "expert-2", "expert-3"}


def test_a_gate_that_trusts_the_dropped_expert_alone_leaves_equal_weights() -> None:
    class Certain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[1.0, 0.0, 0.0]]).expand(len(x), 3)

    mixture = Mixture((_expert() for _ in NAMES), Certain())
    x = torch.rand(4, 1, 8, 8)
    expected = (mixture.experts[1](x) + mixture.experts[2](x)) / 2
    assert torch.allclose(WithoutExpert(mixture, 0)(x), expected)
