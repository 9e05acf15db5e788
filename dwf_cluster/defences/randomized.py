"""The attacks of randomised adversarial training: strengths are drawn for each batch, as a ModelSpec's options say."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from dwf_cluster.attacks import graph
from dwf_cluster.attacks import pgd as attacks
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.determinism import Draws


def fgsm_epsilon(spec: ModelSpec, draws: Draws) -> float:
    """FGSM's epsilon for a batch, pixels in [0, 1].

    Options: `epsilons`, and `epsilon_draw`: `set` (one of them) or `range` (uniformly from smallest to largest).
    """
    epsilons = spec.option("epsilons")
    if spec.option("epsilon_draw") == "range":
        return draws.uniform("epsilon", min(epsilons), max(epsilons))
    return float(draws.choice("epsilon", epsilons))


def pgd(spec: ModelSpec, model: nn.Module, x: torch.Tensor, y: torch.Tensor, draws: Draws) -> Iterator[attacks.Iterate]:
    """The first and the last of PGD's iterates, and perhaps those between; the number of iterations and the step size
    are drawn for the batch.

    Options: `epsilon`; `steps` and `step_sizes` to draw from; `random_start`: each image starts at a point of its ball
    that is drawn for this image.

    Args:
        spec: the model that is trained.
        model: frozen model.
        x, y: the first images of the part of the batch that is computed here, and their labels.
        draws: of the part.
    """
    ball = Ball("linf", spec.option("epsilon"))
    attack = graph.pgd if graph.is_used(model, x) else attacks.pgd
    return attack(
        model,
        x,
        y,
        ball,
        step_size=draws.choice("step_size", spec.option("step_sizes")),
        steps=draws.choice("steps", spec.option("steps")),
        start=ball.random_point(x, draws.generators("start", len(x))) if spec.option("random_start") else None,
    )
