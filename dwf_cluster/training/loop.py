"""The one epoch loop of every model: SGD, cosine annealing, a checkpoint after each epoch and within long ones."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import nn

from dwf_cluster.attacks.gradient import NotLogits
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.defences.registry import METHODS, ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.models import exchange
from dwf_cluster.models.refresh import FrozenModel
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.training.background import BackgroundWriter, copy_to_host
from dwf_cluster.training.probe import Probe, run_probe
from dwf_cluster.training.step import Batch, attacked_model, distributed, train_batch, workers


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite. Its text is one line: model, epoch, step, last good checkpoint."""


class Stopped(Exception):
    """Training stopped at the run's request; a checkpoint of its last step is saved."""


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
        on_epoch: called after each epoch with the row of `metrics`, on every worker. Row and checkpoint may not be
            saved yet.
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
    """The completed epochs and their rows of `metrics`; the completed steps of the running epoch, with their sums.

    `best`: for `keep=best`, the model's tensors after the best epoch so far, on the CPU; before the first epoch, none.
    `perturbation`: what a method keeps from batch to batch, shape (batch size, channels, height, width).
    """

    epoch: int = 0
    steps: int = 0
    loss: float = 0.0
    seconds: float = 0.0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, torch.Tensor] = field(default_factory=dict)
    perturbation: torch.Tensor | None = None

    def followed_by(self, row: dict[str, Any], model: nn.Module, keep: str) -> _Progress:
        """The progress after one more epoch, whose row of `metrics` this is; `kept` marks the epoch that is kept."""
        metrics, best = [*self.metrics, row], self.best
        kept = kept_epoch(metrics, keep)
        if keep == "best" and kept == row["epoch"]:
            best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.state_dict().items()}
        rows = [{**r, "kept": r["epoch"] == kept} for r in metrics]
        return _Progress(self.epoch + 1, metrics=rows, best=best, perturbation=self.perturbation)


_COUNTS = tuple(field.name for field in fields(_Progress) if field.name not in ("best", "perturbation"))
"""The fields of a progress that are stored in a checkpoint's `state.json`; the others are tensors."""


def kept_epoch(metrics: Sequence[Mapping[str, Any]], keep: str) -> int:
    """The epoch whose weights are kept, from 1.

    Args:
        metrics: rows of the completed epochs, in order.
        keep: as `Training.keep`. `best` is the epoch of the highest robust accuracy of the probe, of equal ones the
            first: early stopping against robust overfitting (Rice et al. 2020).
    """
    row = max(metrics, key=lambda row: row["probe_pgd_accuracy"]) if keep == "best" else metrics[-1]
    return int(row["epoch"])


def train(task: Task, model: nn.Module, images: DeviceImages) -> nn.Module:
    """Train from the last checkpoint, or from `model` as it is, to the last epoch; then take the epoch that is kept.

    In a process group (`torch.distributed`), each worker trains on its part of every batch and the gradients
    are averaged by DDP. Random draws are made for the whole batch, so they do not depend on the number of workers.
    BatchNorm normalises with the statistics of a part; the workers' running statistics are averaged in each step.
    If workers divide the experts instead (`Joint.parallelism`), each trains its own ones on whole batches, and all have
    the whole model at each checkpoint and at the end.

    Training goes on while a checkpoint is written; all are written when this function returns or raises.

    Args:
        task: the settings, and the store to resume from.
        model: on the device of `images`; changed in place and returned.
        images: the data set.

    Raises:
        NonFiniteLoss: if the loss becomes NaN or infinite.
        Stopped: if `task.stopping` became true on one of the workers.
        StorageFailed, LockLost: if a checkpoint cannot be written; training may have gone on for up to one checkpoint.
    """
    count = workers()[1]
    model.to(memory_format=torch.channels_last)
    optimizer = _optimizer(model, task.spec)
    progress = _restore(task, model, optimizer)
    if METHODS[task.spec.method].keeps_perturbation and progress.perturbation is None:
        shape = (task.spec.training.batch_size, *images.x_train.shape[1:])
        progress.perturbation = torch.zeros(shape, device=images.x_train.device)
    is_divided, training = task.spec.parallelism == "experts", task.spec.training
    parallel = distributed(model) if count > 1 and not is_divided else model
    frozen_model = attacked_model(task.spec, model)
    with BackgroundWriter() as writer, exchange.divided(model) if is_divided else nullcontext():
        while progress.epoch < training.epochs:
            row = _epoch(task, progress, model, parallel, frozen_model, optimizer, images, writer)
            exchange.complete(model, optimizer)
            if row is None:
                _save(task, model, optimizer, progress, writer)
                raise Stopped
            progress = progress.followed_by(row, model, training.keep)
            if progress.best and progress.epoch == training.epochs:
                # The last checkpoint is the trained model, so whatever loads or shares it needs to know of no other
                # epoch.
                model.load_state_dict(progress.best)
            _save(task, model, optimizer, progress, writer)
            task.on_epoch(progress.metrics[-1])
    return model


