"""One batch of training: gradients of its parts, averaged over workers, and an optimiser step for each loss."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dwf_cluster.attacks.gradient import NotLogits
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.defences.loss import Loss
from dwf_cluster.defences.registry import METHODS, ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.models.precision import InBfloat16
from dwf_cluster.models.refresh import FrozenModel


@dataclass(frozen=True)
class Batch:
    """One batch of training, over all workers.

    Attributes:
        indices: of its training images, shape (n,).
        draws: its random draws.
        perturbation: of methods that keep one (`defences.registry.Method`), shape (n or more, channels, height, width).
            Changed in place; the same on all workers before and after the batch.
    """

    indices: torch.Tensor
    draws: Draws
    perturbation: torch.Tensor | None = None

    def rows(self, rank: int, count: int) -> tuple[int, int]:
        """The first image of a worker's part of the batch, and the one after its last."""
        return len(self.indices) * rank // count, len(self.indices) * (rank + 1) // count


def attacked_model(spec: ModelSpec, model: nn.Module) -> FrozenModel:
    """The model as its training attacks it."""
    training = spec.training
    dtype = torch.bfloat16 if training.precision == "bfloat16" else None
    return FrozenModel(model, batch_statistics=training.attack_batchnorm == "train", dtype=dtype)


def train_batch(
    spec: ModelSpec,
    parallel: nn.Module,
    frozen_model: FrozenModel,
    optimizer: torch.optim.SGD,
    images: DeviceImages,
    batch: Batch,
    *,
    requests: Sequence[bool] = (),
) -> tuple[float, list[bool]]:
    """Train on one batch, one optimiser step for each loss of the method.

    Args:
        spec: of the model.
        parallel: the model, wrapped by DDP if there are several workers.
        frozen_model: `attacked_model` of the model. It stays as it is until the optimiser's step, so all parts of a
            batch attack the model as it is before that step.
        optimizer: of the model.
        images: the data set.
        batch: its images and random draws.
        requests: of this worker to all workers, such as to stop.

    Returns:
        The batch's mean loss, averaged over its optimiser steps, and for each request whether any worker has made it.

    Raises:
        NotLogits: if the loss is not finite, or an attack found the model's outputs wrong, on any worker.
        ValueError: if the method breaks its contract (`defences.registry.Method.losses`).
    """
    model = parallel.module if isinstance(parallel, DistributedDataParallel) else parallel
    means = list[float]()
    for share, name in _backward(spec, parallel, frozen_model, images, batch):
        faults, made = frozen_model.faults, [torch.full_like(share, request) for request in requests]
        values = torch.stack([share, *made, *(fault.to(share.dtype) for fault in faults.values())])
        mean, *counts = _summed(spec, model, values).tolist()  # the step's only wait for the device
        requests = [count > 0 for count in counts[: len(made)]]
        if message := next((text for text, count in zip(faults, counts[len(made) :], strict=True) if count), None):
            raise NotLogits(message)
        if not math.isfinite(mean):
            raise NotLogits(f"{name} became {mean}")
        means.append(mean)
        optimizer.step()
        optimizer.zero_grad()
        frozen_model.expire()
    if not means:
        raise ValueError(f"method {spec.method}: no loss for a batch; a method yields one at least")
    _exchange_perturbation(batch)
    return sum(means) / len(means), list(requests)


def _backward(
    spec: ModelSpec,
    parallel: nn.Module,
    frozen_model: FrozenModel,
    images: DeviceImages,
    batch: Batch,
) -> Iterator[tuple[torch.Tensor, str]]:
    """Add up the gradients of a batch, cut into its parts, for one loss of the method after the other.

    Yields:
        For each loss, when all its gradients are computed: this worker's share of the mean over the batch, shape (),
        and the loss's name.
    """
    rank, count = (0, 1) if spec.parallelism == "experts" else workers()
    indices, draws = batch.indices, batch.draws
    cuts = torch.arange(*batch.rows(rank, count)).tensor_split(spec.training.accumulation)
    parts = [slice(int(cut[0]), int(cut[-1]) + 1) for cut in cuts if len(cut)]
    name = METHODS[spec.method].losses
    if name is None:
        raise ValueError(f"method {spec.method}: its models are not trained")
    method = pkgutil.resolve_name(name)

    def losses(part: slice) -> Iterator[Loss]:
        x, y = images.train_batch(indices, draws, part)
        kept = () if batch.perturbation is None else (batch.perturbation[part],)
        yield from method(spec, trained, frozen_model, x, y, replace(draws, first=part.start), *kept)

    trained = InBfloat16(parallel) if spec.training.precision == "bfloat16" else parallel
    generators = [losses(part) for part in parts]
    while True:
        share, ended, loss_name = torch.zeros((), device=indices.device), 0, ""
        for number, (part, generator) in enumerate(zip(parts, generators, strict=True), start=1):
            is_not_last = isinstance(parallel, DistributedDataParallel) and number < len(parts)
            with parallel.no_sync() if is_not_last else nullcontext():  # type: ignore[operator]
                loss = next(generator, None)
                if loss is None:
                    ended += 1
                    continue
                # DDP averages over workers, so the factor `count` makes the sum of parts the whole batch's mean.
                versions = loss.rows / (part.stop - part.start)
                mean = loss.total * (count / (versions * len(indices)))
                mean.backward()  # type: ignore[no-untyped-call]
            share += mean.detach() / count
            loss_name = loss.name
        if ended == len(parts):
            return
        if ended:
            raise ValueError(f"method {spec.method}: more losses for one part of a batch than for another")
        yield share, loss_name


def workers() -> tuple[int, int]:
    """(rank, number of workers) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def distributed(model: nn.Module) -> DistributedDataParallel:
    """The model with gradients that are averaged over workers, always in the same order.

    By default DDP rebuilds its buckets after its first step, in the order in which gradients became ready. After a
    restart the first step would then add the workers' gradients in another order than the uninterrupted run. With
    `find_unused_parameters` the buckets stay as they are.

    Buffers need no broadcast: every worker holds the same ones after each step (`_summed`).
    """
    return DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)


def _exchange_perturbation(batch: Batch) -> None:
    """Give all workers all rows of the perturbation; each has changed its own. A row of zeros adds nothing."""
    if batch.perturbation is None or workers()[1] == 1:
        return
    changed, (start, stop) = batch.perturbation[: len(batch.indices)], batch.rows(*workers())
    changed[:start], changed[stop:] = 0, 0
    dist.all_reduce(changed)


def _summed(spec: ModelSpec, model: nn.Module, values: torch.Tensor) -> torch.Tensor:
    """Sum over workers: this worker's share of the loss, its requests and faults, shape (n,).

    The same all-reduce averages the running statistics of BatchNorm, so that all workers hold the same model. Workers
    that divide the experts have the same loss, and no statistics in common.
    """
    rank, count = workers()
    if count == 1:
        return values
    statistics = list[torch.Tensor]()
    if spec.parallelism == "ddp":
        statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    elif rank:
        values[0] = 0  # the loss counts once
    reduced = torch.cat([values, *(buffer.flatten() for buffer in statistics)])
    dist.all_reduce(reduced)
    sizes = [len(values), *(buffer.numel() for buffer in statistics)]
    values, *parts = reduced.split(sizes)  # type: ignore[no-untyped-call]
    for buffer, part in zip(statistics, parts, strict=True):
        buffer.copy_((part / count).view_as(buffer))
    return values
