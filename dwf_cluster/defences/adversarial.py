"""Training of one network: on clean images, on FGSM examples (algorithm 1) or on PGD examples (algorithm 2).

These methods train the experts of the mixture and, with a fixed strength and half of each batch adversarial, the
baselines FGSM-AT and PGD-AT.
"""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.attacks.pgd import fgsm as fgsm_examples
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.defences import randomized
from dwf_cluster.defences.loss import Frozen, Loss, cross_entropy
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


def _attacked_count(spec: ModelSpec, x: torch.Tensor) -> int:
    """How many images of a batch are attacked: the first ones. The order of a batch is random, so is the sample."""
    return math.ceil(float(spec.option("fraction", 1.0)) * len(x))