def _epoch(
    task: Task,
    progress: _Progress,
    model: nn.Module,
    parallel: nn.Module,
    frozen_model: FrozenModel,
    optimizer: torch.optim.SGD,
    images: DeviceImages,
    writer: BackgroundWriter,
) -> dict[str, Any] | None:
    """Train to the end of an epoch, then probe; returns the row of `metrics`, or None if training is to stop.

    It has eight parameters, one for each part of the state of `train`, and is long because the row has a line a column.
    """
    epoch, name, training = progress.epoch, task.spec.name, task.spec.training
    started, key = time.perf_counter() - progress.seconds, (task.seed, name, epoch)
    batches = images.epoch(training.batch_size, Draws(key))
    first, last = epoch * len(batches), training.epochs * len(batches)
    saved_at = time.perf_counter()
    model.train()
    step = first
    try:
        for step, indices in enumerate(batches[progress.steps :], start=first + progress.steps):
            _anneal(optimizer, step / last)
            batch = Batch(indices, Draws((*key, step - first)), progress.perturbation)
            # All workers learn of both after the same step: they may have to send their parts of a checkpoint.
            requests = task.stopping(), time.perf_counter() > saved_at + 60 * task.checkpoint_minutes
            loss, (is_stopping, is_due) = train_batch(
                task.spec, parallel, frozen_model, optimizer, images, batch, requests=requests
            )
            progress.loss += loss * len(indices)
            progress.steps += 1
            now = time.perf_counter()
            progress.seconds = now - started
            if progress.steps < len(batches):
                if is_stopping:
                    return None
                if is_due:
                    exchange.complete(model, optimizer)
                    _save(task, model, optimizer, progress, writer)
                    saved_at = time.perf_counter()
                    started += saved_at - now  # an epoch's seconds are without waiting for its checkpoints
        seconds = time.perf_counter() - started
        probed = run_probe(model, images, task.probe, (task.seed, name))
    except NotLogits as error:
        writer.join()  # the last good checkpoint may be the one that is being written
        place, saved = f"epoch {epoch + 1}, step {step + 1} of {name}", checkpoints.latest_path(task.store, name)
        raise NonFiniteLoss(f"{error} in {place}; last good checkpoint: {saved or 'none'}") from None
    return {
        "stage": task.stage,
        "model": name,
        "epoch": epoch + 1,
        "step": step + 1,
        "loss": progress.loss / len(images.x_train),
        "clean_accuracy": probed.clean,
        "probe_pgd_accuracy": probed.robust,
        "probe_split": probed.split,
        "expert_shares": probed.expert_shares,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "images_per_second": len(images.x_train) / seconds,
        "seconds": seconds,
        "device": images.x_train.device.type,
    }


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


def _anneal(optimizer: torch.optim.SGD, done: float) -> None:
    """Cosine annealing: the learning rates after a share `done` of all steps."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * (1 + math.cos(math.pi * done)) / 2


def _save(
    task: Task, model: nn.Module, optimizer: torch.optim.SGD, progress: _Progress, writer: BackgroundWriter
) -> None:
    """Save the rows of `metrics` and a checkpoint on the first worker; all workers hold the same model.

    Waits for the checkpoint before, so that only one is held in memory, and returns before this one is written.
    """
    if workers()[0] > 0:
        return
    writer.join()
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    trained = progress.epoch == task.spec.training.epochs  # its optimizer takes no further step
    for name, parameter in () if trained else model.named_parameters():
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum.{name}"] = momentum
    tensors |= {} if trained else {f"best.{name}": tensor for name, tensor in progress.best.items()}
    if progress.perturbation is not None and not trained:
        tensors["perturbation"] = progress.perturbation
    counts = {name: getattr(progress, name) for name in _COUNTS}
    state = {"stage": task.stage, "epochs": task.spec.training.epochs, **counts}
    copied = copy_to_host(tensors)

    def write() -> None:
        if not state["steps"]:
            # Metrics first: killed in between, the epoch is run again and its row replaced.
            tables.write(task.store, "metrics", task.spec.name, state["metrics"])
        checkpoints.save(task.store, task.spec.name, state["epoch"], state["steps"], copied(), state)

    writer.start(write)


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
    best = {n.removeprefix("best."): tensor for n, tensor in checkpoint.tensors.items() if n.startswith("best.")}
    state = checkpoint.state
    if "metrics" not in state:  # saved by an earlier version
        state = {**state, "metrics": tables.metrics_until(task.store, task.spec.name, checkpoint.epoch)}
    perturbation = checkpoint.tensors.get("perturbation")
    if perturbation is not None:
        perturbation = perturbation.to(next(model.parameters()).device)
    return _Progress(**{name: state[name] for name in _COUNTS}, best=best, perturbation=perturbation)
