"""The L1 ball: exact projection, the step of SLIDE; and PGD with a target."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq

from dwf_cluster.attacks.ball import Ball, project_to_l1
from dwf_cluster.attacks.gradient import target_margin
from dwf_cluster.attacks.pgd import pgd

from .test_attacks import _correct


def projected_by_bisection(change: NDArray[np.float64], radius: float) -> NDArray[np.float64]:
    """Lower every absolute value by the threshold at which their sum is the radius."""
    if np.abs(change).sum() <= radius:
        return change
    threshold = brentq(lambda t: np.maximum(np.abs(change) - t, 0).sum() - radius, 0, np.abs(change).max(), xtol=1e-14)
    projected: NDArray[np.float64] = np.sign(change) * np.maximum(np.abs(change) - threshold, 0)
    return projected


@pytest.mark.parametrize("radius", [0.01, 1.0, 7.0, 40.0, 1000.0])
def test_the_projection_to_the_l1_ball_is_the_one_found_by_bisection(radius: float) -> None:
    change = torch.randn(20, 2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    change[0] = 0
    change[1] = change[1].round()  # equal values
    change[2] *= 1e-3
    projected = project_to_l1(change, radius)
    for image, ours in zip(change.numpy(), projected.numpy(), strict=True):
        np.testing.assert_allclose(ours, projected_by_bisection(image, radius), atol=1e-10)


def test_an_l1_step_changes_one_value_in_a_hundred_and_none_that_would_leave_the_range() -> None:
    gradient = torch.arange(1.0, 769.0).reshape(1, 3, 16, 16)
    gradient[..., ::2] *= -1
    ball, at = Ball("l1", 1.0), torch.full((1, 3, 16, 16), 0.5)
    step = ball.direction(gradient, at)
    changed = 8  # 1 % of 768, rounded up
    largest = gradient.abs().flatten().topk(changed).indices
    assert float(step.abs().sum()) == pytest.approx(1)
    assert set(step.flatten().nonzero().squeeze(1).tolist()) == set(largest.tolist())
    assert torch.equal(step.sign().flatten()[largest], gradient.sign().flatten()[largest])
    at[gradient > 0] = 1.0  # at the end of the range: only the others may still move
    step = ball.direction(gradient, at)
    assert int((step < 0).sum()) == changed
    assert not bool((step > 0).any())
    at = torch.where(gradient < 0, 0.0, 0.5)
    step = ball.direction(gradient, at)
    assert int((step > 0).sum()) == changed
    assert not bool((step < 0).any())
    assert not bool(ball.direction(torch.zeros_like(gradient), at).any())


@pytest.mark.parametrize("ball", [Ball("linf", 0.2), Ball("l1", 6.0)], ids=["linf", "l1"])
def test_targeted_pgd_ascends_the_targets_logit_less_the_true_one_image_by_image(ball: Ball) -> None:
    model, x, y = _correct(6)
    target, step_size = (y + 2) % 5, ball.epsilon / 5
    rows = []
    for image, true, aim in zip(x.split(1), y.tolist(), target.tolist(), strict=True):
        iterate = image
        for _ in range(6):
            leaf = iterate.detach().requires_grad_()
            logits = model(leaf)[0]
            (gradient,) = torch.autograd.grad(logits[aim] - logits[true], leaf)
            iterate = ball.project(image, iterate + step_size * ball.direction(gradient, iterate))
        rows.append(iterate)
    *_, last = pgd(model, x, y, ball, step_size=step_size, steps=6, objective=target_margin, target=target)
    torch.testing.assert_close(last.x, torch.cat(rows), rtol=0, atol=1e-9)
