"""The share of a batch that FGSM-AT and PGD-AT attack, against a plain loop with an unfolded model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.registry import ImageFormat, Sizes
from dwf_cluster.data.sources import Images, load
from dwf_cluster.defences.build import untrained
from dwf_cluster.defences.registry import METHODS, ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline.sweep import sweep
from dwf_cluster.plan.jobs import EXPERTS, jobs
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import Store
from dwf_cluster.training.loop import train

from ..conftest import TINY, InDouble, task_for

EPSILON, STEP_SIZE = 0.1, 0.02
SETTINGS = [*TINY, f"pgd.epsilon={EPSILON}", f"pgd.step_size={STEP_SIZE}", "experts.epochs=2"]
FRACTION = "adversarial_training.fraction"


def network(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> nn.Module:
    """In double precision, so that rounding changes no sign of a gradient."""
    first = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4))
    return InDouble(nn.Sequential(first, nn.Tanh(), nn.Flatten(), nn.Linear(256, images.classes)))


def _untrained(experiment: Experiment, images: Images) -> nn.Module:
    method = experiment.defended.method
    with mock.patch.dict(METHODS, {method: replace(METHODS[method], build=f"{__name__}:network")}):
        return untrained(experiment.defended, images.format, 0, {})


def _attacked(model: nn.Module, x: torch.Tensor, y: torch.Tensor, step_size: float, steps: int) -> torch.Tensor:
    """Iterated steps of the gradient's sign, clipped to the ball and the pixels' range; in evaluation mode."""
    model.eval()
    moved = x
    for _ in range(steps):
        leaf = moved.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(leaf), y), leaf)
        moved = torch.minimum(torch.maximum(moved + step_size * gradient.sign(), x - EPSILON), x + EPSILON).clamp(0, 1)
    model.train()
    return moved


def _train_slowly(experiment: Experiment, images: Images, attacked_images: int) -> nn.Module:
    """The first images of each batch of 32 are attacked."""
    name, rates = experiment.defended.name, experiment.defended.training
    data, model = DeviceImages(images, experiment.data, torch.device("cpu")), _untrained(experiment, images)
    optimizer = torch.optim.SGD(
        model.parameters(), rates.learning_rate, momentum=rates.momentum, weight_decay=rates.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    step_size, steps = (EPSILON, 1) if name == "fgsm-at" else (STEP_SIZE, 10)
    for epoch in range(2):
        for step, indices in enumerate(data.epoch(32, Draws((0, name, epoch)))):
            x, y = data.train_batch(indices, Draws((0, name, epoch, step)))
            moved = _attacked(model, x[:attacked_images], y[:attacked_images], step_size, steps)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.cat([moved, x[attacked_images:]])), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model


@pytest.mark.parametrize("name", ["fgsm-at", "pgd-at"])
@pytest.mark.parametrize(("fraction", "attacked_images"), [(1, 32), (0.25, 8), (0.26, 9)])
def test_the_share_of_each_batch_that_is_attacked_can_be_set(
    tmp_path: Path, name: str, fraction: float, attacked_images: int
) -> None:
    experiment = build("digits", 0, [*SETTINGS, f"defence={name}", f"{FRACTION}={fraction}"])
    images = load(experiment.data, tmp_path)
    task = task_for(experiment, Store(str(tmp_path), "fast", labels=experiment.labels), name)
    data = DeviceImages(images, experiment.data, torch.device("cpu"))
    trained = train(task, _untrained(experiment, images), data).state_dict()
    for key, tensor in _train_slowly(experiment, images, attacked_images).state_dict().items():
        torch.testing.assert_close(trained[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


def test_every_row_of_adversarial_training_attacks_the_share_and_no_expert_does() -> None:
    rows = "baselines=fgsm-at,pgd-at,pgd-at-matched,pgd-ensemble"
    default, whole = (build("digits", 0, [rows, *more]) for more in ([], [f"{FRACTION}=1"]))
    members = [name for name in whole.names if name.startswith("pgd-at")]
    assert len(members) == 2 + 9
    for name in ("fgsm-at", *members):
        assert (default.spec(name).option("fraction"), whole.spec(name).option("fraction")) == (0.5, 1)
    for name in default.defended.parents:
        assert default.spec(name) == whole.spec(name)
        assert default.model_signature(name) == whole.model_signature(name)


def test_the_planned_cost_follows_the_share() -> None:
    cost, matched_epochs = {}, {}
    for share in (0.5, 1):
        experiment = build("cifar10", 0, [f"{FRACTION}={share}", "baselines=pgd-at,pgd-at-matched"])
        flop = {job.model: job.flop for job in jobs(experiment, EXPERTS, Sizes(50_000, 10_000, (3, 32, 32)))}
        cost[share] = flop["pgd-at"] / flop["benign"]
        matched_epochs[share] = experiment.spec("pgd-at-matched").training.epochs
    # A training step is 3 passes, each of the ten gradients 2.
    assert cost == {0.5: pytest.approx(13 / 3), 1: pytest.approx(23 / 3)}
    assert matched_epochs[1] == pytest.approx(matched_epochs[0.5] * 13 / 23, abs=1)  # rounded up


def test_the_share_is_part_of_the_signature_unless_it_is_the_default_and_can_be_swept() -> None:
    assert build("digits", 0, [f"{FRACTION}=0.5"]).signature == build("digits").signature
    assert build("digits", 0, [f"{FRACTION}=1"]).signature != build("digits").signature
    shares = [f"{FRACTION}={share}" for share in (0.25, 0.5, 1)]
    trials = sweep("digits", [*TINY, "defence=pgd-at"], shares, [0], None, False).trials
    assert [trial.experiment.defended.option("fraction") for trial in trials] == [0.25, 0.5, 1]


@pytest.mark.parametrize("fraction", ["0", "-0.5", "1.01", "nan"])
def test_a_share_of_nothing_or_of_more_than_the_batch_is_refused(fraction: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^{FRACTION}: "):
        build("digits", 0, [f"{FRACTION}={fraction}"])
