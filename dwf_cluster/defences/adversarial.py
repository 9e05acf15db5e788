"""Training of one network: on clean images, on FGSM examples (algorithm 1) or on PGD examples (algorithm 2).

The experts of the mixture are trained so, and with a fixed strength and half of each batch adversarial, the baselines
FGSM-AT and PGD-AT.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.attacks.pgd import fgsm as fgsm_examples
from dwf_cluster.attacks.pgd import pgd as pgd_iterates
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.defences.loss import Loss
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.models.registry import BACKBONES

Frozen = Callable[[], nn.Module]
"""Builds the frozen model, as attacks see it, at its first call in a step: a step that attacks nothing pays nothing."""


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
    """Algorithm 1: cross-entropy of FGSM examples, epsilon drawn for each batch.

    Options: `epsilons`, the set that it is drawn from, pixels in [0, 1]; `fraction`, of the batch that is attacked.
    """
    epsilon = draws.choice("epsilon", spec.option("epsilons"))
    count = _attacked(spec, x)
    gradient, _, _ = differentiate(frozen(), x[:count], y[:count])
    yield cross_entropy(model, torch.cat([fgsm_examples(x[:count], gradient, epsilon), x[count:]]), y)


def pgd(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """Algorithm 2: cross-entropy of PGD examples, number of iterations drawn for each batch.

    Options: `epsilon` and `step_size`, pixels in [0, 1]; `steps`, the set that the number of iterations is drawn from;
    `fraction`, of the batch that is attacked.
    """
    steps = draws.choice("steps", spec.option("steps"))
    count, ball = _attacked(spec, x), Ball("linf", spec.option("epsilon"))
    iterates = pgd_iterates(frozen(), x[:count], y[:count], ball, step_size=spec.option("step_size"), steps=steps)
    *_, last = iterates
    yield cross_entropy(model, torch.cat([last.x, x[count:]]), y)


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Loss:
    """Cross-entropy of a batch that the model is to be trained on."""
    logits = model(x.contiguous(memory_format=torch.channels_last))
    return Loss(F.cross_entropy(logits, y, reduction="sum"), len(y))


def _attacked(spec: ModelSpec, x: torch.Tensor) -> int:
    """How many images of a batch are attacked: the first ones. Their order is random, so these are a random sample."""
    return math.ceil(float(spec.option("fraction", 1.0)) * len(x))
