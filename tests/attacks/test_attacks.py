"""FGSM and PGD follow equations (3) to (5), stay in the ball and in [0, 1], and leave everything as it was."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dwf_cluster import attacks
from dwf_cluster.models import ResNet18


def _problem(seed: int = 0, count: int = 6) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small model in train mode (BatchNorm has seen data), images and labels.

    In double precision: rounding must not decide on which side of zero a ReLU's input lies.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet18(5, (0.5,), (0.25,), width=4).double()
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    for _ in range(3):
        model(torch.rand(32, 1, 8, 8, generator=generator, dtype=torch.float64))
    return model, x, torch.randint(5, (count,), generator=generator)


def _slow_pgd(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float, step_size: float, steps: int
) -> torch.Tensor:
    """Equations (4) and (5), image by image, on the model itself."""
    rows = []
    for image, label in zip(x.split(1), y.split(1), strict=True):
        iterate = image
        for _ in range(steps):
            iterate = iterate.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(iterate), label), iterate)
            moved = iterate + step_size * gradient.sign()
            iterate = torch.min(torch.max(moved, image - epsilon), image + epsilon).clamp(0, 1)
        rows.append(iterate.detach())
    return torch.cat(rows)


def test_fgsm_is_equation_3() -> None:
    model, x, y = _problem()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model.eval()(leaf), y), leaf)
    expected = (x + 0.07 * gradient.sign()).clamp(0, 1)
    found = attacks.fgsm(x, attacks.input_gradient(model, x, y), 0.07)
    assert torch.equal(found, expected)


def test_pgd_is_equations_4_and_5_image_by_image() -> None:
    model, x, y = _problem()
    model.eval()
    (found,) = attacks.pgd(model, x, y, epsilon=0.1, step_size=0.03, steps=[7])
    torch.testing.assert_close(found, _slow_pgd(model, x, y, 0.1, 0.03, 7))


def test_pgd_snapshots_are_the_runs_of_their_own_length() -> None:
    model, x, y = _problem()
    view = attacks.frozen(model)
    snapshots = list(attacks.pgd(view, x, y, epsilon=0.1, step_size=0.03, steps=[1, 4, 9]))
    for count, snapshot in zip((1, 4, 9), snapshots, strict=True):
        (alone,) = attacks.pgd(view, x, y, epsilon=0.1, step_size=0.03, steps=[count])
        assert torch.equal(alone, snapshot)


def test_a_gradient_at_hand_saves_pgds_first_and_changes_nothing() -> None:
    model, x, y = _problem()
    view = attacks.frozen(model)
    gradient = attacks.input_gradient(view, x, y)
    calls = []
    view.register_forward_pre_hook(lambda *_: calls.append(1))
    (reused,) = attacks.pgd(view, x, y, epsilon=0.1, step_size=0.03, steps=[3], gradient=gradient)
    assert len(calls) == 2
    (alone,) = attacks.pgd(view, x, y, epsilon=0.1, step_size=0.03, steps=[3])
    assert torch.equal(reused, alone)


def test_restarts_keep_the_first_iterate_that_fools_and_equal_the_slow_worst_case() -> None:
    model, x, y = _problem(count=200)
    view = attacks.frozen(model)
    y = view(x).argmax(1)  # all correct before the attack

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    arguments = {"epsilon": 0.05, "step_size": 0.02}
    found = attacks.pgd_restarts(view, x, y, **arguments, steps=1, generators=generators())
    runs = []
    for generator in generators():
        start = attacks.random_start(x, 0.05, generator)
        (run,) = attacks.pgd(view, x, y, **arguments, steps=[1], start=start)
        runs.append(view(run).argmax(1) == y)
    slow = torch.stack(runs).all(0)
    assert torch.equal(view(found).argmax(1) == y, slow)
    assert int(slow.sum()) < int(runs[-1].sum()) < 200  # an earlier start fooled what the last did not


def test_eot_averages_the_gradients_of_a_random_model() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = itertools.count(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.sum((1, 2, 3)) * next(self.calls), x.new_zeros(len(x))], dim=1)

    x, y = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    single = [attacks.input_gradient(_nth(Noisy(), n), x, y) for n in (1, 2, 3)]
    averaged = attacks.input_gradient(Noisy(), x, y, samples=3)
    torch.testing.assert_close(averaged, torch.stack(single).mean(0))


def _nth(model: nn.Module, n: int) -> nn.Module:
    model.calls = itertools.count(n)  # type: ignore[assignment]
    return model


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    epsilon=st.floats(0.001, 1.0),
    step_size=st.floats(0.001, 1.0),
    steps=st.integers(1, 4),
)
def test_every_adversarial_image_is_in_the_ball_and_in_unit_range(
    seed: int, epsilon: float, step_size: float, steps: int
) -> None:
    model, x, y = _problem(seed % 3)
    view, generator = attacks.frozen(model), torch.Generator().manual_seed(seed)
    gradient = attacks.input_gradient(view, x, y)
    start = attacks.random_start(x, epsilon, generator)
    ball = {"epsilon": epsilon, "step_size": step_size}
    found = [
        attacks.fgsm(x, gradient, epsilon),
        start,
        *attacks.pgd(view, x, y, **ball, steps=[steps], start=start),
        attacks.pgd_restarts(view, x, y, **ball, steps=steps, generators=[generator, generator]),
    ]
    for attacked in found:
        assert float(attacked.min()) >= 0
        assert float(attacked.max()) <= 1
        assert float((attacked - x).abs().max()) <= epsilon + 1e-6


def test_nothing_of_the_model_and_no_random_state_changes() -> None:
    model, x, y = _problem()
    model.blocks[3].eval()  # a mixed state must come back too
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    needs = [p.requires_grad for p in model.parameters()]
    random = torch.random.get_rng_state()
    view = attacks.frozen(model)
    generators = [torch.Generator().manual_seed(0)]
    attacks.pgd_restarts(view, x, y, epsilon=0.1, step_size=0.05, steps=3, generators=generators)
    list(attacks.pgd(view, x, y, epsilon=0.1, step_size=0.05, steps=[2]))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == needs
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda logits: logits.softmax(1), "probabilities"),
        (lambda logits: logits * float("nan"), "NaN"),
        (lambda logits: logits * float("inf"), "infinity"),
    ],
)
def test_probabilities_and_nan_are_errors_never_results(output: object, message: str) -> None:
    model, x, y = _problem()

    class Wrapped(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return output(model(x))  # type: ignore[operator]

    model.eval()
    with pytest.raises(attacks.NotLogits, match=message):
        list(attacks.pgd(Wrapped(), x, y, epsilon=0.1, step_size=0.1, steps=[1]))
