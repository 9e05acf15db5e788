"""PGD that reuses gradients: fewer images pass through the model, and no bit of a result differs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import Objective, carlini_wagner, cross_entropy, differentiate, target_margin
from dwf_cluster.attacks.gradient_cache import GradientCache
from dwf_cluster.attacks.pgd import Iterate, pgd
from dwf_cluster.attacks.routing import expert_aimed, gate_aimed
from dwf_cluster.models import deterministic
from dwf_cluster.models.frozen import WHOLE_BATCH, frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.resnet import ResNet

BALL, STEP_SIZE, STEPS = Ball("linf", 0.02), 0.005, 40
NETWORK, MIXTURE = "network", "mixture"
SHAPE = (1, 8, 8)


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the modules of this file be plain layers, as the package's own are."""
    plain = (*deterministic._PLAIN, Counted, Constant, RoundedInSmallBatches)
    monkeypatch.setattr("dwf_cluster.models.deterministic._PLAIN", plain)


class Counted(nn.Module):
    """A network that keeps the sizes of its passes."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.sizes: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(x))
        logits: torch.Tensor = self.network(x)
        return logits


class Constant(nn.Module):
    """Has no gradient, so no image moves."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0 * x.flatten(1)[:, :3] + torch.tensor([1.0, 2.0, 3.0])


class RoundedInSmallBatches(nn.Module):
    """Has other outputs for fewer images than a limit, as libraries round sums in another way there."""

    def __init__(self, limit: int, change: str) -> None:
        super().__init__()
        self.network = ResNet(10, (0.5,), (0.25,), width=4)
        self.limit, self.change = limit, change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network(x)
        if len(x) >= self.limit:
            return logits
        return logits * (1 + 1e-6) if self.change == "gradient" else logits + 2.0**-10


def _model(name: str) -> nn.Module:
    torch.manual_seed(0)
    networks = [Counted(ResNet(10, (0.5,), (0.25,), width=4)) for _ in range(1 if name == NETWORK else 2)]
    model = networks[0] if name == NETWORK else Mixture(networks, Gate(2, SHAPE, (0.5,), (0.25,), hidden=8))
    return frozen(model.eval())


def _rounded_in_small_batches(limit: int, change: str = "gradient") -> nn.Module:
    torch.manual_seed(0)
    return frozen(Counted(RoundedInSmallBatches(limit, change)).eval())


