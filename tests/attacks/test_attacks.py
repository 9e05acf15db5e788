"""FGSM and PGD follow equations (3) to (5), stay in the ball and in [0, 1], and leave everything as it was."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dwf_cluster.attacks.apgd import apgd
from dwf_cluster.attacks.autoattack import autoattack
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.fab import fab_targeted
from dwf_cluster.attacks.gradient import NotLogits, differentiate, predict
from dwf_cluster.attacks.pgd import Iterate, WorstCase, fgsm, pgd
from dwf_cluster.attacks.routing import gate_aimed
from dwf_cluster.attacks.square import square
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.refresh import FrozenModel
from dwf_cluster.models.resnet import ResNet

LINF, L2 = Ball("linf", 0.1), Ball("l2", 0.8)


def _problem(seed: int = 0, count: int = 6) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A small model in train mode (BatchNorm has seen data), images and labels.

    In double precision: rounding must not decide on which side of zero a ReLU's input lies.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet(5, (0.5,), (0.25,), width=4).double()
    x = torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    for _ in range(3):
        model(torch.rand(32, 1, 8, 8, generator=generator, dtype=torch.float64))
    return model, x, torch.randint(5, (count,), generator=generator)


def _correct(count: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A frozen model and images that it classifies correctly."""
    model, x, _ = _problem(count=count)
    frozen_model = frozen(model)
    return frozen_model, x, predict(frozen_model, x).argmax(1)


def _generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(1000 * seed + i) for i in range(count)]


def _last(run: Iterator[Iterate]) -> torch.Tensor:
    *_, last = run
    return last.x


def _slow_pgd(
    model: nn.Module, x: torch.Tensor, y: torch.Tensor, ball: Ball, step_size: float, steps: int
) -> torch.Tensor:
    """Equations (4) and (5), image by image, on the model itself."""
    rows = []
    for image, label in zip(x.split(1), y.split(1), strict=True):
        iterate = image
        for _ in range(steps):
            iterate = iterate.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(F.cross_entropy(model(iterate), label), iterate)
            if ball.norm == "linf":
                moved = iterate + step_size * gradient.sign()
                iterate = torch.min(torch.max(moved, image - ball.epsilon), image + ball.epsilon).clamp(0, 1)
            else:
                change = iterate + step_size * gradient / gradient.norm() - image
                iterate = (image + change * min(1.0, ball.epsilon / float(change.detach().norm()))).clamp(0, 1)
        rows.append(iterate.detach())
    return torch.cat(rows)


def test_fgsm_is_equation_3() -> None:
    model, x, y = _problem()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model.eval()(leaf), y), leaf)
    expected = (x + 0.07 * gradient.sign()).clamp(0, 1)
    computed, _, _ = differentiate(model, x, y)
    assert torch.equal(fgsm(x, computed, 0.07), expected)


@pytest.mark.parametrize("ball", [LINF, L2])
def test_pgd_is_equations_4_and_5_image_by_image(ball: Ball) -> None:
    model, x, y = _problem()
    model.eval()
    last = _last(pgd(model, x, y, ball, step_size=0.03 if ball is LINF else 0.3, steps=7))
    torch.testing.assert_close(last, _slow_pgd(model, x, y, ball, 0.03 if ball is LINF else 0.3, 7))


def test_a_run_contains_every_shorter_run_and_its_logits_equal_those_of_a_separate_pass() -> None:
    model, x, y = _problem()
    frozen_model = frozen(model)
    run = list(pgd(frozen_model, x, y, LINF, step_size=0.03, steps=9))
    assert [iterate.step for iterate in run] == list(range(10))
    for steps in (1, 4, 9):
        assert torch.equal(_last(pgd(frozen_model, x, y, LINF, step_size=0.03, steps=steps)), run[steps].x)
    for iterate in run[:-1]:
        assert iterate.logits is not None
        torch.testing.assert_close(iterate.logits, predict(frozen_model, iterate.x))


