"""The probe that follows every epoch of training: accuracy on a few images, clean and under a short PGD."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import predict
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.determinism import Draws
from dwf_cluster.evaluation.settings import Threat
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gated

_GATE_IMAGES = 128
"""Images that the gate of a mixture sees at a time: one that is a network needs memory for each."""


@dataclass(frozen=True)
class Probe:
    """The short PGD that follows every epoch and shows catastrophic and robust overfitting.

    It never sees a test image: what is chosen by it, such as an epoch or the trials of a sweep, would be chosen on the
    images that it is reported on.

    Attributes:
        threat: norm, epsilon and step size.
        steps: iterations.
        examples: at most so many images (`DeviceImages.probed`).
        random_start: start at a random point of the ball instead of the image.
    """

    threat: Threat
    steps: int
    examples: int
    random_start: bool = False


@dataclass(frozen=True)
class ProbeResult:
    """The result of a probe.

    Attributes:
        clean, robust: accuracy, 0..1, on clean images and under PGD.
        split: `validation` or `train`, the images that they were measured on.
        expert_shares: of a model with a gate, the mean weight of each expert on the clean images; where the gate
            chooses, the share of the images that each expert gets. None for other models.
    """

    clean: float
    robust: float
    split: str
    expert_shares: list[float] | None = None


def run_probe(model: nn.Module, images: DeviceImages, probe: Probe, key: tuple[int | str, ...] = ()) -> ProbeResult:
    """Measure a model.

    Args:
        model: on the device of `images`.
        images: the data set.
        probe: how.
        key: seed and model. An image's random start depends on it and on the image, so it is the same in every epoch.
    """
    frozen_model = frozen(model)
    x, y, split = images.probed(probe.examples)
    ball, start = Ball(probe.threat.norm, probe.threat.epsilon), None
    if probe.random_start:
        draws = (Draws((*key, "probe", example)) for example in range(len(y)))
        start = ball.random_point(x, [draw.generator("start") for draw in draws])
    run = pgd(frozen_model, x, y, ball, step_size=probe.threat.step_size, steps=probe.steps, start=start)
    first, *_, last = run
    if probe.random_start:
        clean = predict(frozen_model, x)
    else:
        assert first.logits is not None
        clean = first.logits
    attacked = predict(frozen_model, last.x)
    clean_accuracy, robust = (float((logits.argmax(1) == y).double().mean()) for logits in (clean, attacked))
    return ProbeResult(clean_accuracy, robust, split, _expert_shares(frozen_model, x))


def _expert_shares(model: nn.Module, x: torch.Tensor) -> list[float] | None:
    if not isinstance(model, Gated):
        return None
    with torch.no_grad():
        weights = torch.cat([model.gate(part) for part in torch.split(x, _GATE_IMAGES)])
    shares: list[float] = weights.mean(0).tolist()
    return shares
