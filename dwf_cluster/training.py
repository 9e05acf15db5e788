"""The one epoch loop of every model: SGD, cosine annealing, a checkpoint after each epoch and within long ones."""

from __future__ import annotations

import functools
import math
import pkgutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import NotLogits, predict
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.data.device import DeviceImages, to_float
from dwf_cluster.defences.loss import Loss
from dwf_cluster.defences.registry import METHODS, ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.evaluation.registry import Threat
from dwf_cluster.models.frozen import frozen
from dwf_cluster.store import Store, checkpoints, tables


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite. Its text is one line: model, epoch, step, last good checkpoint."""


class Stopped(Exception):
    """Training stopped at the run's request; a checkpoint of its last step is saved."""


@dataclass(frozen=True)
class Probe:
    """The short PGD that follows every epoch and shows catastrophic overfitting.

    Attributes:
        threat: epsilon and step size.
        steps: iterations.
        examples: number of test images, the first ones.
    """

    threat: Threat
    steps: int
    examples: int


@dataclass(frozen=True)
class Task:
    """The training of one model, and where its metrics and checkpoints go.

    Attributes:
        spec: the model: method, epochs, learning rate and so on.
        stage: stored with its metrics and checkpoints.
        seed: of every random draw.
        probe: follows every epoch.
        checkpoint_minutes: between checkpoints within an epoch that takes longer.
        store: for metrics and checkpoints.
        on_epoch: called after each epoch with the row of `metrics`, on every worker.
        stopping: called at each step; if it returns true on any worker, all workers stop after that step.
    """

    spec: ModelSpec
    stage: str
    seed: int
    probe: Probe
    checkpoint_minutes: float
    store: Store
    on_epoch: Callable[[dict[str, Any]], None] = lambda row: None
    stopping: Callable[[], bool] = lambda: False


@dataclass
class _Progress:
    """The completed epochs and their rows of `metrics`; the completed steps of the running epoch, with their sums."""

    epoch: int = 0
    steps: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)


def train(task: Task, model: nn.Module, images: DeviceImages) -> nn.Module:
    """Train from the last checkpoint, or from `model` as it is, to the last epoch.

    In a process group (`torch.distributed`), each worker trains on its part of every batch and the gradients
    are averaged by DDP. Random draws are made for the whole batch, so they do not depend on the number of workers.
    BatchNorm normalises with the statistics of a part; the workers' running statistics are averaged after each step.

    Args:
        task: the settings, and the store to resume from.
        model: on the device of `images`; changed in place and returned.
        images: the data set.

    Raises:
        NonFiniteLoss: if the loss becomes NaN or infinite.
        Stopped: if `task.stopping` became true on one of the workers.
    """
    rank, workers = _workers()
    model.to(memory_format=torch.channels_last)
    optimizer = _optimizer(model, task.spec)
    progress = _restore(task, model, optimizer)
    parallel = _distributed(model) if workers > 1 else model
    while progress.epoch < task.spec.training.epochs:
        row = _epoch(task, progress, model, parallel, optimizer, images)
        if row is None:
            _save(task, model, optimizer, progress)
            raise Stopped
        progress = _Progress(progress.epoch + 1, metrics=[*progress.metrics, row])
        if rank == 0:
            # Metrics first: killed in between, the epoch is run again and its row replaced.
            tables.write(task.store, "metrics", task.spec.name, progress.metrics)
        _save(task, model, optimizer, progress)
        task.on_epoch(row)
    return model