def _images(model: nn.Module, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with the labels that the model gives to them; the attacks change some of these answers."""
    x = torch.rand(count, *SHAPE)
    with torch.no_grad():
        return x, model(x).argmax(1)


def _sizes(model: nn.Module) -> list[int]:
    """Sizes of the passes since the last call."""
    counted = next(module for module in model.modules() if isinstance(module, Counted))
    sizes, counted.sizes[:] = list(counted.sizes), []
    return sizes


def _slow(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    objective: Objective = cross_entropy,
    target: torch.Tensor | None = None,
    momentum: float = 0.0,
    drop_fooled: bool = False,
    eot: int = 1,
) -> Iterator[Iterate]:
    """PGD that computes all gradients."""
    labels = y if target is None else torch.stack([y, target], 1)
    iterate, index, velocity = x, torch.arange(len(x)), torch.zeros_like(x)
    for step in range(STEPS):
        gradient, _, logits = differentiate(model, iterate, labels, objective, samples=eot)
        yield Iterate(step, index, iterate, logits, gradient, len(index) * eot)
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
    model = _model(name)
    x, y = _images(model, 240)
    settings: dict[str, Any] = {"objective": objective, "momentum": momentum, "drop_fooled": drop_fooled}
    if objective is target_margin:
        settings["target"] = (y + 1) % 10
    _sizes(model)
    expected = list(_slow(model, x, y, **settings))
    slow = _sizes(model)
    _assert_equal(pgd(model, x, y, BALL, step_size=STEP_SIZE, steps=STEPS, **settings), iter(expected))
    if not momentum:  # with it, iterates repeat later, if ever
        assert sum(_sizes(model)) < sum(slow)


def test_images_that_all_repeat_are_computed_no_more() -> None:
    model = Counted(Constant()).eval()
    x, y = torch.rand(100, *SHAPE), torch.full((100,), 2)
    run = list(pgd(model, x, y, BALL, step_size=STEP_SIZE, steps=STEPS))
    assert len(run) == STEPS + 1
    first, second, partial = _sizes(model)  # the partial pass is compared, and equal
    assert (first, second) == (100, 100)
    assert partial < 100


def test_gradients_of_a_model_that_uses_the_whole_batch_are_all_computed() -> None:
    model = Counted(Constant()).eval()
    setattr(model, WHOLE_BATCH, True)
    list(pgd(model, torch.rand(100, *SHAPE), torch.full((100,), 2), BALL, step_size=STEP_SIZE, steps=STEPS))
    assert _sizes(model) == [100] * STEPS


class _Random(nn.Module):
    """Adds a constant to all images of one pass, or not."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3] + (torch.rand(()) < 0.1)


class _ByBatch(nn.Module):
    """Its outputs depend on the whole batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :3] * x.amax()


class _Overwrites(nn.Module):
    """Changes the images that it is given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x.mul_(torch.where(x < 0.4, 0.999, 1.0))
        return x.flatten(1)[:, :3]


@pytest.mark.parametrize("eot", [1, 2])
@pytest.mark.parametrize("network", [_Random(), _ByBatch(), _Overwrites()], ids=["random", "by batch", "overwrites"])
def test_gradients_of_a_model_with_an_unknown_layer_are_all_computed(network: nn.Module, eot: int) -> None:
    model = Counted(network).eval()
    x, y = torch.rand(100, *SHAPE), torch.zeros(100, dtype=torch.int64)
    torch.manual_seed(0)
    expected = list(_slow(model, x.clone(), y, eot=eot))
    passes = _sizes(model)
    torch.manual_seed(0)
    _assert_equal(pgd(model, x.clone(), y, BALL, step_size=STEP_SIZE, steps=STEPS, eot=eot), iter(expected))
    assert _sizes(model) == passes


@pytest.mark.parametrize("drop_fooled", [False, True], ids=["all images", "drop fooled"])
@pytest.mark.parametrize("change", ["gradient", "logits"])
def test_a_partial_pass_that_is_rounded_in_another_way_is_not_used(change: str, drop_fooled: bool) -> None:
    model = _rounded_in_small_batches(100, change)
    x, y = _images(model, 150)
    _sizes(model)
    expected = list(_slow(model, x, y, drop_fooled=drop_fooled))
    slow = _sizes(model)
    run = pgd(model, x, y, BALL, step_size=STEP_SIZE, steps=STEPS, drop_fooled=drop_fooled)
    _assert_equal(run, iter(expected))
    assert min(set(_sizes(model)) - set(slow)) < 100  # such a pass was tried


def _assert_computed(cache: GradientCache, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    gradient, logits = cache.compute(x, y, check=False)
    expected, _, expected_logits = differentiate(model, x, y)
    assert torch.equal(gradient, expected)
    assert torch.equal(logits, expected_logits)


def test_gradients_of_a_large_batch_are_not_reused_in_a_small_one() -> None:
    model = _rounded_in_small_batches(60)
    x, y = _images(model, 100)
    cache = GradientCache(model, cross_entropy, 1)
    for _ in range(4):
        _assert_computed(cache, model, x, y)
    few = torch.arange(100) < 50
    cache.keep(few)
    _assert_computed(cache, model, x[few], y[few])


def test_of_a_batch_that_is_cut_into_parts_all_gradients_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last part is small, and its images are rounded in another way than those of a partial pass would be."""
    monkeypatch.setattr("dwf_cluster.attacks.gradient._CHUNK_ELEMENTS", 64 * 64)  # 64 images
    model = _rounded_in_small_batches(40)
    x, y = _images(model, 100)
    cache = GradientCache(model, cross_entropy, 1)
    for _ in range(3):
        _assert_computed(cache, model, x, y)
        x = torch.cat([x[:-1], torch.rand_like(x[-1:])])
