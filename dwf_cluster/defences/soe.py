"""Synergy of Experts (SoE; Cui et al. 2022, "Synergy-of-Experts: Collaborate to Improve Adversarial Robustness").

Several sub-models learn together, and each learns how far it can be trusted; the surest one decides. What is trained is
the one that would decide ("the predicted best"): the surer a sub-model, the more its loss weighs.

From the authors' release we take the losses, the number of sub-models, and PGD's ten steps from the image itself.
Everything else is the recipe of all methods: ResNet-18 instead of ResNet-20, weight decay, learning rates over cosine,
batches in random order, an attack in evaluation mode whose passes change no statistics, `pgd.epsilon` and
`pgd.step_size`. BatchNorm sees clean and adversarial images in one batch, as in the joint stage of `dwf`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import Objective, cross_entropy
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.defences.loss import Frozen, Loss, concatenated
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.models.registry import BACKBONES
from dwf_cluster.models.soe import SynergyOfExperts


def build(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> SynergyOfExperts:
    """The untrained sub-models, each from weights of its own; it has no parents.

    Options: `experts`, how many.
    """
    backbone = pkgutil.resolve_name(BACKBONES[spec.backbone].build)
    with_confidence = replace(images, classes=images.classes + 1)
    return SynergyOfExperts(backbone(with_confidence, spec.width) for _ in range(spec.networks))


def losses(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """The mean of `synergy` over clean images plus its mean over adversarial ones, in one step.

    Options: `attack`, `together` or `one_by_one`; `steps`, `epsilon` and `step_size` of PGD; `temperature` and
    `confidence_weight` of the loss.
    """
    one_by_one = spec.option("attack") == "one_by_one"
    objectives = [_cross_entropy_of(i) for i in range(spec.networks)] if one_by_one else [cross_entropy]
    ball, attacked = Ball("linf", spec.option("epsilon")), list[torch.Tensor]()
    for objective in objectives:
        options = {"step_size": spec.option("step_size"), "steps": spec.option("steps"), "objective": objective}
        *_, last = pgd(frozen(), x, y, ball, **options)
        attacked.append(last.x)
    sets = len(attacked)
    versions = concatenated(x, *attacked)
    per_image = synergy(
        model(versions, of_each=True), y.repeat(1 + sets), spec.option("temperature"), spec.option("confidence_weight")
    )
    # The sum of two means, so the loss is that of as many rows as there are images.
    yield Loss(per_image[: len(y)].sum() + per_image[len(y) :].sum() / sets, len(y))


def _cross_entropy_of(number: int) -> Objective:
    """Cross-entropy of one sub-model, as if there were no others: its own logits, not the whole model's."""

    def objective(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits: torch.Tensor = model.experts[number](x)  # type: ignore[index, operator]
        return F.cross_entropy(logits, y, reduction="none"), logits

    return objective


def synergy(outputs: torch.Tensor, y: torch.Tensor, temperature: float, confidence_weight: float) -> torch.Tensor:
    """The loss of each image: sum_i w_i CE_i + confidence_weight * mean_i BCE(c_i, p_i).

    c_i = max softmax(logits_i) * sigmoid(head_i) is sub-model i's confidence, p_i the probability that it gives to the
    true class, w = softmax(temperature * c). The gradient passes neither w nor p. Where sub-model i is right, it passes
    only the head's factor of c_i; where it is wrong, a lower confidence lowers its largest probability too.

    Our assumption: the second part is a mean over sub-models, as the weights of the first sum to 1.

    Args:
        outputs: of the sub-models, shape (n, networks, classes + 1): logits, then the logit of the confidence head.
        y: int64, shape (n,).
        temperature: factor of the confidences in the weights.
        confidence_weight: weight of the second part.

    Returns:
        Shape (n,).
    """
    log_probabilities, head = outputs[..., :-1].log_softmax(2), outputs[..., -1]
    label = y[:, None].expand(head.shape)
    log_true = log_probabilities.gather(2, label[..., None]).squeeze(2)
    log_largest, predicted = log_probabilities.max(2)
    log_confidence = torch.where(predicted == label, log_largest.detach(), log_largest) + F.logsigmoid(head)
    confidence, true = log_confidence.exp(), log_true.detach().exp()
    weights = (temperature * confidence.detach()).softmax(1)
    # Cross-entropy from logarithms: NaN stays NaN and ends the training, where torch's would stop the GPU. At a
    # confidence of 1, log(1 - c) is that of the largest number below 1, without a gradient.
    log_doubt = torch.log1p(-confidence.clamp(max=1 - torch.finfo(confidence.dtype).eps / 2))
    calibration = -(true * log_confidence + (1 - true) * log_doubt)
    return (weights * -log_true).sum(1) + confidence_weight * calibration.mean(1)