def _epoch(
    task: Task,
    progress: _Progress,
    model: nn.Module,
    parallel: nn.Module,
    optimizer: torch.optim.SGD,
    images: DeviceImages,
) -> dict[str, Any] | None:
    """Train to the end of an epoch, then probe; returns the row of `metrics`, or None if training is to stop."""
    epoch, name, training = progress.epoch, task.spec.name, task.spec.training
    started, key = time.perf_counter() - progress.seconds, (task.seed, name, epoch)
    batches = images.epoch(training.batch_size, Draws(key))
    first, last = epoch * len(batches), training.epochs * len(batches)
    saved_at = time.perf_counter()
    model.train()
    step = first
    try:
        for step, indices in enumerate(batches[progress.steps :], start=first + progress.steps):
            factor = (1 + math.cos(math.pi * step / last)) / 2
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            loss, is_stopping = _step(task, model, parallel, optimizer, images, indices, Draws((*key, step - first)))
            progress.loss += loss * len(indices)
            progress.steps += 1
            now = time.perf_counter()
            progress.seconds = now - started
            if progress.steps < len(batches):
                if is_stopping:
                    return None
                if now > saved_at + 60 * task.checkpoint_minutes:
                    _save(task, model, optimizer, progress)
                    saved_at = time.perf_counter()
                    started += saved_at - now  # an epoch's seconds are without its checkpoints
        seconds = time.perf_counter() - started
        clean, robust = run_probe(model, images, task.probe)
    except NotLogits as error:
        saved = checkpoints.latest_path(task.store, name) or "none"
        raise NonFiniteLoss(
            f"{error} in epoch {epoch + 1}, step {step + 1} of {name}; last good checkpoint: {saved}"
        ) from None
    return {
        "stage": task.stage,
        "model": name,
        "epoch": epoch + 1,
        "step": step + 1,
        "loss": progress.loss / len(images.x_train),
        "clean_accuracy": clean,
        "probe_pgd_accuracy": robust,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "images_per_second": len(images.x_train) / seconds,
        "seconds": seconds,
        "device": images.x_train.device.type,
    }


def run_probe(model: nn.Module, images: DeviceImages, probe: Probe) -> tuple[float, float]:
    """Accuracy (0..1) on the first test images, clean and under the probe's PGD."""
    frozen_model = frozen(model)
    x, y = to_float(images.x_test[: probe.examples]), images.y_test[: probe.examples]
    ball = Ball("linf", probe.threat.epsilon)
    first, *_, last = pgd(frozen_model, x, y, ball, step_size=probe.threat.step_size, steps=probe.steps)
    assert first.logits is not None
    clean, robust = (float((z.argmax(1) == y).double().mean()) for z in (first.logits, predict(frozen_model, last.x)))
    return clean, robust


def _step(
    task: Task,
    model: nn.Module,
    parallel: nn.Module,
    optimizer: torch.optim.SGD,
    images: DeviceImages,
    indices: torch.Tensor,
    draws: Draws,
) -> tuple[float, bool]:
    """Train on one batch, one optimiser step for each loss of the method.

    Returns:
        The batch's mean loss, averaged over its optimiser steps, and whether to stop.

    Raises:
        NotLogits: if the loss is not finite.
        ValueError: if the method breaks its contract (`defences.registry.Method.losses`).
    """
    # Kept until the optimiser's step, so all parts of a batch attack the model as it is before that step.
    frozen_model = functools.cache(functools.partial(frozen, model))
    is_stopping, means = task.stopping(), list[float]()
    for share in _backward(task.spec, parallel, frozen_model, images, indices, draws):
        # The request to stop is reduced with the loss, so all workers see it after the same step.
        reduced = torch.stack([share, torch.full_like(share, is_stopping)])
        if dist.is_initialized():
            dist.all_reduce(reduced)
        mean, stops = reduced.tolist()
        if not math.isfinite(mean):
            raise NotLogits(f"the loss became {mean}")
        means.append(mean)
        is_stopping = stops > 0
        optimizer.step()
        optimizer.zero_grad()
        frozen_model.cache_clear()
        _average_statistics(model)
    if not means:
        raise ValueError(f"method {task.spec.method}: no loss for a batch; a method yields one at least")
    return sum(means) / len(means), is_stopping


def _backward(
    spec: ModelSpec,
    parallel: nn.Module,
    frozen_model: Callable[[], nn.Module],
    images: DeviceImages,
    indices: torch.Tensor,
    draws: Draws,
) -> Iterator[torch.Tensor]:
    """Add up the gradients of a batch, cut into its parts, for one loss of the method after the other.

    Yields:
        For each loss, when all its gradients are computed: this worker's share of the mean over the batch, shape ().
    """
    rank, workers = _workers()
    start, stop = len(indices) * rank // workers, len(indices) * (rank + 1) // workers
    cuts = torch.arange(start, stop).tensor_split(spec.training.accumulation)
    parts = [slice(int(cut[0]), int(cut[-1]) + 1) for cut in cuts if len(cut)]
    method = pkgutil.resolve_name(METHODS[spec.method].losses)

    def losses(part: slice) -> Iterator[Loss]:
        x, y = images.train_batch(indices, draws, part)
        yield from method(spec, parallel, frozen_model, x, y, draws)

    generators = [losses(part) for part in parts]
    while True:
        share, ended = torch.zeros((), device=indices.device), 0
        for number, (part, generator) in enumerate(zip(parts, generators, strict=True), start=1):
            is_not_last = isinstance(parallel, DistributedDataParallel) and number < len(parts)
            with parallel.no_sync() if is_not_last else nullcontext():  # type: ignore[operator]
                loss = next(generator, None)
                if loss is None:
                    ended += 1
                    continue
                # DDP averages over workers, so the factor `workers` makes the sum of parts the whole batch's mean.
                versions = loss.rows / (part.stop - part.start)
                mean = loss.total * (workers / (versions * len(indices)))
                mean.backward()  # type: ignore[no-untyped-call]
            share += mean.detach() / workers
        if ended == len(parts):
            return
        if ended:
            raise ValueError(f"method {spec.method}: more losses for one part of a batch than for another")
        yield share


