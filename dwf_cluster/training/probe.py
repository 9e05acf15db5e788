"""The probe that follows every epoch of training: accuracy on a few images, clean and under a short PGD."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import predict
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.data.device import DeviceImages, to_float
from dwf_cluster.evaluation.settings import Threat
from dwf_cluster.models.frozen import frozen


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


def run_probe(model: nn.Module, images: DeviceImages, probe: Probe) -> tuple[float, float]:
    """Accuracy (0..1) on the first test images, clean and under the probe's PGD."""
    frozen_model = frozen(model)
    x, y = to_float(images.x_test[: probe.examples]), images.y_test[: probe.examples]
    ball = Ball(probe.threat.norm, probe.threat.epsilon)
    first, *_, last = pgd(frozen_model, x, y, ball, step_size=probe.threat.step_size, steps=probe.steps)
    assert first.logits is not None
    clean, robust = (float((z.argmax(1) == y).double().mean()) for z in (first.logits, predict(frozen_model, last.x)))
    return clean, robust
