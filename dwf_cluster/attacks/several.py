"""PGD on several models, with the same images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import NotLogits
from dwf_cluster.attacks.pgd import Iterate, pgd
from dwf_cluster.models.deterministic import is_plain
from dwf_cluster.models.frozen import WHOLE_BATCH
from dwf_cluster.models.mixture import Experts, Gated
from dwf_cluster.models.stack import Stack, are_stackable


def last_iterates(
    models: Iterable[nn.Module], x: torch.Tensor, y: torch.Tensor, ball: Ball, *, step_size: float, steps: int
) -> Iterator[Iterate]:
    """The last iterate of PGD on each model; small networks of one structure are attacked in one pass.

    Args:
        models: frozen. One that returns NaN, infinity or probabilities has no iterate; of those in one pass, only one
            that returns NaN or infinity, because trained networks of one structure all return logits, or none does.
        x, y, ball, step_size, steps: as for `pgd`.
    """
    for group in _groups(models, x):
        yield from _last_iterates(group, x, y, ball, step_size, steps)


def _last_iterates(
    group: Sequence[nn.Module], x: torch.Tensor, y: torch.Tensor, ball: Ball, step_size: float, steps: int
) -> Iterator[Iterate]:
    count = len(group)
    model = _SideBySide(group) if count > 1 else group[0]
    try:
        *_, last = pgd(model, x.repeat(count, 1, 1, 1), y.repeat(count), ball, step_size=step_size, steps=steps)
    except NotLogits:
        if count > 1:  # the others of the group may be sound
            for one in group:
                yield from _last_iterates([one], x, y, ball, step_size, steps)
        return
    for part in last.x.chunk(count):
        yield Iterate(steps, torch.arange(len(x), device=x.device), part)


def _groups(models: Iterable[nn.Module], x: torch.Tensor) -> list[list[nn.Module]]:
    """Models that are to be attacked together: several only if one pass is faster for these images."""
    shared: list[list[nn.Module]] = []
    alone: list[list[nn.Module]] = []
    for model in models:
        if not (_is_network(model) and Stack([model]).is_faster(x)):
            alone.append([model])
        elif group := next((group for group in shared if are_stackable([group[0], model])), None):
            group.append(model)
        else:
            shared.append([model])
    return shared + alone


def _is_network(model: nn.Module) -> bool:
    """Whether its tensors are all parameters and buffers, and no step depends on their values, as one pass needs."""
    has_experts = any(isinstance(module, Gated | Experts) for module in model.modules())
    return is_plain(model) and not has_experts and are_stackable([model])


class _SideBySide(nn.Module):
    """Frozen networks that each classify images of their own: a batch has equally many of each, in their order."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        self._stack, self._count = Stack(networks), len(networks)
        setattr(self, WHOLE_BATCH, True)  # a part of a batch would give a network the images of another one

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._stack.classify_own(x.view(self._count, -1, *x.shape[1:])).flatten(0, 1)
