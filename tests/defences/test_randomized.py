"""Each field of the attacks in training, against the plain way to write it."""

from __future__ import annotations

import copy
import pkgutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.attacks import gradient
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images
from dwf_cluster.defences import randomized
from dwf_cluster.defences.build import untrained
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.presets import build
from dwf_cluster.training.step import Batch, attacked_model, train_batch

from ..conftest import TINY
from .test_dwf import Recorder

FIRST, COUNT = 16, 8
"""The images that one of several workers trains on: eight, from the seventeenth of the batch."""


def _model(experiment: Experiment, images: Images, name: str) -> nn.Module:
    spec = experiment.spec(name)
    parents = {parent: _model(experiment, images, parent) for parent in spec.parents}
    return untrained(spec, images.format, 0, parents).train()


def _batch(images: Images, count: int = COUNT) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(images.x_test[:count]) / 255, torch.tensor(images.y_test[:count])


def _trained_on(
    spec: ModelSpec, model: nn.Module, attacked: nn.Module, x: torch.Tensor, y: torch.Tensor, draws: Draws
) -> torch.Tensor:
    """The images that a method trains its model on."""
    recorder = Recorder(model)
    losses = {"fgsm": "adversarial:fgsm", "pgd": "adversarial:pgd", "dwf": "dwf:losses"}[spec.method]
    method = pkgutil.resolve_name(f"dwf_cluster.defences.{losses}")
    (_,) = method(spec, recorder, lambda: attacked, x, y, draws)
    return recorder.images