def _workers() -> tuple[int, int]:
    """(rank, number of workers) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _distributed(model: nn.Module) -> DistributedDataParallel:
    """The model with gradients that are averaged over workers, always in the same order.

    By default DDP rebuilds its buckets after its first step, in the order in which gradients became ready. After a
    restart the first step would then add the workers' gradients in another order than the uninterrupted run. With
    `find_unused_parameters` the buckets stay as they are.

    Buffers need no broadcast: every worker holds the same ones after each step (`_average_statistics`).
    """
    return DistributedDataParallel(model, find_unused_parameters=True, broadcast_buffers=False)


def _optimizer(model: nn.Module, spec: ModelSpec) -> torch.optim.SGD:
    """SGD; parameters of the submodules in `spec.own_rates` have their own learning rate and weight decay."""
    training = spec.training
    trained = [p for p in model.parameters() if p.requires_grad]
    own = {name: {id(p) for p in model.get_submodule(name).parameters()} for name, _, _ in spec.own_rates}
    others = [p for p in trained if not any(id(p) in ids for ids in own.values())]
    groups = [(others, training.learning_rate, training.weight_decay)]
    groups += [([p for p in trained if id(p) in own[name]], rate, decay) for name, rate, decay in spec.own_rates]
    return torch.optim.SGD(
        [{"params": p, "lr": rate, "peak": rate, "weight_decay": decay} for p, rate, decay in groups if p],
        momentum=training.momentum,
    )


def _average_statistics(model: nn.Module) -> None:
    """Average BatchNorm's running statistics over workers, so that all workers hold the same model."""
    _, workers = _workers()
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    if workers == 1 or not statistics:
        return
    flat = torch.cat([b.flatten() for b in statistics])
    dist.all_reduce(flat)
    parts = (flat / workers).split([b.numel() for b in statistics])  # type: ignore[no-untyped-call]
    for buffer, part in zip(statistics, parts, strict=True):
        buffer.copy_(part.view_as(buffer))


def _save(task: Task, model: nn.Module, optimizer: torch.optim.SGD, progress: _Progress) -> None:
    """Save a checkpoint on the first worker; all workers hold the same model."""
    if _workers()[0] > 0:
        return
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    trained = progress.epoch == task.spec.training.epochs  # its optimizer takes no further step
    for name, parameter in () if trained else model.named_parameters():
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    state = {"stage": task.stage, "epochs": task.spec.training.epochs, **asdict(progress)}
    checkpoints.save(task.store, task.spec.name, progress.epoch, progress.steps, tensors, state)


def _restore(task: Task, model: nn.Module, optimizer: torch.optim.SGD) -> _Progress:
    """Load the newest checkpoint, if there is one; returns its progress."""
    checkpoint = checkpoints.load_latest(task.store, task.spec.name)
    if checkpoint is None:
        return _Progress()
    model.load_state_dict(checkpoint.weights)
    for name, parameter in model.named_parameters():
        momentum = checkpoint.tensors.get(f"momentum.{name}")
        if momentum is not None:
            # With the parameter's strides, as the optimizer creates it: with other strides other kernels would run.
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
    state = checkpoint.state
    if "metrics" not in state:  # saved by an earlier version
        state = {**state, "metrics": tables.metrics_until(task.store, task.spec.name, checkpoint.epoch)}
    return _Progress(**{field.name: state[field.name] for field in fields(_Progress)})