def test_the_first_iterate_has_the_gradient_of_fgsm() -> None:
    model, x, y = _problem()
    frozen_model = frozen(model)
    first = next(pgd(frozen_model, x, y, LINF, step_size=0.03, steps=3))
    assert torch.equal(first.x, x)
    assert first.gradient is not None
    assert torch.equal(first.gradient, differentiate(frozen_model, x, y)[0])


def test_a_run_counts_its_gradients_and_computes_none_at_its_end() -> None:
    model, x, y = _problem()
    frozen_model = frozen(model)
    calls = []
    frozen_model.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    run = list(pgd(frozen_model, x, y, LINF, step_size=0.03, steps=4, eot=3))
    assert sum(iterate.gradient_count for iterate in run) == sum(calls) == 4 * 3 * len(x)
    assert run[-1].gradient is None
    assert run[-1].logits is None


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_batch_in_any_order_and_any_parts_gives_the_same_images(norm: str) -> None:
    """In double precision, where no sign of a gradient depends on the last bit."""
    frozen_model, x, y = _correct(12)
    ball = Ball(norm, 0.1)  # type: ignore[arg-type]

    def attacked(which: torch.Tensor) -> torch.Tensor:
        generators = [_generators(len(x))[i] for i in which.tolist()]
        images, labels = x[which], y[which]
        start, logits = ball.random_point(images, generators), predict(frozen_model, images)
        worst = WorstCase(frozen_model, images, labels, logits, generators)
        worst.attack(lambda s: apgd(frozen_model, s.x, s.y, ball, s.generators, steps=6))
        black = WorstCase(frozen_model, images, labels, logits, generators)
        black.attack(lambda s: square(frozen_model, s.x, s.y, 0.1, s.generators, queries=15))
        last = _last(pgd(frozen_model, images, labels, ball, step_size=0.02, steps=3, start=start))
        return torch.stack([last, worst.x, black.x], dim=1)

    whole = attacked(torch.arange(12))
    order = torch.tensor([7, 2, 11, 0, 5, 1, 9, 3, 10, 8, 4, 6])
    torch.testing.assert_close(attacked(order), whole[order])
    parts = torch.cat([attacked(part) for part in torch.arange(12).split(5)])
    torch.testing.assert_close(parts, whole)


def test_a_cpu_computes_a_batch_in_parts_and_returns_all_of_it() -> None:
    model, _, _ = _problem()
    frozen_model = frozen(model.float())
    sizes = []
    frozen_model.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape))
    x, y = torch.rand(100, 1, 64, 64), torch.arange(100) % 5
    gradient, loss, logits = differentiate(frozen_model, x, y)
    assert (gradient.shape, loss.shape, logits.shape) == (x.shape, (100,), (100, 5))
    assert [shape[0] for shape in sizes] == [24, 24, 24, 24, 4]


