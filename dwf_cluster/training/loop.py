"""The one epoch loop: SGD with momentum and weight decay, cosine annealing, a checkpoint after each epoch.

Within an epoch it saves a checkpoint every `checkpoint_minutes`, and when the run asks it to stop.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dwf_cluster import attacks
from dwf_cluster.data.device import DeviceImages, to_float
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment, Gate, Training
from dwf_cluster.store import Store, checkpoints, tables

Perturb = Callable[[Callable[[], nn.Module], torch.Tensor, torch.Tensor, Draws], tuple[torch.Tensor, torch.Tensor]]
"""(frozen model, images, labels, draws of the step) -> images and labels to train on.

The frozen model is a function that builds it, so a step that attacks nothing does not pay for it.
"""


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite. Its text is one line: model, epoch, step, last good checkpoint."""


class Stopped(Exception):
    """Training stopped at the run's request; a checkpoint of its last step is saved."""


@dataclass(frozen=True)
class Task:
    """The training of one model, and where its metrics and checkpoints go.

    Attributes:
        experiment: decides the numbers.
        store: for metrics and checkpoints.
        stage: `experts` or `joint`.
        name: of the model: `fgsm-2`, `mixture`.
        training: epochs, learning rate, ... of this stage.
        report: called after each epoch with the row of `metrics`, on every worker.
        stopping: called at each step; if it returns true on any worker, all workers stop after that step.
    """

    experiment: Experiment
    store: Store
    stage: str
    name: str
    training: Training
    report: Callable[[dict[str, Any]], None] = lambda row: None
    stopping: Callable[[], bool] = lambda: False


@dataclass
class _Progress:
    """The completed epochs and their rows of `metrics`; the completed steps of the running epoch, with their sums."""

    epoch: int = 0
    steps: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)


def train(task: Task, model: nn.Module, images: DeviceImages, perturb: Perturb) -> nn.Module:
    """Train from the last checkpoint, or from `model` as it is, to the last epoch.

    In a process group (`torch.distributed`), each worker trains on its part of every batch and the gradients
    are averaged by DDP. Random draws are made for the whole batch, so they do not depend on the number of workers.
    BatchNorm normalises with the statistics of a part; the workers' running statistics are averaged after each step.

    Args:
        task: the settings, and the store to resume from.
        model: on the device of `images`; changed in place. Parameters of a submodule `gate` get the gate's
            learning rate and weight decay.
        images: the data set.
        perturb: makes the batch to train on from a clean one; its images may be several times as many.

    Returns:
        The model.

    Raises:
        NonFiniteLoss: if the loss becomes NaN or infinite.
        Stopped: if `task.stopping` became true on one of the workers.
    """
    rank, workers = _workers()
    model.to(memory_format=torch.channels_last)
    optimizer = _optimizer(model, task.training, task.experiment.gate)
    progress = _restore(task, model, optimizer)
    parallel = _distributed(model) if workers > 1 else model
    while progress.epoch < task.training.epochs:
        row = _epoch(task, progress, model, parallel, optimizer, images, perturb)
        if row is None:
            _save(task, model, optimizer, progress)
            raise Stopped
        progress = _Progress(progress.epoch + 1, metrics=[*progress.metrics, row])
        if rank == 0:
            # Metrics first: killed in between, the epoch is run again and its row replaced.
            tables.write(task.store, "metrics", task.name, tables.rows_of(task.experiment, progress.metrics))
        _save(task, model, optimizer, progress)
        task.report(row)
    return model


