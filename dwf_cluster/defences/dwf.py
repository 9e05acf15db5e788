"""Divided We Fall: a soft-gated mixture, experts and gate trained together end to end (algorithm 3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.attacks.pgd import fgsm
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.defences import randomized
from dwf_cluster.defences.loss import Frozen, Loss, cross_entropy
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.models.mixture import Gate, Mixture


def build(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> Mixture:
    """The mixture of the parents behind an untrained gate.

    Options: `gate_hidden`, units of the gate's hidden layer; `gate_kind`, `soft` or `hard`; `freeze_experts`, whether
    the gate alone is trained. The paper freezes nothing.
    """
    is_hard = spec.option("gate_kind") == "hard"
    gate = Gate(len(parents), images.shape, images.mean, images.std, spec.option("gate_hidden"), is_hard)
    mixture = Mixture(parents.values(), gate)
    mixture.experts.requires_grad_(not spec.option("freeze_experts"))
    return mixture


def losses(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """Cross-entropy of three versions of each image: clean, FGSM's and PGD's against the whole mixture.

    Options: those of `randomized.fgsm_epsilon` and of `randomized.pgd`.
    """
    first, *_, last = randomized.pgd(spec, frozen(), x, y, draws)
    # PGD that starts at the clean images has FGSM's gradient first.
    gradient = differentiate(frozen(), x, y)[0] if spec.option("random_start") else first.gradient
    assert gradient is not None
    fgsm_examples = fgsm(x, gradient, randomized.fgsm_epsilon(spec, draws))
    yield cross_entropy(model, torch.cat([x, fgsm_examples, last.x]), torch.cat([y, y, y]))