@pytest.mark.parametrize(("count", "size"), [(1, 1), (3, 4), (33, 64), (64, 64), (100, 128)])
def test_a_gpu_fills_up_a_pass_of_an_evaluation_and_gives_the_values_of_the_batch(
    monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    frozen_model, x, y = _correct(count)
    expected, logits = differentiate(frozen_model, x, y), predict(frozen_model, x)
    monkeypatch.setattr("dwf_cluster.attacks.gradient._MULTIPLES", {"cpu": 64})
    sizes: list[int] = []
    frozen_model.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    for value, wanted in zip(differentiate(frozen_model, x, y), expected, strict=True):
        torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(predict(frozen_model, x), logits)
    assert sizes == [size, size]


def test_a_batch_is_not_filled_up_in_training_or_where_a_model_uses_it_as_a_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dwf_cluster.attacks.gradient._MULTIPLES", {"cpu": 64})
    model, x, y = _problem(count=10)
    in_training = FrozenModel(model)()
    for attacked in (in_training, frozen(model, batch_statistics=True)):
        sizes: list[int] = []
        attacked.register_forward_pre_hook(lambda _, inputs, sizes=sizes: sizes.append(len(inputs[0])))
        differentiate(attacked, x, y)
        assert sizes == [10]


def test_the_worst_case_equals_the_slow_one_over_all_iterates_of_all_starts() -> None:
    frozen_model, x, y = _correct(200)
    ball, starts, arguments = Ball("linf", 0.05), [], {"step_size": 0.02, "steps": 2}
    for seed in range(4):
        starts.append(ball.random_point(x, _generators(len(x), seed)))
    worst = WorstCase(frozen_model, x, y, predict(frozen_model, x))
    robust = torch.ones(len(x), dtype=torch.bool)
    for start in starts:
        worst.attack(
            lambda rest, z=start: pgd(
                frozen_model, rest.x, rest.y, ball, start=z[rest.index], drop_fooled=True, **arguments
            )
        )
        for iterate in pgd(frozen_model, x, y, ball, start=start, **arguments):
            robust &= predict(frozen_model, iterate.x).argmax(1) == y
    assert torch.equal(worst.robust, robust)
    assert torch.equal(predict(frozen_model, worst.x).argmax(1) == y, robust)
    torch.testing.assert_close(worst.logits, predict(frozen_model, worst.x))
    single = predict(frozen_model, _last(pgd(frozen_model, x, y, ball, start=starts[-1], **arguments))).argmax(1) == y
    assert int(robust.sum()) < int(single.sum()) < 200  # an earlier start fooled images that the last did not
    assert worst.gradient_count < 4 * 2 * len(x)  # fooled images are not attacked again


def test_momentum_adds_up_gradients_of_equal_weight() -> None:
    model, x, y = _problem()
    frozen_model = frozen(model)
    iterate, velocity = x, torch.zeros_like(x)
    for _ in range(5):
        gradient, _, _ = differentiate(frozen_model, iterate, y)
        velocity = 0.7 * velocity + gradient / gradient.abs().mean((1, 2, 3), keepdim=True)
        iterate = LINF.project(x, iterate + 0.03 * velocity.sign())
    last = _last(pgd(frozen_model, x, y, LINF, step_size=0.03, steps=5, momentum=0.7))
    torch.testing.assert_close(last, iterate)
    assert not torch.equal(last, _last(pgd(frozen_model, x, y, LINF, step_size=0.03, steps=5)))


def test_the_gate_aimed_loss_is_the_mixtures_and_that_of_a_drawn_expert() -> None:
    torch.manual_seed(0)
    experts = [ResNet(5, (0.5,), (0.25,), width=4) for _ in range(3)]
    frozen_model = frozen(Mixture(experts, Gate(3, (1, 8, 8), (0.5,), (0.25,), hidden=8)).double())
    x, y = torch.rand(4, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    loss, logits = gate_aimed(frozen_model, x, y)
    torch.testing.assert_close(logits, frozen_model(x))
    for i in range(4):
        weights = frozen_model.gate(x[i : i + 1])[0]
        each = [F.cross_entropy(expert(x[i : i + 1]), y[i : i + 1]) for expert in frozen_model.experts]
        slow = F.cross_entropy(frozen_model(x[i : i + 1]), y[i : i + 1]) + sum(
            w * e for w, e in zip(weights, each, strict=True)
        )
        torch.testing.assert_close(loss[i], slow)


def test_eot_averages_the_gradients_of_a_random_model() -> None:
    class Noisy(nn.Module):
        def __init__(self, first: int = 1) -> None:
            super().__init__()
            self.calls = itertools.count(first)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.sum((1, 2, 3)) * next(self.calls), x.new_zeros(len(x))], dim=1)

    x, y = torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64)
    single = [differentiate(Noisy(n), x, y)[0] for n in (1, 2, 3)]
    averaged, _, _ = differentiate(Noisy(), x, y, samples=3)
    torch.testing.assert_close(averaged, torch.stack(single).mean(0))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    norm=st.sampled_from(["linf", "l2", "l1"]),
    epsilon=st.floats(0.001, 1.0),
    step_size=st.floats(0.001, 1.0),
    steps=st.integers(1, 4),
)
def test_every_adversarial_image_is_in_the_ball_and_in_unit_range(
    seed: int, norm: str, epsilon: float, step_size: float, steps: int
) -> None:
    model, x, _ = _problem(seed % 3)
    frozen_model, generators = frozen(model), _generators(len(x), seed)
    logits = predict(frozen_model, x)
    y, ball = logits.argmax(1), Ball(norm, epsilon)  # type: ignore[arg-type]
    start, target = ball.random_point(x, generators), (y + 1) % 5
    images = [
        start,
        ball.random_surface_point(x, generators),
        *(
            iterate.x
            for iterate in pgd(frozen_model, x, y, ball, step_size=step_size, steps=steps, start=start, momentum=0.9)
        ),
        *(iterate.x for iterate in apgd(frozen_model, x, y, ball, generators, steps=steps)),
    ]
    if norm == "linf":
        gradient, _, _ = differentiate(frozen_model, x, y)
        images.append(fgsm(x, gradient, epsilon))
        for run in (
            square(frozen_model, x, y, epsilon, generators, queries=3 * steps),
            fab_targeted(frozen_model, x, y, epsilon, target, steps=steps),
        ):
            worst = WorstCase(frozen_model, x, y, logits)
            for iterate in run:
                worst.see(iterate)
            images.append(worst.x)
    for attacked in images:
        assert float(attacked.min()) >= 0
        assert float(attacked.max()) <= 1
        if len(attacked) == len(x):
            assert float(ball.distance(x, attacked).max()) <= epsilon + 1e-6


