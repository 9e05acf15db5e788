"""ADVMoE (Zhang et al., "Robust Mixture-of-Expert Training for Convolutional Neural Networks", ICCV 2023).

Experts and router are trained in turn, each against an attack on both: two steps of the optimiser for each batch. The
paper states a bi-level problem, in which both levels minimise the TRADES loss of the routed network, on batches of
their own (remembered, not checked). The authors' release uses one batch for both levels, as this file does, and trains
its router to predict the label modulo the number of experts. Both objectives can be chosen.

Deviations from the release: the cosine schedule is per step; attacked and clean images of a step share BatchNorm's
statistics, as in `dwf`; the router sees normalised pixels, and has a learning rate of its own. With 0.1, the release's,
users report scores that become NaN. That the rate is the reason is inferred, not checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.attacks.ball import Ball, draw
from dwf_cluster.attacks.gradient import report
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.defences.loss import START_NOISE, Frozen, Loss, concatenated, divergence, trades
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.models.advmoe import AdvMoE


def build(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> AdvMoE:
    """The untrained network and its router; they have no parents.

    Options: `experts`, `ratio` of a pathway's width, `router`: `shared` or `per-layer`.
    """
    per_layer = spec.option("router") == "per-layer"
    return AdvMoE(images, spec.width, spec.option("experts"), spec.option("ratio"), per_layer)


def losses(
    spec: ModelSpec, model: nn.Module, frozen: Frozen, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> Iterator[Loss]:
    """The TRADES loss for the experts and all that they share, then the router's loss, each on images of its own.

    Options: `beta`, weight of the divergences; `router_objective`: `label-modulo` or `trades`; those of `attack`.

    Raises:
        NotLogits: if the router's scores are not finite: an argmax would send every image to the first expert.
    """
    beta, experts = spec.option("beta"), spec.option("experts")
    network: nn.Module = getattr(model, "module", model)  # DDP's
    gate = list(network.get_submodule("gate").parameters())

    attacked = concatenated(x, attack(spec, frozen(), x, draws, "start"))
    with _fixed(gate):
        logits = model(attacked)
    yield trades(logits, y, beta)

    attacked = concatenated(x, attack(spec, frozen(), x, draws, "router start"))
    if spec.option("router_objective") == "trades":
        router = {id(parameter) for parameter in gate}  # a tensor's `==` compares values, not identity
        with _fixed(parameter for parameter in network.parameters() if id(parameter) not in router):
            logits = model(attacked)
        yield trades(logits, y, beta, "the router's loss")
        return
    clean, moved = model(attacked, scores_only=True).chunk(2)
    targets = (y % experts)[:, None].expand(-1, clean.shape[1])
    supervised = F.cross_entropy(clean.flatten(0, 1), targets.flatten(), reduction="sum")
    routing = divergence(moved, clean).sum()
    # With several score vectors, the mean over them: each layer's router has the same loss.
    yield Loss(beta * (supervised + routing) / clean.shape[1], len(y), "the router's loss")


def attack(spec: ModelSpec, model: nn.Module, x: torch.Tensor, draws: Draws, purpose: str) -> torch.Tensor:
    """PGD that moves the logits and the router's scores away from those of the clean images.

    It makes KL(clean || attacked) of the model's softmax plus that of the router's large, from a small Gaussian start.
    The gradient reaches the router by the second term and, straight-through, by the first.

    Options: `epsilon`, `step_size`, `steps`.

    Args:
        spec: the model that is trained.
        model: frozen model.
        x: the images of the part of the batch that is computed here.
        draws: of the part; each image's start depends on the image alone.
        purpose: of the draws of the starts.

    Raises:
        NotLogits: if the router's scores, or the logits, are not finite.
    """
    assert isinstance(model, AdvMoE)
    advmoe = model  # of this type in `objective` too, whose own parameter is any module
    with torch.no_grad():
        scores = advmoe.gate.scores(x)
        report(model, "the router's scores contain NaN or infinity", ~scores.isfinite().all())
        logits = advmoe.routed(x, scores)
    classes = logits.shape[1]

    def objective(model: nn.Module, x: torch.Tensor, clean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        moved_scores = advmoe.gate.scores(x)
        moved = advmoe.routed(x, moved_scores)
        routing = divergence(moved_scores, clean[:, classes:].view_as(moved_scores)).mean(1)
        return divergence(moved, clean[:, :classes]) + routing, moved

    ball = Ball("linf", spec.option("epsilon"))
    start = ball.project(x, x + START_NOISE * draw(x, draws.generators(purpose, len(x)), torch.randn))
    clean = torch.cat([logits, scores.flatten(1)], 1)
    steps, step_size = spec.option("steps"), spec.option("step_size")
    *_, last = pgd(model, x, clean, ball, step_size=step_size, steps=steps, start=start, objective=objective)
    return last.x


@contextmanager
def _fixed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Compute a loss without gradients of these parameters: the step that follows leaves them, and their momentum."""
    fixed = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in fixed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in fixed:
            parameter.requires_grad_(True)
