"""The gradient that every attack follows, the losses that it can follow, and the faults that make it worthless."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.models.frozen import FAULTS, WHOLE_BATCH

Objective = Callable[[nn.Module, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(model, images, labels) -> what an attack makes large, shape (n,), and the logits, shape (n, classes)."""

_CHUNK_ELEMENTS = 3 * 2**15
"""Input values that one pass takes on a CPU, 32 colour images of 32x32: larger activations leave the caches."""

_MULTIPLES = {"cuda": 64}
"""A pass is filled up to a multiple of this many images, by device, or to a power of two below it. Attacks drop images
at any step, and for each new size libraries choose kernels and allocate memory anew. Our assumption: 64."""


class NotLogits(ValueError):
    """The model returned NaN, infinity or probabilities: an accuracy under attack would mean nothing."""


def cross_entropy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of equations (3) to (5)."""
    logits: torch.Tensor = model(x)
    return F.cross_entropy(logits, y, reduction="none"), logits


def carlini_wagner(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest other logit less the true one (Carlini and Wagner 2017, f_6): it does not saturate with the softmax."""
    logits: torch.Tensor = model(x)
    return -margin(logits, y), logits


def target_margin(model: nn.Module, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logit of the target less the true one (Gowal et al. 2019, MultiTargeted): it does not saturate with the softmax.

    Args:
        model, x: as for any objective.
        labels: true and target class, shape (n, 2).
    """
    logits: torch.Tensor = model(x)
    true, target = logits.gather(1, labels).unbind(1)
    return target - true, logits


def margin(logits: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Logit of the true label less the largest other, shape (n,): negative where the model is wrong."""
    true = logits.gather(1, y[:, None]).squeeze(1)
    return true - logits.scatter(1, y[:, None], -torch.inf).amax(1)


def differentiate(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    objective: Objective = cross_entropy,
    *,
    samples: int = 1,
    check: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradient of an objective with respect to the pixels, and what the forward pass gave on the way.

    Args:
        model: frozen model, pixels in, logits out.
        x: float in [0, 1], shape (n, channels, height, width).
        y: int64, shape (n,).
        objective: what to make large.
        samples: forward-backward passes to average: expectation over transformation (Athalye et al. 2018) for
            a model that is random in itself; 1 for a deterministic one.
        check: validate the logits first.

    Returns:
        Gradient, shape of x: of the sum over images, so each image's does not depend on the batch. Loss of each
        image, shape (n,), and logits, shape (n, classes), of the last pass.

    Raises:
        NotLogits: if the outputs are not finite, or each row looks like a probability distribution; of a model that
            collects its faults (`report`), the training step raises it.
    """
    gradients, losses, outputs = [], [], []
    for images, labels, count in _chunks(model, x, y):
        leaf = images.detach().requires_grad_()
        with torch.enable_grad():
            total = torch.zeros((), device=x.device, dtype=x.dtype)
            for _ in range(samples):
                loss, logits = objective(model, leaf, labels)
                total = total + loss.sum()
            if check:
                check_logits(model, logits[:count])
            # No path to the pixels means no gradient; the checks for gradient masking report that.
            (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True) if total.requires_grad else (None,)
            gradient = torch.zeros_like(leaf) if gradient is None else gradient
        gradients.append(gradient[:count] / samples if samples > 1 else gradient[:count])
        losses.append(loss.detach()[:count])
        outputs.append(logits.detach()[:count])
    return torch.cat(gradients), torch.cat(losses), torch.cat(outputs)


def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Logits, shape (n, classes), without a gradient.

    Raises:
        NotLogits: if they are not finite, or each row looks like a probability distribution.
    """
    with torch.no_grad():
        labels = torch.zeros(len(x), device=x.device)
        logits = torch.cat([model(images)[:count] for images, _, count in _chunks(model, x, labels)])
    check_logits(model, logits)
    return logits


def check_logits(model: nn.Module, logits: torch.Tensor) -> None:
    """Report unless a model's `logits`, shape (n, classes), are finite and no probabilities."""
    logits = logits.detach()
    report(model, "the model's outputs contain NaN or infinity", ~logits.isfinite().all())
    report(model, "the model's outputs are probabilities; attacks need logits", _are_probabilities(logits))


def report(model: nn.Module, message: str, is_wrong: torch.Tensor) -> None:
    """Raise `NotLogits` with this message if something is wrong with a frozen model, shape ().

    Reading a value from a GPU makes the host wait for it. So a model that is trained collects what is wrong
    (`FrozenModel.faults`), and the training step reads it with its loss.
    """
    faults = getattr(model, FAULTS, None)
    if faults is not None:
        faults[message] = faults[message] | is_wrong if message in faults else is_wrong
    elif bool(is_wrong):
        raise NotLogits(message)


def look_like_probabilities(logits: torch.Tensor) -> bool:
    """Whether every row, of more than one class, is non-negative and sums to one."""
    return bool(_are_probabilities(logits.detach()))


def _are_probabilities(logits: torch.Tensor) -> torch.Tensor:
    sums = logits.sum(1)
    are_ones = torch.isclose(sums, torch.ones_like(sums), atol=1e-4)
    return ((logits >= 0).all() & are_ones.all()) if logits.shape[1] > 1 else torch.zeros_like(are_ones).any()


def is_one_pass(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether `differentiate` and `predict` compute these images in one pass, and not in parts."""
    return len(x) <= _pass_size(model, x)


def _pass_size(model: nn.Module, x: torch.Tensor) -> int:
    """Images of one pass at most."""
    is_cut = x.device.type == "cpu" and len(x) > 0 and not getattr(model, WHOLE_BATCH, False)
    return max(1, _CHUNK_ELEMENTS // x[0].numel()) if is_cut else max(1, len(x))


def _chunks(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """The batch in passes: images, labels, and how many of them are the batch's; the rest are copies of the first.

    On a CPU it is cut into parts that are computed fastest. On a GPU it is filled up, except in training, whose batches
    have one size. Both depend on shapes alone, and neither is done to a batch that a model uses as a whole.
    """
    size = _pass_size(model, x)
    is_filled = not hasattr(model, FAULTS) and not getattr(model, WHOLE_BATCH, False)
    most = _MULTIPLES.get(x.device.type, 1) if is_filled else 1
    for images, labels in zip(torch.split(x, size), torch.split(y, size), strict=True):
        count = len(images)
        missing = -count % min(most, 1 << max(0, count - 1).bit_length())
        passed, their_labels = _filled(images, missing), _filled(labels, missing)
        yield passed.contiguous(memory_format=torch.channels_last), their_labels, count


def _filled(rows: torch.Tensor, missing: int) -> torch.Tensor:
    """The rows, and so many copies of the first."""
    return torch.cat([rows, rows[:1].expand(missing, *rows.shape[1:])]) if missing else rows