@settings(max_examples=15, deadline=None)
@given(epsilon=st.floats(0.01, 0.2), steps=st.integers(1, 3), more=st.integers(0, 3), starts=st.integers(1, 3))
def test_steps_and_restarts_never_help_the_defender_in_the_worst_case(
    epsilon: float, steps: int, more: int, starts: int
) -> None:
    frozen_model, x, y = _correct(24)
    ball = Ball("linf", epsilon)

    def robust(steps: int, starts: int) -> torch.Tensor:
        worst = WorstCase(frozen_model, x, y, predict(frozen_model, x), _generators(len(x)))
        run = functools.partial(pgd, frozen_model, step_size=0.02, steps=steps, drop_fooled=True)
        for _ in range(starts):
            worst.attack(lambda rest: run(rest.x, rest.y, ball, start=ball.random_point(rest.x, rest.generators)))
        return worst.robust

    few = robust(steps, 1)
    assert bool((robust(steps + more, 1) <= few).all())
    assert bool((robust(steps, starts) <= few).all())


def test_nothing_of_the_model_and_no_random_state_changes() -> None:
    model, x, y = _problem()
    model.blocks[3].eval()  # a mixed state must be restored too
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    needs = [p.requires_grad for p in model.parameters()]
    random, images = torch.random.get_rng_state(), x.clone()
    frozen_model = frozen(model)
    y = predict(frozen_model, x).argmax(1)
    worst = WorstCase(frozen_model, x, y, predict(frozen_model, x), _generators(len(x)))
    autoattack(frozen_model, 0.001, worst, steps=3, queries=5)
    list(pgd(frozen_model, x, y, L2, step_size=0.05, steps=2, start=L2.random_point(x, _generators(len(x)))))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == needs
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(x, images)


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
    with pytest.raises(NotLogits, match=message):
        list(pgd(Wrapped(), x, y, LINF, step_size=0.1, steps=1))
    with pytest.raises(NotLogits, match=message):
        list(square(Wrapped(), x, y, 0.1, _generators(len(x)), queries=2))