def _gradient(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model(leaf), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return leaf.grad


def _plain_pgd(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    start: torch.Tensor,
    epsilon: float,
    step_size: float,
    steps: int,
) -> torch.Tensor:
    moved = start
    for _ in range(steps):
        moved = moved + step_size * _gradient(model, moved, y).sign()
        moved = torch.minimum(torch.maximum(moved, x - epsilon), x + epsilon).clamp(0, 1)
    return moved


RANDOM_START = ["baselines=pgd-at", "pgd.random_start=true", "pgd.step_sizes=0.01,0.04"]


@pytest.mark.parametrize("name", ["pgd-1", "pgd-at", "mixture"])
def test_pgd_starts_at_a_point_that_is_drawn_for_each_image_and_steps_as_was_drawn(images: Images, name: str) -> None:
    experiment = build("digits", 0, [*TINY, *RANDOM_START])
    spec, model, (x, y) = experiment.spec(name), _model(experiment, images, name), _batch(images)
    attacked = frozen(model)
    for step in range(3):
        draws = Draws((0, name, 0, step), FIRST)
        seen = _trained_on(spec, model, attacked, x, y, draws)
        count = COUNT // 2 if name == "pgd-at" else COUNT
        noise = torch.stack(
            [
                torch.rand(x.shape[1:], generator=draws.generator(f"start of image {FIRST + number}"))
                for number in range(count)
            ]
        )
        start = (x[:count] + experiment.pgd.epsilon * (2 * noise - 1)).clamp(0, 1)
        step_size = draws.choice("step_size", (0.01, 0.04))
        steps = draws.choice("steps", spec.option("steps"))
        expected = _plain_pgd(attacked, x[:count], y[:count], start, experiment.pgd.epsilon, step_size, steps)
        pgd_part = seen[-COUNT:][:count]
        torch.testing.assert_close(pgd_part, expected, rtol=0, atol=1e-6)
        if name == "mixture":  # FGSM starts at the images all the same
            epsilon = draws.choice("epsilon", experiment.fgsm.epsilons)
            fgsm = (x + epsilon * _gradient(attacked, x, y).sign()).clamp(0, 1)
            torch.testing.assert_close(seen[COUNT : 2 * COUNT], fgsm, rtol=0, atol=1e-6)


def test_step_sizes_and_starts_differ_between_batches_and_starts_between_images() -> None:
    sizes = {Draws((0, "pgd-1", 0, step)).choice("step_size", (0.01, 0.04)) for step in range(20)}
    assert sizes == {0.01, 0.04}
    draws = Draws((0, "pgd-1", 0, 0))
    starts = [float(torch.rand((), generator=generator)) for generator in draws.generators("start", 4)]
    later = [float(torch.rand((), generator=g)) for g in Draws((0, "pgd-1", 0, 1)).generators("start", 4)]
    part = [float(torch.rand((), generator=g)) for g in Draws(draws.key, 2).generators("start", 2)]
    assert len({*starts, *later}) == 8
    assert part == starts[2:]


def test_epsilon_of_a_range_is_any_number_between_the_smallest_and_the_largest() -> None:
    experiment = build("digits", 0, [*TINY, "fgsm.epsilons=0.1,0.3,0.2", "fgsm.draw=range", "baselines=fgsm-at"])
    drawn = [randomized.fgsm_epsilon(experiment.spec("fgsm-1"), Draws((0, step))) for step in range(400)]
    assert 0.1 <= min(drawn) < 0.102
    assert 0.298 < max(drawn) < 0.3
    assert sum(drawn) / 400 == pytest.approx(0.2, abs=4 * 0.2 / 12**0.5 / 400**0.5)  # four standard errors
    assert drawn == [randomized.fgsm_epsilon(experiment.defended, Draws((0, step))) for step in range(400)]
    assert randomized.fgsm_epsilon(experiment.spec("fgsm-at"), Draws((0,))) == experiment.pgd.epsilon


BY_BATCH = ["experts.attack_batchnorm=train", "joint.attack_batchnorm=train"]


@pytest.mark.parametrize("name", ["fgsm-1", "pgd-1", "mixture"])
def test_an_attack_by_batch_statistics_sees_the_model_in_training_mode_and_changes_none(
    images: Images, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "_CHUNK_ELEMENTS", 128)  # two images: no statistics of a cut batch
    experiment = build("digits", 0, [*TINY, *BY_BATCH])
    spec, model, (x, y) = experiment.spec(name), _model(experiment, images, name), _batch(images)
    before = copy.deepcopy(model.state_dict())
    attacked, draws = frozen(model, batch_statistics=True), Draws((0, name))
    moved = randomized.pgd(experiment.defended, attacked, x, y, draws)
    *_, last = moved
    _gradient(attacked, x, y)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    plain = copy.deepcopy(model).train()
    torch.testing.assert_close(attacked(x), plain(x))
    steps = draws.choice("steps", experiment.pgd.steps)
    expected = _plain_pgd(plain, x, y, x, experiment.pgd.epsilon, experiment.pgd.step_size, steps)
    assert ((last.x - expected).abs() > 1e-6).double().mean() < 0.01  # signs of gradients near zero may differ
    assert not torch.allclose(attacked(x), frozen(model)(x), atol=0.1)
    assert spec.training.attack_batchnorm == "train"


def test_frozen_experts_are_attacked_by_their_running_statistics(images: Images) -> None:
    experiment = build("digits", 0, [*TINY, *BY_BATCH, "joint.freeze_experts=true"])
    model, (x, _) = _model(experiment, images, "mixture"), _batch(images)
    torch.testing.assert_close(frozen(model, batch_statistics=True)(x), frozen(model)(x))


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_training_loop_attacks_in_the_mode_of_the_field(images: Images, mode: str) -> None:
    experiment = build("digits", 0, [*TINY, f"experts.attack_batchnorm={mode}"])
    spec, model = experiment.spec("fgsm-1"), _model(experiment, images, "fgsm-1")
    data = DeviceImages(images, experiment.data, torch.device("cpu"))
    indices, draws = torch.arange(16), Draws((0, "fgsm-1", 0, 0))
    x, y = data.train_batch(indices, draws)
    attacked = copy.deepcopy(model).train(mode == "train")
    examples = (x + randomized.fgsm_epsilon(spec, draws) * _gradient(attacked, x, y).sign()).clamp(0, 1)
    expected = float(F.cross_entropy(copy.deepcopy(model)(examples), y).detach())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loss, _ = train_batch(
        spec, model, attacked_model(spec, model), optimizer, data, Batch(indices, draws), is_stopping=False
    )
    assert loss == pytest.approx(expected, rel=1e-4)
