"""PGD whose iterates repeat: fewer images pass through the model, and no bit of a result differs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import Objective, carlini_wagner, cross_entropy, differentiate, target_margin
from dwf_cluster.attacks.pgd import Iterate, pgd
from dwf_cluster.attacks.repeats import Gradients
from dwf_cluster.attacks.routing import expert_aimed, gate_aimed
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.resnet import ResNet

BALL, STEP_SIZE, STEPS = Ball("linf", 0.02), 0.005, 40
NETWORK, MIXTURE = "network", "mixture"


class Counted(nn.Module):
    """A network that counts the images of its passes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.images = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.images += len(x)
        logits: torch.Tensor = self.network(x)
        return logits


def _model(name: str) -> nn.Module:
    networks = [Counted(ResNet(10, (0.5,), (0.25,), width=4)) for _ in range(1 if name == NETWORK else 3)]
    model = networks[0] if name == NETWORK else Mixture(networks, Gate(3, (1, 8, 8), (0.5,), (0.25,), hidden=8))
    return frozen(model.eval())


def _images(model: nn.Module, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with the labels that the model gives to them; the attacks change some of these answers."""
    x = torch.rand(count, 1, 8, 8)
    with torch.no_grad():
        return x, model(x).argmax(1)


def _passed(model: nn.Module) -> int:
    """Images that have passed through the first network."""
    return next(module.images for module in model.modules() if isinstance(module, Counted))


def _slow(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    objective: Objective,
    target: torch.Tensor | None,
    momentum: float,
    drop_fooled: bool,
) -> Iterator[Iterate]:
    """PGD that computes all gradients."""
    labels = y if target is None else torch.stack([y, target], 1)
    iterate, index, velocity = x.clone(), torch.arange(len(x)), torch.zeros_like(x)
    for step in range(STEPS):
        gradient, _, logits = differentiate(model, iterate, labels, objective)
        yield Iterate(step, index, iterate, logits, gradient, len(index))
        if drop_fooled:
            kept = logits.argmax(1) == y
            if not kept.any():
                return
            x, y, labels, index = x[kept], y[kept], labels[kept], index[kept]
            iterate, gradient, velocity = iterate[kept], gradient[kept], velocity[kept]
        if momentum:
            gradient = velocity = momentum * velocity + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        iterate = BALL.project(x, iterate + STEP_SIZE * gradient.sign())
    yield Iterate(STEPS, index, iterate)


def _assert_equal(run: Iterator[Iterate], expected: Iterator[Iterate]) -> None:
    for one, other in zip(run, expected, strict=True):
        assert (one.step, one.gradient_count) == (other.step, other.gradient_count)
        for name in ("index", "x", "logits", "gradient"):
            value, wanted = getattr(one, name), getattr(other, name)
            assert (value is None and wanted is None) or torch.equal(value, wanted), (one.step, name)


@pytest.mark.parametrize("drop_fooled", [False, True], ids=["all images", "drop fooled"])
@pytest.mark.parametrize(
    ("name", "objective", "momentum"),
    [
        (NETWORK, cross_entropy, 0.0),
        (NETWORK, carlini_wagner, 0.0),
        (NETWORK, target_margin, 0.0),
        (MIXTURE, cross_entropy, 0.0),
        (MIXTURE, gate_aimed, 0.0),
        (MIXTURE, expert_aimed(1), 0.0),
        (NETWORK, cross_entropy, 0.5),
    ],
)
def test_a_run_equals_one_that_computes_all_gradients_bit_for_bit(
    name: str, objective: Objective, momentum: float, drop_fooled: bool
) -> None:
    torch.manual_seed(0)
    model = _model(name)
    x, y = _images(model, 240)
    target = (y + 1) % 10 if objective is target_margin else None
    settings: dict[str, Any] = {"objective": objective, "momentum": momentum, "drop_fooled": drop_fooled}
    before = _passed(model)
    expected = list(_slow(model, x, y, target=target, **settings))
    slow, before = _passed(model) - before, _passed(model)
    _assert_equal(pgd(model, x, y, BALL, step_size=STEP_SIZE, steps=STEPS, target=target, **settings), iter(expected))
    if not momentum:  # which repeats later, if ever
        assert _passed(model) - before < slow


def test_images_that_all_repeat_pass_no_more() -> None:
    """Without a gradient no image moves. Two iterates are computed, and one smaller pass is compared."""
    model = Counted(_Constant())
    x = torch.rand(100, 1, 8, 8)
    run = list(pgd(model, x, torch.zeros(100, dtype=torch.int64), BALL, step_size=STEP_SIZE, steps=STEPS))
    assert len(run) == STEPS + 1
    assert 200 < model.images <= 200 + 64


class _Constant(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * x.flatten(1)[:, :3] + torch.tensor([1.0, 2.0, 3.0])


class _Random(nn.Module):
    """Draws noise in each pass."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3] * (1 + 1e-3 * torch.rand(len(x), 1))


class _ByBatch(nn.Module):
    """Its outputs depend on the whole batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3] * x.mean()


@pytest.mark.parametrize("network", [_Random(), _ByBatch()], ids=["random", "by batch"])
def test_of_a_model_that_gives_an_image_several_outputs_all_gradients_are_computed(network: nn.Module) -> None:
    """Its iterates repeat: the signs of its gradients never change. Two smaller passes are compared, and differ."""
    model = Counted(network)
    x = torch.rand(100, 1, 8, 8)
    y = torch.zeros(100, dtype=torch.int64)
    torch.manual_seed(0)
    run = list(pgd(model, x, y, BALL, step_size=STEP_SIZE, steps=STEPS))
    assert torch.equal(run[-1].x, run[-3].x)
    assert 100 * STEPS < model.images < 100 * (STEPS + 2)


class _RoundsSmallBatches(nn.Module):
    """Has other outputs for fewer images than a limit, as libraries round sums in another way there."""

    LIMIT = 40

    def __init__(self) -> None:
        super().__init__()
        self.network = ResNet(10, (0.5,), (0.25,), width=4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x)
        return logits if len(x) >= self.LIMIT else logits * (1 + 1e-6)


@pytest.mark.parametrize("drop_fooled", [False, True], ids=["all images", "drop fooled"])
def test_no_value_of_a_pass_is_used_that_rounds_in_another_way(drop_fooled: bool) -> None:
    torch.manual_seed(0)
    model = frozen(_RoundsSmallBatches().eval())
    x, y = _images(model, 240)
    expected = _slow(model, x, y, cross_entropy, None, 0.0, drop_fooled)
    _assert_equal(pgd(model, x, y, BALL, step_size=STEP_SIZE, steps=STEPS, drop_fooled=drop_fooled), expected)


def test_values_of_a_large_batch_are_not_taken_for_those_of_a_small_one() -> None:
    torch.manual_seed(0)
    model = frozen(_RoundsSmallBatches().eval())
    x, y = _images(model, 100)
    gradients = Gradients(model, cross_entropy, 1)
    for _ in range(4):
        gradients.at(x, y, check=False)
    few = torch.arange(100) < _RoundsSmallBatches.LIMIT - 10
    gradients.keep(few)
    gradient, logits = gradients.at(x[few], y[few], check=False)
    expected, _, expected_logits = differentiate(model, x[few], y[few])
    assert torch.equal(gradient, expected)
    assert torch.equal(logits, expected_logits)
