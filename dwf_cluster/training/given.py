"""Weights that the user has, in the place of a training: loaded, tested, and stored as a trained model's."""

from __future__ import annotations

import time

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from dwf_cluster.attacks.gradient import NotLogits, predict
from dwf_cluster.data.device import DeviceImages, to_float
from dwf_cluster.defences import weights
from dwf_cluster.models.frozen import frozen
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import checkpoints, tables
from dwf_cluster.training.loop import Task
from dwf_cluster.training.probe import run_probe
from dwf_cluster.training.step import workers

TOLERANCE = 0.5
"""Points by which the clean accuracy may differ from the one that the user expects."""

_BATCH = 512
"""Images tested at once."""


def take_over(
    task: Task, model: nn.Module, images: DeviceImages, x_test: NDArray[np.uint8], y_test: NDArray[np.int64]
) -> nn.Module:
    """Load the weights of the model's file and, if its clean accuracy is the expected one, save them as a checkpoint.

    The checkpoint is that of a training of one epoch without steps. Its row of `metrics` has the probe, and the loss
    of the images of the probe. A wrong load may fit in all names and shapes, and differ in the normalisation, the
    order of channels or a pooling; only the accuracy shows it.

    Options: those of `defences.weights.load`; `accuracy` in percent, that the model is expected to have.

    Args:
        task: the model, and the store for its checkpoint.
        model: of `defences.weights.build`, on the device of `images`; changed in place and returned.
        images: for the probe.
        x_test, y_test: all test images, uint8, shape (n, channels, height, width), and their labels, shape (n,).

    Raises:
        InvalidInput: if the weights cannot be loaded, or the accuracy differs by more than `TOLERANCE` points; then
            nothing is written.
    """
    started, name = time.perf_counter(), task.spec.name
    weights.load(task.spec, model)
    try:
        accuracy = clean_accuracy(model, x_test, y_test, images.x_train.device)
    except NotLogits as error:
        raise InvalidInput(f"given: {name}: {task.spec.option('file')!r} cannot be used: {error}") from None
    expected = float(task.spec.option("accuracy"))
    if abs(accuracy - expected) > TOLERANCE + 1e-9:  # a difference is rounded
        raise InvalidInput(
            f"given: {name} cannot be used: its clean accuracy on {len(y_test):,} test images is {accuracy:.2f} %, "
            f"expected are {expected:.2f} %: allowed is a difference of {TOLERANCE} points; do backbone, mean and std "
            "fit the file?"
        )
    probed = run_probe(model, images, task.probe, (task.seed, name))
    x, y, _ = images.probed(task.probe.examples)
    seconds = time.perf_counter() - started
    row = {
        "stage": task.stage,
        "model": name,
        "epoch": 1,
        "step": 0,
        "loss": float(F.cross_entropy(predict(frozen(model), x), y)),
        "clean_accuracy": probed.clean,
        "probe_pgd_accuracy": probed.robust,
        "probe_split": probed.split,
        "learning_rate": 0.0,
        "images_per_second": len(y_test) / seconds,
        "seconds": seconds,
        "device": x.device.type,
        "kept": True,
    }
    if workers()[0] == 0:
        tables.write(task.store, "metrics", name, [row])
        tensors = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
        file = {key: task.spec.option(key) for key in ("file", "sha256")}
        state = {"stage": task.stage, "epochs": 1, "metrics": [row], "given": file}
        checkpoints.save(task.store, name, 1, 0, tensors, state)
    task.on_epoch(row)
    return model


def clean_accuracy(model: nn.Module, x: NDArray[np.uint8], y: NDArray[np.int64], device: torch.device) -> float:
    """Accuracy in percent on images as they are, in evaluation mode.

    Raises:
        NotLogits: if an output is not finite.
    """
    network, correct = frozen(model), 0
    for first in range(0, len(y), _BATCH):
        part = slice(first, first + _BATCH)
        logits = predict(network, to_float(torch.tensor(x[part], device=device)))
        correct += int((logits.argmax(1).cpu() == torch.tensor(y[part])).sum())
    return 100 * correct / len(y)