def _epoch(
    task: Task,
    progress: _Progress,
    model: nn.Module,
    parallel: nn.Module,
    optimizer: torch.optim.SGD,
    images: DeviceImages,
    perturb: Perturb,
) -> dict[str, Any] | None:
    """Train to the end of an epoch, then probe; returns the row of `metrics`, or None if training is to stop."""
    epoch = progress.epoch
    started, key = time.perf_counter() - progress.seconds, (task.experiment.seed, task.name, epoch)
    batches = images.epoch(task.training.batch_size, Draws(key))
    first, last = epoch * len(batches), task.training.epochs * len(batches)
    pause = 60 * task.experiment.checkpoint_minutes
    due = time.perf_counter() + pause
    model.train()
    step = first
    try:
        for step, indices in enumerate(batches[progress.steps :], start=first + progress.steps):
            factor = (1 + math.cos(math.pi * step / last)) / 2
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            loss, stopping = _accumulate(task, parallel, images, indices, perturb, Draws((*key, step - first)))
            if not math.isfinite(loss):
                raise attacks.NotLogits(f"the loss became {loss}")
            optimizer.step()
            optimizer.zero_grad()
            _average_statistics(model)
            progress.loss += loss * len(indices)
            progress.steps += 1
            progress.seconds = time.perf_counter() - started
            if progress.steps < len(batches):
                if stopping:
                    return None
                if time.perf_counter() > due:
                    saving = time.perf_counter()
                    _save(task, model, optimizer, progress)
                    started += time.perf_counter() - saving
                    due = time.perf_counter() + pause
        seconds = time.perf_counter() - started
        clean, robust = probe(model, images, task.experiment)
    except attacks.NotLogits as error:
        saved = checkpoints.latest_path(task.store, task.name)
        raise NonFiniteLoss(
            f"{error} in epoch {epoch + 1}, step {step + 1} of {task.name}; last good checkpoint: {saved or 'none'}"
        ) from None
    return {
        "stage": task.stage,
        "model": task.name,
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


def probe(model: nn.Module, images: DeviceImages, experiment: Experiment) -> tuple[float, float]:
    """Accuracy (0..1) on the first test images, clean and under a short PGD: shows catastrophic overfitting."""
    view, count = attacks.frozen(model), experiment.evaluation.probe_examples
    x, y = to_float(images.x_test[:count]), images.y_test[:count]
    pgd, steps = experiment.pgd, experiment.evaluation.probe_steps
    ball = attacks.Ball("linf", pgd.epsilon)
    first, *_, last = attacks.pgd(view, x, y, ball, step_size=pgd.step_size, steps=steps)
    assert first.logits is not None
    clean, robust = (float((z.argmax(1) == y).double().mean()) for z in (first.logits, attacks.predict(view, last.x)))
    return clean, robust


def _accumulate(
    task: Task,
    parallel: nn.Module,
    images: DeviceImages,
    indices: torch.Tensor,
    perturb: Perturb,
    draws: Draws,
) -> tuple[float, bool]:
    """Accumulate one batch's gradients on every worker; returns the batch's mean loss, and whether to stop."""
    rank, workers = _workers()
    start, stop = len(indices) * rank // workers, len(indices) * (rank + 1) // workers
    cuts = torch.arange(start, stop).tensor_split(task.training.accumulation)
    parts = [slice(int(cut[0]), int(cut[-1]) + 1) for cut in cuts if len(cut)]
    model = parallel.module if isinstance(parallel, DistributedDataParallel) else parallel
    # Built by the first part's attack, so all parts attack the model as it is before the step.
    frozen = functools.cache(functools.partial(attacks.frozen, model))
    # The request to stop is reduced with the loss, so all workers see it after the same step.
    total = torch.tensor([0.0, task.stopping()], device=indices.device)
    for number, part in enumerate(parts, start=1):
        x, y = perturb(frozen, *images.train_batch(indices, draws, part), draws)
        copies = len(y) // (part.stop - part.start)
        waits = isinstance(parallel, DistributedDataParallel) and number < len(parts)
        with parallel.no_sync() if waits else nullcontext():  # type: ignore[operator]
            logits = parallel(x.contiguous(memory_format=torch.channels_last))
            # DDP averages over workers, so the factor `workers` makes the sum of parts the whole batch's mean.
            loss = F.cross_entropy(logits, y, reduction="sum") * (workers / (copies * len(indices)))
            loss.backward()  # type: ignore[no-untyped-call]
        total[0] += loss.detach() / workers
    if workers > 1:
        dist.all_reduce(total)
    mean, stopping = total.tolist()
    return mean, stopping > 0


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


def _optimizer(model: nn.Module, training: Training, gate: Gate) -> torch.optim.SGD:
    trained = [p for p in model.parameters() if p.requires_grad]
    gates = {id(p) for n, m in model.named_children() if n == "gate" for p in m.parameters()}
    groups = [
        ([p for p in trained if id(p) not in gates], training.learning_rate, training.weight_decay),
        ([p for p in trained if id(p) in gates], gate.learning_rate, gate.weight_decay),
    ]
    return torch.optim.SGD(
        [{"params": p, "lr": lr, "peak": lr, "weight_decay": decay} for p, lr, decay in groups if p],
        momentum=training.momentum,
    )


def _average_statistics(model: nn.Module) -> None:
    """Average BatchNorm's running statistics over workers, so that all workers hold the same model."""
    _, workers = _workers()
    if workers == 1:
        return
    statistics = [b for b in model.buffers() if b.is_floating_point()]
    if not statistics:
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
    trained = progress.epoch == task.training.epochs  # its optimizer takes no further step
    for name, parameter in () if trained else model.named_parameters():
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    state = {"stage": task.stage, "epochs": task.training.epochs, **asdict(progress)}
    checkpoints.save(task.store, task.name, progress.epoch, progress.steps, tensors, state)


def _restore(task: Task, model: nn.Module, optimizer: torch.optim.SGD) -> _Progress:
    """Load the newest checkpoint, if there is one; returns its progress."""
    checkpoint = checkpoints.load_latest(task.store, task.name)
    if checkpoint is None:
        return _Progress()
    model.load_state_dict(weights(checkpoint))
    for name, parameter in model.named_parameters():
        momentum = checkpoint.tensors.get(f"momentum.{name}")
        if momentum is not None:
            # With the parameter's strides, as the optimizer makes it: other strides take other kernels.
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
    state = checkpoint.state
    if "metrics" not in state:  # saved by an earlier version
        state = {**state, "metrics": tables.metrics_until(task.store, task.name, checkpoint.epoch)}
    return _Progress(**{field.name: state[field.name] for field in fields(_Progress)})


def weights(checkpoint: checkpoints.Checkpoint) -> dict[str, torch.Tensor]:
    """The model's tensors of a checkpoint, for `load_state_dict`."""
    named = checkpoint.tensors.items()
    return {name.removeprefix("model."): tensor for name, tensor in named if name.startswith("model.")}
