"""The attacks on a mixture's experts and routing, against the slow, obvious way and on a gate that hides an expert."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import Objective, differentiate
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.attacks.routing import expert_aimed, routed
from dwf_cluster.determinism import Draws
from dwf_cluster.evaluation.gate_cost import Parts
from dwf_cluster.evaluation.registry import SUITES, columns
from dwf_cluster.evaluation.run import Batch, evaluate
from dwf_cluster.evaluation.settings import Evaluation, Threat
from dwf_cluster.evaluation.suites import pgd_expert, pgd_route
from dwf_cluster.models.mixture import Gate, Mixture

THREAT = Threat(0.1, 0.03)
SETTINGS = Evaluation(adaptive_steps=6, pgd_steps=(6,), restart_steps=6, beyond=("pgd_expert", "pgd_route"))
CPU = torch.device("cpu")


def _mixture(hard: bool) -> Mixture:
    """Three networks that are not robust, and a gate, with random weights, in double precision."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        experts = [nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)) for _ in range(3)]
        gate = Gate(3, (1, 4, 4), (0.5,), (0.25,), hidden=8, hard=hard)
    return Mixture(experts, gate).double().eval()


def _images(model: nn.Module, count: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and the labels that the model gives to them."""
    x = torch.rand((count, 1, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, model(x).argmax(1)


def _slow(model: Mixture, x: torch.Tensor, y: torch.Tensor, loss: Callable[[int, torch.Tensor], torch.Tensor]) -> Any:
    """For each expert and image, whether any iterate fools the mixture, and whether the last one does."""
    ever, last = torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(y), dtype=torch.bool)
    for number in range(len(model.experts)):
        point = x.clone()
        for _ in range(SETTINGS.adaptive_steps):
            point.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(number, point).sum(), point)
            moved = point.detach() + THREAT.step_size * gradient.sign()
            point = moved.clamp(x - THREAT.epsilon, x + THREAT.epsilon).clamp(0, 1)
            ever |= model(point).argmax(1) != y
        last |= model(point).argmax(1) != y
    return ever, last


def _fooled(model: Mixture, x: torch.Tensor, y: torch.Tensor, suite: str) -> torch.Tensor:
    generators = [Draws((0, i)).generator("attack") for i in range(len(y))]
    listed = columns(SETTINGS, (THREAT,), suite)
    run = {"pgd_expert": pgd_expert, "pgd_route": pgd_route}[suite]
    (attacked,) = run(Batch(SETTINGS, THREAT, listed, {"mixture": model}, "mixture", x, y, generators))
    assert attacked.logits is not None
    assert bool(((attacked.x - x).abs() <= THREAT.epsilon + 1e-9).all())
    torch.testing.assert_close(attacked.logits, model(attacked.x))
    return attacked.logits.argmax(1) != y


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_pgd_route_fools_the_images_that_any_iterate_against_any_expert_and_its_weight_fools(hard: bool) -> None:
    model = _mixture(hard)
    x, y = _images(model)

    def loss(number: int, point: torch.Tensor) -> torch.Tensor:
        own = F.cross_entropy(model.experts[number](point), y, reduction="none")
        return own + 2 * model.gate.layers(point)[:, number].log()  # type: ignore[union-attr, operator]

    ever, _ = _slow(model, x, y, loss)
    assert 0 < int(ever.sum()) < len(y)
    assert torch.equal(_fooled(model, x, y, "pgd_route"), ever)


@pytest.mark.parametrize("hard", [False, True], ids=["soft", "hard"])
def test_pgd_expert_judges_every_iterate_so_it_is_as_strong_as_the_last_iterates_or_stronger(hard: bool) -> None:
    model = _mixture(hard)
    x, y = _images(model)
    ever, last = _slow(
        model, x, y, lambda number, point: F.cross_entropy(model.experts[number](point), y, reduction="none")
    )
    fooled = _fooled(model, x, y, "pgd_expert")
    assert torch.equal(fooled, ever)
    assert bool((last <= fooled).all())


class _Hidden(nn.Module):
    """Right about every image (bright is 1, dark is 0), far from its boundary; or, reversed, wrong."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = 10 * self.sign * (x.flatten(1)[:, 1:].mean(1) - 0.5)  # the first pixel is the gate's alone
        return torch.stack([-score, score, score - 9, score - 9], 1)


def test_pgd_route_finds_an_expert_whose_soft_weight_gives_the_straight_through_gradient_nothing() -> None:
    """One pixel at 0.3 or more gives an image to a wrong expert; below it the softmax is flat in single precision."""
    gate = Gate(2, (1, 4, 4), (0.0,), (1.0,), hidden=1, hard=True)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.zero_()
        gate.layers[2].weight[0, 0] = 1.0  # type: ignore[union-attr, index]
        gate.layers[4].weight[1, 0] = 2000.0  # type: ignore[union-attr, index]
        gate.layers[4].bias[1] = -600.0  # type: ignore[union-attr, index]
    model = Mixture([_Hidden(1.0), _Hidden(-1.0)], gate).eval()
    x = torch.full((8, 1, 4, 4), 0.9)
    x[4:] = 0.1
    x[:, 0, 0, 0] = 0.22
    y = torch.tensor([1] * 4 + [0] * 4)
    settings = ({"mixture": model}, "mixture")
    fooled = {}
    for suite in ("paper", "pgd_expert", "pgd_route"):
        rows, _ = evaluate(*settings, suite, x.numpy(), y.numpy(), SETTINGS, (THREAT,), seed=0, device=CPU)
        fooled |= {row["attack"]: len(y) - row["correct"] for row in rows if row["epsilon"] in (None, THREAT.epsilon)}
    assert fooled["clean"] == 0
    assert fooled["pgd"] == fooled["pgd_expert"] == 0
    assert fooled["pgd_route"] == len(y)


@pytest.mark.parametrize(("objective", "expected"), [(expert_aimed(1), {"1"}), (routed(1), {"1", "gate"})])
def test_only_the_aimed_expert_and_the_gate_are_differentiated(objective: Objective, expected: set[str]) -> None:
    model = _mixture(hard=True)
    x, y = _images(model, 4)
    differentiated = set()

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda *_: differentiated.add(name) if torch.is_grad_enabled() else None)

    for name, module in (("0", model.experts[0]), ("1", model.experts[1]), ("gate", model.gate.layers[4])):  # type: ignore[union-attr, index]
        watch(name, module)  # type: ignore[arg-type]
    _, loss, logits = differentiate(model, x, y, objective)
    assert differentiated == expected
    assert loss.shape == (4,)
    torch.testing.assert_close(logits, model(x))


def test_each_iterate_costs_a_gradient_of_one_expert_and_a_pass_of_the_mixture() -> None:
    steps, networks = SETTINGS.adaptive_steps, 3
    for suite in ("pgd_expert", "pgd_route"):
        # A run for each expert; the cost is that of one of the model's networks.
        assert SUITES[suite].cost(SETTINGS, Parts(networks)) * networks == networks * steps * (2 + networks) + networks
    *iterates, _ = pgd(
        _mixture(hard=False),
        *_images(_mixture(hard=False)),
        Ball("linf", 0.1),
        step_size=0.03,
        steps=steps,
        objective=routed(0),
    )
    assert sum(iterate.gradient_count for iterate in iterates) == 60 * steps
