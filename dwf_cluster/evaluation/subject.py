"""A user's own model and test images: checked before any attack, copied, converted to one form."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dwf_cluster.attacks.gradient import differentiate, predict
from dwf_cluster.data.device import to_float
from dwf_cluster.evaluation.inspection import Inspection
from dwf_cluster.evaluation.masking import train_mode
from dwf_cluster.evaluation.registry import CHECKS, ROUTE
from dwf_cluster.evaluation.settings import Threat
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gated
from dwf_cluster.settings import InvalidInput, one_line

_PROBED = 64
"""Images on which outputs are compared in different batches."""


@dataclass(frozen=True)
class Subject:
    """A model that can be attacked, and its test images.

    Attributes:
        model: a copy, on the device.
        x: uint8 or float32 in [0, 1], shape (n, channels, height, width).
        y: int64, shape (n,).
        device: that computes.
        classes: number of logits.
    """

    model: nn.Module
    x: np.ndarray[Any, Any]
    y: np.ndarray[Any, Any]
    device: torch.device
    classes: int


def prepare(
    model: nn.Module,
    x: torch.Tensor | np.ndarray[Any, Any],
    y: torch.Tensor | np.ndarray[Any, Any],
    device: torch.device | str | None,
    batch_size: int,
) -> Subject:
    """Copy a model, convert images and labels to one form, and check the model's outputs for all of them.

    Raises:
        InvalidInput: if something cannot be used: one line with name, value and what is allowed.
        NotLogits: if an output is NaN, or outputs are probabilities.
    """
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model: {type(model).__name__} cannot be used: allowed is a torch.nn.Module")
    pixels, labels = _images(x), _array(y)
    if labels.dtype.kind not in "iu":
        raise InvalidInput(f"y: dtype {labels.dtype} cannot be used: labels are integers")
    if labels.shape != (len(pixels),):
        raise InvalidInput(f"y: shape {labels.shape} cannot be used: {len(pixels)} images need shape ({len(pixels)},)")
    target = _device(model, device)
    copied = _copy(model, target)
    attacked = frozen(copied)
    classes = _classes(attacked, _tensor(pixels[:_PROBED], target))
    if labels.min() < 0 or labels.max() >= classes:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise InvalidInput(
            f"y: label {wrong} cannot be used: the model has {classes} outputs, allowed are 0 to {classes - 1}"
        )
    labels = labels.astype(np.int64)
    for start in range(0, len(labels), batch_size):
        predict(attacked, _tensor(pixels[start : start + batch_size], target))
    first = _tensor(pixels[:_PROBED], target)
    inspection = Inspection(attacked, first, torch.tensor(labels[:_PROBED], device=target), Threat(0, 0), 0, ())
    for result in train_mode(inspection):
        if result.fired:
            raise InvalidInput(f"model: {type(model).__name__} cannot be used: {result.meaning}; allowed is none")
    return Subject(copied, pixels, labels, target, classes)


def without_gradient(subject: Subject) -> str | None:
    """A warning if no gradient of the loss reaches the pixels of any correctly classified image; else None.

    Such a model keeps its clean accuracy under every attack that follows the gradient.
    """
    x = _tensor(subject.x[:_PROBED], subject.device)
    y = torch.tensor(subject.y[:_PROBED], device=subject.device)
    gradient, _, logits = differentiate(frozen(subject.model), x, y)
    correct = logits.argmax(1) == y
    if not bool(correct.any()) or bool(gradient[correct].any()):
        return None
    return "model: no gradient of the loss reaches the pixels, so white-box attacks cannot fool it and mean nothing"


def with_route(subject: Subject, suites: tuple[str, ...]) -> tuple[tuple[str, ...], str | None]:
    """Add `pgd_route` to the attacks on a mixture whose gate gives each image to one expert.

    Returns:
        The suites, and a warning that names what the other attacks are worth; None for other models.
    """
    if set(suites) <= {CHECKS} or not _selects(subject):
        return suites, None
    return tuple(dict.fromkeys((*suites, ROUTE))), (
        "model: its gate gives each image to one expert; accuracies under attacks that follow the whole model's "
        f"gradient (fgsm, PGD, gate, APGD, autoattack) are upper bounds, so {ROUTE} is measured too"
    )


def _selects(subject: Subject) -> bool:
    """Whether the model is a mixture whose gate gives each image to one expert, judged by the first images."""
    if not isinstance(subject.model, Gated):
        return False
    if getattr(subject.model.gate, "hard", False):  # with a choice in each layer, the weights are their means
        return True
    with torch.no_grad():
        weights = subject.model.gate(_tensor(subject.x[:_PROBED], subject.device))
    return bool(((weights == 0) | (weights == 1)).all())


def _classes(model: nn.Module, x: torch.Tensor) -> int:
    """Number of logits that a model returns for images."""
    shape, version = (len(x), *x.shape[1:]), x._version
    try:
        with torch.no_grad():
            outputs = model(x)
    except Exception as error:  # of any class: the model is the user's code
        raise InvalidInput(f"model: it cannot be called with images of shape {shape}: {one_line(error)}") from error
    if x._version != version:
        raise InvalidInput(
            "model: it changes the images in place, which no gradient passes: allowed are other operations"
        )
    if not isinstance(outputs, torch.Tensor):
        raise InvalidInput(
            f"model: outputs of type {type(outputs).__name__} cannot be used: allowed is a tensor of logits"
        )
    if outputs.ndim != 2 or len(outputs) != len(x) or outputs.shape[1] < 2 or not outputs.is_floating_point():
        raise InvalidInput(
            f"model: outputs of shape {tuple(outputs.shape)} and {outputs.dtype} for {len(x)} images cannot be used: "
            f"allowed are float logits of shape ({len(x)}, classes), two classes or more"
        )
    return outputs.shape[1]


def _copy(model: nn.Module, device: torch.device) -> nn.Module:
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    # Weights that are computed from others (torch.nn.utils.weight_norm) cannot be copied with their history.
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    try:
        return copy.deepcopy(model, memo).to(device)
    except Exception as error:  # of any class: the model is the user's code
        raise InvalidInput(f"model: {type(model).__name__} cannot be copied to {device}: {one_line(error)}") from error


def _device(model: nn.Module, device: torch.device | str | None) -> torch.device:
    if device is None:
        tensor = next(chain(model.parameters(), model.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch without CUDA
        raise InvalidInput(f"device: {str(device)!r} cannot be used: {one_line(error)}") from None


def _array(values: Any) -> np.ndarray[Any, Any]:
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


def _images(x: Any) -> np.ndarray[Any, Any]:
    """Images as uint8 or float32, shape (n, channels, height, width)."""
    images = _array(x)
    if images.size == 0:
        raise InvalidInput(f"x: shape {images.shape} cannot be used: at least one image is needed")
    if images.dtype == np.uint8:
        if images.ndim == 3:
            return np.ascontiguousarray(images[:, None])
        if images.ndim != 4 or not 1 <= images.shape[3] <= 4:
            raise InvalidInput(
                f"x: shape {images.shape} cannot be used: uint8 images are NHWC with 1 to 4 channels, or NHW"
            )
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if images.dtype.kind != "f":
        raise InvalidInput(f"x: dtype {images.dtype} cannot be used: images are float in [0, 1], or uint8")
    if images.ndim != 4:
        raise InvalidInput(f"x: shape {images.shape} cannot be used: float images are NCHW")
    low, high = images.min(), images.max()
    if not (low >= 0 and high <= 1):  # NaN too
        raise InvalidInput(f"x: values from {low:.6g} to {high:.6g} cannot be used: float images are in [0, 1]")
    # Contiguous: torch takes no array with a negative stride, such as a flipped one.
    return np.ascontiguousarray(images, np.float32)


def _tensor(pixels: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    images = torch.tensor(pixels, device=device)
    return to_float(images) if images.dtype == torch.uint8 else images


@contextmanager
def isolated(seed: int) -> Iterator[None]:
    """Keep the global random states while the body runs; in it, models that draw from them start from `seed`."""
    own, numpys = random.getstate(), np.random.get_state()
    with torch.inference_mode(False), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            torch.manual_seed(seed)
            yield
        finally:
            random.setstate(own)
            np.random.set_state(numpys)


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Give a model its buffers back after the body: a closure in it may call the model itself, which no copy replaces.

    A `forward` that was replaced by a lambda, for example, runs the original in whichever mode it is.
    """
    buffers = [b for b in model.buffers() if not is_lazy(b)] if isinstance(model, nn.Module) else []
    before = [buffer.detach().clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
