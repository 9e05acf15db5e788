"""What the experts of a mixture do: alone, against each other's adversarial images, and when one of them is missing."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import predict
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.evaluation.column import (
    EXPERT_CLEAN,
    EXPERT_DROPPED_CLEAN,
    EXPERT_DROPPED_PGD,
    EXPERT_PGD,
    EXPERT_TRANSFER,
    expert_columns,
    longest_pgd,
)
from dwf_cluster.evaluation.run import Attacked, Batch
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Gated, mix

_TINY = 1e-30
"""Added to the remaining gate weights: if all of them have underflowed to 0, the remaining experts weigh the same."""


class WithoutExpert(nn.Module):
    """A mixture without one of its experts; the gate's other weights are scaled so that they sum to 1.

    A hard gate chooses the remaining expert of the largest soft weight: a `Gate` with its straight-through gradient,
    any other without a gradient.

    Args:
        mixture: frozen, of two experts or more.
        dropped: index of the expert.
    """

    def __init__(self, mixture: Gated, dropped: int) -> None:
        super().__init__()
        self.kept = [i for i in range(len(mixture.experts)) if i != dropped]
        self.gate = mixture.gate
        self.experts = type(mixture.experts)(mixture.experts[i] for i in self.kept)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to logits, shape (n, classes)."""
        return mix(self._weights(x), self.experts(x))

    def _weights(self, x: torch.Tensor) -> torch.Tensor:
        """Weights of the remaining experts, shape (n, remaining experts)."""
        if not isinstance(self.gate, Gate) and getattr(self.gate, "hard", False):
            with torch.no_grad():
                scores = self.gate.log_weights(x)[:, self.kept]  # type: ignore[operator]
            return F.one_hot(scores.argmax(1), len(self.kept)).to(x.dtype)
        is_hard = isinstance(self.gate, Gate) and self.gate.hard
        soft: torch.Tensor = self.gate.layers(x) if isinstance(self.gate, Gate) else self.gate(x)
        weights = soft[:, self.kept] + _TINY
        weights = weights / weights.sum(1, keepdim=True)
        if is_hard:
            chosen = F.one_hot(weights.argmax(1), weights.shape[1]).to(weights.dtype)
            weights = chosen + (weights - weights.detach())
        return weights


def experts(batch: Batch) -> Iterator[Attacked]:
    """The columns of `registry.expert_columns`; PGD is the longest of the PGD columns, its last iterate.

    Each expert is tested on the images of its own PGD, of every other expert's, and of the mixture's. The mixture
    without an expert is attacked by PGD of its own: images made on the whole mixture would be a transfer attack, which
    is weaker.
    """
    mixture, x = batch.model, batch.x
    assert isinstance(mixture, Gated)
    columns = {
        (column.attack, column.source): column
        for column in expert_columns(batch.evaluation, batch.threat, batch.experts)
    }
    for name, logits in zip(batch.experts, _of_each(mixture, x), strict=True):
        yield Attacked(columns[EXPERT_CLEAN, name], x, logits)
    moved, count = _attacked(batch, mixture)
    for name, logits in zip(batch.experts, _of_each(mixture, moved), strict=True):
        yield Attacked(columns[EXPERT_PGD, name], moved, logits, count)
        count = 0
    for source, expert in zip(batch.experts, mixture.experts, strict=True):
        moved, count = _attacked(batch, expert)
        for name, logits in zip(batch.experts, _of_each(mixture, moved), strict=True):
            yield Attacked(columns[EXPERT_TRANSFER + name, source], moved, logits, count)
            count = 0
    for i, name in enumerate(batch.experts if len(batch.experts) > 1 else ()):
        rest = frozen(WithoutExpert(mixture, i))
        yield Attacked(columns[EXPERT_DROPPED_CLEAN, name], x, predict(rest, x))
        moved, count = _attacked(batch, rest)
        yield Attacked(columns[EXPERT_DROPPED_PGD, name], moved, predict(rest, moved), count)


def _of_each(mixture: Gated, x: torch.Tensor) -> list[torch.Tensor]:
    """Logits of each expert, shape (n, classes)."""
    return [predict(expert, x) for expert in mixture.experts]


def _attacked(batch: Batch, model: nn.Module) -> tuple[torch.Tensor, int]:
    """The last iterate of PGD on a model, and the gradients of single images that it cost."""
    ball, steps = Ball(batch.threat.norm, batch.threat.epsilon), longest_pgd(batch.evaluation)
    start = ball.random_point(batch.x, batch.generators) if batch.evaluation.random_start else None
    count = 0
    for iterate in pgd(model, batch.x, batch.y, ball, step_size=batch.threat.step_size, steps=steps, start=start):
        count += iterate.gradient_count
    return iterate.x, count
