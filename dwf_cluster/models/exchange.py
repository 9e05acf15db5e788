"""Expert parallelism: each process computes whole experts of a mixture, and all processes exchange the results.

Every process has the whole batch and the whole model, of which it trains its own experts and the gate. What an expert
computes does not depend on where it is computed, and sums over experts have a fixed order. So any number of processes
of one kind, with equal numbers of threads, computes the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from dwf_cluster.models.mixture import Experts, Gated


class ExchangedExperts(Experts):
    """Experts of which each process runs its own ones, and receives the logits of the others.

    Every process must call them as often, with the same images. The backward pass gives parameters of the own experts
    their gradients, and the images the sum of all experts' gradients.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `Experts.forward`; the same on every process."""
        own = owned(len(self))
        copies = _Copies.apply(x, len(self)) if x.requires_grad else (x,) * len(own)
        logits = torch.stack([self[number](copy) for number, copy in zip(own, copies, strict=True)], dim=1)
        exchanged: torch.Tensor = _Exchange.apply(logits, len(self))
        return exchanged


@contextmanager
def divided(model: nn.Module) -> Iterator[None]:
    """While the body runs, the processes divide the experts of a `Gated` model."""
    assert isinstance(model, Gated)
    experts = model.experts
    model.experts = ExchangedExperts(experts)
    try:
        yield
    finally:
        model.experts = experts


def owned(experts: int, rank: int | None = None) -> range:
    """Numbers, from 0, of the experts that a process computes, of so many; by default of this process."""
    own, count = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rank = own if rank is None else rank
    return range(experts * rank // count, experts * (rank + 1) // count)


def complete(model: nn.Module, optimizer: torch.optim.SGD) -> None:
    """Give every process the tensors and momentum that other processes have trained; all processes call it together.

    Args:
        model: nothing happens unless its `experts` are `ExchangedExperts`.
        optimizer: that has taken a step at least.
    """
    experts = getattr(model, "experts", None)
    if not isinstance(experts, ExchangedExperts) or not dist.is_initialized():
        return
    has_momentum = any(group["momentum"] for group in optimizer.param_groups)
    for rank in range(dist.get_world_size()):
        for number in owned(len(experts), rank):
            tensors = [tensor.detach() for tensor in (*experts[number].parameters(), *experts[number].buffers())]
            if has_momentum:
                tensors.extend(_momentum(experts[number], optimizer))
            for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
                _broadcast([tensor for tensor in tensors if tensor.dtype == dtype], rank)


def _momentum(expert: nn.Module, optimizer: torch.optim.SGD) -> Iterator[torch.Tensor]:
    for parameter in expert.parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.empty_like(parameter)
            yield state["momentum_buffer"]


def _broadcast(tensors: list[torch.Tensor], rank: int) -> None:
    """Replace tensors of one type by those of the process `rank`."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.broadcast(flat, rank)
    parts = flat.split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.copy_(part.view_as(tensor))


class _Copies(torch.autograd.Function):
    """One copy of the images for each own expert; backward adds the gradients of all experts, in their order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, experts: int) -> tuple[torch.Tensor, ...]:
        ctx.experts = experts
        return tuple(x.view_as(x) for _ in owned(experts))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _gathered(torch.stack(gradients), ctx.experts).sum(0), None


class _Exchange(torch.autograd.Function):
    """Logits of the own experts, shape (n, own experts, classes), to those of all, shape (n, experts, classes)."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, experts: int) -> torch.Tensor:
        ctx.own = owned(experts)
        return _gathered(logits.movedim(1, 0), experts).movedim(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient[:, ctx.own.start : ctx.own.stop], None


def _gathered(own: torch.Tensor, experts: int) -> torch.Tensor:
    """Tensors of the own experts, shape (own experts, ...), to those of all experts, shape (experts, ...)."""
    if not dist.is_initialized():
        return own
    count = dist.get_world_size()
    padded = own.new_zeros(-(-experts // count), *own.shape[1:])  # the processes may have different numbers
    padded[: len(own)] = own
    gathered = [torch.empty_like(padded) for _ in range(count)]
    dist.all_gather(gathered, padded)
    return torch.cat([part[: len(owned(experts, rank))] for rank, part in enumerate(gathered)])
