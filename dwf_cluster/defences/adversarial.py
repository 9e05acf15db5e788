"""Training of one network: on clean images, on FGSM examples (algorithm 1) or on PGD examples (algorithm 2).

These methods train the experts of the mixture and, with a fixed strength and a share of each batch adversarial,
the baselines FGSM-AT and PGD-AT. TRADES and the cheap methods FGSM-RS, N-FGSM and Free are baselines too.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dwf_cluster.attacks import pgd as attacks
from dwf_cluster.attacks.ball import Ball, draw
from dwf_cluster.attacks.gradient import differentiate, predict
from dwf_cluster.attacks.pgd import fgsm as fgsm_examples
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.defences import randomized
from dwf_cluster.defences.loss import START_NOISE, Frozen, Loss, concatenated, cross_entropy, divergence
from dwf_cluster.defences.loss import trades as trades_loss
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.models.registry import BACKBONES


def build(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> nn.Module:
    """The untrained backbone; it has no parents."""
    network: nn.Module = pkgutil.resolve_name(BACKBONES[spec.backbone].build)(images, spec.width)
    return network


def standard(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """Cross-entropy of clean images."""
    yield cross_entropy(model, x, y)


def fgsm(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """Algorithm 1: cross-entropy of FGSM examples; epsilon is drawn for each batch.

    Options: those of `randomized.fgsm_epsilon`; `fraction` of the batch that is attacked, 1 by default.
    """
    epsilon = randomized.fgsm_epsilon(spec, draws)
    count = _attacked_count(spec, x)
    gradient, _, _ = differentiate(frozen(), x[:count], y[:count])
    yield cross_entropy(model, torch.cat([fgsm_examples(x[:count], gradient, epsilon), x[count:]]), y)


def pgd(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """Algorithm 2: cross-entropy of PGD examples; the number of iterations is drawn for each batch.

    Options: those of `randomized.pgd`; `fraction` of the batch that is attacked, 1 by default.
    """
    count = _attacked_count(spec, x)
    *_, last = randomized.pgd(spec, frozen(), x[:count], y[:count], draws)
    yield cross_entropy(model, torch.cat([last.x, x[count:]]), y)


def trades(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """TRADES (Zhang et al. 2019): cross-entropy of clean images + beta * KL(clean || adversarial), both differentiated.

    The attack makes the same divergence large, from the image plus Gaussian noise of standard deviation 0.001. Clean
    and adversarial images pass the network together, so BatchNorm sees each once; in the authors' code clean images
    pass three times.

    Options: `beta`; `epsilon`, `step_size` and `steps` of the attack.
    """
    target = predict(frozen(), x)
    start = x + START_NOISE * draw(x, draws.generators("start", len(x)), torch.randn)
    ball = Ball("linf", spec.option("epsilon"))
    step_size, steps = spec.option("step_size"), spec.option("steps")
    run = attacks.pgd(
        frozen(), x, target, ball, step_size=step_size, steps=steps, start=start, objective=_divergence_from
    )
    *_, last = run
    yield trades_loss(model(concatenated(x, last.x)), y, spec.option("beta"))


def _divergence_from(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The objective of TRADES' attack: KL(softmax(target) || the model's softmax), target of shape (n, classes)."""
    logits: torch.Tensor = model(x)
    return divergence(logits, target), logits


def free(
    spec: ModelSpec,
    model: nn.Module,
    frozen: Frozen,
    x: torch.Tensor,
    y: torch.Tensor,
    draws: Draws,
    perturbation: torch.Tensor,
) -> Iterator[Loss]:
    """Free adversarial training (Shafahi et al. 2019): several steps on a batch, each of which moves a perturbation.

    One backward pass gives the gradient of the weights, for the step, and that of the pixels, whose sign moves the
    perturbation by epsilon. The perturbation goes from batch to batch. The gradient is that of the network's input,
    the image after clipping to [0, 1]. `frozen` is not used: the network is attacked in training mode.

    Options: `epsilon`; `replays`, the number of steps.
    """
    epsilon = spec.option("epsilon")
    for _ in range(spec.option("replays")):
        attacked = (x + perturbation).clamp(0, 1).requires_grad_()
        yield cross_entropy(model, attacked, y)
        assert attacked.grad is not None  # the training loop has called `backward`
        perturbation.add_(attacked.grad.sign(), alpha=epsilon).clamp_(-epsilon, epsilon)


_FGSM_RS_STEP = 1.25
"""Length of FGSM-RS' step in units of epsilon: the authors' 10/255 for 8/255."""


def fgsm_rs(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """FGSM-RS (Wong et al. 2020): one step of 1.25 epsilon from a random point of the ball, clipped to the ball.

    Option: `epsilon`.
    """
    ball = Ball("linf", spec.option("epsilon"))
    start, step_size = ball.random_point(x, draws.generators("start", len(x))), _FGSM_RS_STEP * ball.epsilon
    *_, last = attacks.pgd(frozen(), x, y, ball, step_size=step_size, steps=1, start=start)
    yield cross_entropy(model, last.x, y)


def n_fgsm(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """N-FGSM (de Jorge et al. 2022): one step of epsilon from an image with noise, clipped to [0, 1] only.

    The noisy image is clipped to [0, 1] before its gradient is taken. Our assumption: as FGSM-RS does.

    Options: `epsilon`; `noise`, the largest noise of a pixel in units of epsilon.
    """
    epsilon = spec.option("epsilon")
    noisy = Ball("linf", spec.option("noise") * epsilon).random_point(x, draws.generators("start", len(x)))
    gradient, _, _ = differentiate(frozen(), noisy, y)
    yield cross_entropy(model, fgsm_examples(noisy, gradient, epsilon), y)


def _attacked_count(spec: ModelSpec, x: torch.Tensor) -> int:
    """How many images of a batch are attacked: the first ones. The order of a batch is random, so is the sample."""
    return math.ceil(float(spec.option("fraction", 1.0)) * len(x))
