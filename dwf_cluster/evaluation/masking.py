"""Signs of gradient masking (Athalye et al. 2018; Carlini et al. 2019): is a robust accuracy worth anything?

To add a check: a yield in `masking`, and a model that has the fault in its test.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import NotLogits, look_like_probabilities, predict
from dwf_cluster.attacks.pgd import WorstCase, fgsm, pgd
from dwf_cluster.attacks.square import square
from dwf_cluster.evaluation.registry import CHECK_QUERIES, Threat

HUGE = 1.0
"""An L-infinity radius that lets an attack paint any image."""

NOISE = 0.05
"""Accuracy, 0..1, that two attacks may differ by on as few images as are looked at."""


@dataclass(frozen=True)
class Check:
    """One sign.

    Attributes:
        check: its name.
        value: what was measured.
        limit: the largest value that is no sign.
        meaning: what it means to be above, with the figures.
    """

    check: str
    value: float
    limit: float
    meaning: str

    @property
    def fired(self) -> bool:
        """Whether the sign is there."""
        return not self.value <= self.limit  # NaN is a sign


def masking(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    threat: Threat,
    steps: int,
    generators: Sequence[torch.Generator],
) -> Iterator[Check]:
    """Look for signs of masking. Outputs that are no logits of an image end it: no attack would mean anything.

    Args:
        model: as it is attacked: a frozen view, or any other module.
        x: float in [0, 1], shape (n, channels, height, width); a hundred images are enough.
        y: int64, shape (n,).
        threat: of the PGD that is looked at.
        steps: iterations of a short run; a long one has four times as many.
        generators: one an image.
    """
    for sign in _outputs(model, x):
        yield sign
        if sign.check in ("nan", "probabilities", "train_mode") and sign.fired:
            return
    try:
        yield from _attacks(model, x, y, threat, steps, generators)
    except NotLogits as error:
        yield Check("nan_under_attack", 1.0, 0.0, f"on attacked images {error}")


def _outputs(model: nn.Module, x: torch.Tensor) -> Iterator[Check]:
    with torch.no_grad():
        logits = model(x.clone())
        share = float((~logits.isfinite()).any(1).double().mean())
        yield Check("nan", share, 0.0, f"{share:.0%} of outputs hold NaN or infinity")
        value = float(look_like_probabilities(logits))
        yield Check("probabilities", value, 0.0, "outputs are probabilities, where attacks need logits")
        scale = logits.abs().max().clamp(min=1e-12)
        value = float((model(x.clone()) - logits).abs().max() / scale)
        yield Check("random", value, 1e-6, f"outputs change from pass to pass, by {value:.2g} of the largest")
        if value > 1e-6:
            return
        few = torch.cat([model(part) for part in torch.split(x.clone(), max(2, len(x) // 3))])
        value = float((few - logits).abs().max() / scale)
        meaning = f"an image's outputs change with the rest of its batch, by {value:.2g} of the largest"
        yield Check("train_mode", value, 1e-3, meaning)


def _attacks(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    threat: Threat,
    steps: int,
    generators: Sequence[torch.Generator],
) -> Iterator[Check]:
    epsilon, step_size = threat.epsilon, threat.step_size
    ball, begun, logits = Ball("linf", epsilon), x.clone(), predict(model, x.clone())
    worst, accuracy = WorstCase(model, x, y, logits, generators), {}
    for it in pgd(model, x, y, ball, step_size=step_size, steps=4 * steps):
        if it.step == 0:
            assert it.gradient is not None
            one_step = fgsm(x, it.gradient, epsilon)
            accuracy["fgsm"] = _accuracy(model, one_step, y)
            zero = ~it.gradient.flatten(1).any(1) & worst.robust
            value = float(zero.double().sum() / worst.robust.sum().clamp(min=1))
            yield Check("zero_gradients", value, 0.01, f"{value:.0%} of correct images have no gradient at all")
        elif it.step in (steps, 4 * steps):
            accuracy[f"{it.step}"] = _accuracy(model, it.x, y)
            last = it.x
        worst.see(it)
    short, long = accuracy[f"{steps}"], accuracy[f"{4 * steps}"]
    meaning = f"PGD-{steps} leaves {short:.1%}, one step of the same size {accuracy['fgsm']:.1%}"
    yield Check("one_step", short - accuracy["fgsm"], NOISE, meaning)
    meaning = f"PGD-{steps} leaves {short:.1%}, PGD-{4 * steps} {long:.1%}"
    yield Check("more_steps", long - short, NOISE, meaning)

    short_run = functools.partial(pgd, model, step_size=step_size, steps=steps, drop_fooled=True)
    worst.attack(lambda rest: short_run(rest.x, rest.y, ball, start=ball.random_point(rest.x, rest.generators)))
    restarted = _accuracy(model, worst.x, y)
    meaning = f"PGD-{4 * steps} leaves {long:.1%}, the worst case over it and a restart {restarted:.1%}"
    yield Check("restarts", restarted - long, NOISE, meaning)

    moved = max(float(ball.distance(begun, found).max()) for found in (one_step, last, worst.x))
    outside = max(float((found - found.clamp(0, 1)).abs().max()) for found in (one_step, last, worst.x))
    meaning = f"images moved by up to {moved:.4g} and left [0, 1] by {outside:.4g}, where {epsilon:.4g} is allowed"
    yield Check("perturbation", max(moved - epsilon, outside), 1e-5, meaning)

    white = worst.robust.clone()
    worst.attack(lambda rest: square(model, rest.x, rest.y, epsilon, rest.generators, queries=CHECK_QUERIES))
    value = float((white & ~worst.robust).double().mean())
    meaning = f"a black-box attack fools {value:.1%} that resisted the white-box attacks"
    yield Check("black_box", value, NOISE, meaning)

    worst = WorstCase(model, x, y, logits)
    long_run = functools.partial(pgd, model, step_size=HUGE / 10, steps=2 * steps, drop_fooled=True)
    worst.attack(lambda rest: long_run(rest.x, rest.y, Ball("linf", HUGE)))
    value = float(worst.robust.double().mean())
    meaning = f"{value:.1%} stand at an epsilon of {HUGE:g}, at which any image can be painted"
    yield Check("huge_epsilon", value, NOISE, meaning)


def _accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).double().mean())
