"""PGD on several models gives the images that PGD on each of them gives, whether they share a pass or not."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import Mock

import pytest
import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.attacks.several import last_iterates
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.resnet import ResNet

OPTIONS = {"step_size": 0.03, "steps": 4}
SMALL, LARGE = 8, 256
"""Numbers of images of 8x8 pixels for which networks of width 4 share a pass, and do not."""


def _network(seed: int, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return ResNet(10, (0.5,), (0.25,), width=width).double()


def _mixture(seed: int) -> nn.Module:
    return Mixture([_network(seed), _network(seed + 1)], Gate(2, (1, 8, 8), (0.5,), (0.25,), hidden=8).double())


def _hooked(seed: int) -> nn.Module:
    network = _network(seed)
    network.register_forward_pre_hook(lambda _, images: (1 - images[0],))
    return network


def _pooled(seed: int, *pools: nn.Module) -> nn.Module:
    torch.manual_seed(seed)
    parts = nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(*pools), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*parts, nn.Linear(4, 10)).double()


class _Unknown(nn.Module):
    """Networks of a class that is not the package's may do more than their weights say."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = _network(seed)
        self.extra = [torch.tensor(10.0 * seed)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.network((x * (1 + self.extra[0])).sin())
        return logits


def _images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(9)
    return torch.rand(count, 1, 8, 8, dtype=torch.float64), torch.arange(count) % 10


def _compare(models: Sequence[nn.Module], count: int, ball: Ball) -> None:
    x, y = _images(count)
    iterates = list(last_iterates(models, x, y, ball, **OPTIONS))  # type: ignore[arg-type]
    alone = []
    for model in models:
        *_, last = pgd(model, x, y, ball, **OPTIONS)  # type: ignore[arg-type]
        alone.append(last.x)
    assert len(iterates) == len(models)
    for iterate in iterates:
        assert torch.equal(iterate.index, torch.arange(count))
        matching = [i for i, images in enumerate(alone) if torch.allclose(images, iterate.x, atol=1e-9)]
        assert matching  # models of one structure come together, so the order may be another
        alone.pop(matching[0])


@pytest.mark.parametrize("ball", [Ball("linf", 0.1), Ball("l2", 0.5)], ids=["linf", "l2"])
@pytest.mark.parametrize("count", [1, SMALL, LARGE])
def test_networks_of_one_structure_are_attacked_as_if_alone(count: int, ball: Ball) -> None:
    _compare([frozen(_network(seed)) for seed in range(3)], count, ball)


def test_a_pass_of_several_networks_is_not_cut() -> None:
    """A CPU cuts larger batches than 1,536 images of 8x8 pixels, which would give networks each other's images."""
    _compare([frozen(_network(seed, width=1)) for seed in range(4)], 512, Ball("linf", 0.1))


@pytest.mark.parametrize(
    "models",
    [
        [_network(0), _network(1, width=2), _network(2), _network(3, width=2)],
        [_mixture(0), _network(2), _mixture(3)],  # a mixture's stacked experts are no parameters of it
        [nn.Sequential(_mixture(0)), nn.Sequential(_mixture(3))],
        [_Unknown(1), _Unknown(2)],  # neither is a tensor in a list
        [_hooked(0), _network(1)],
        [_pooled(0, nn.MaxPool2d(2)), _pooled(1, *[nn.MaxPool2d(2)] * 2)],
        [_pooled(0, nn.MaxPool2d([2, 2])), _pooled(1, nn.MaxPool2d([4, 4]))],  # type: ignore[arg-type]
    ],
    ids=["widths", "mixtures", "parts with experts", "unknown", "a hook", "a layer twice", "sizes"],
)
def test_other_models_are_attacked_as_if_alone(models: Sequence[nn.Module]) -> None:
    _compare([frozen(model) for model in models], SMALL, Ball("linf", 0.1))


@pytest.mark.parametrize(("count", "runs"), [(SMALL, 1), (LARGE, 3)])
def test_small_networks_of_one_structure_share_a_run_of_pgd(
    count: int, runs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Mock(wraps=pgd)
    monkeypatch.setattr("dwf_cluster.attacks.several.pgd", counted)
    models = [frozen(_network(seed)) for seed in range(3)]
    list(last_iterates(models, *_images(count), Ball("linf", 0.1), **OPTIONS))  # type: ignore[arg-type]
    assert counted.call_count == runs


def test_a_network_whose_outputs_are_not_finite_has_no_iterate_and_the_others_have() -> None:
    models = [frozen(_network(seed)) for seed in range(3)]
    next(part for part in models[1].modules() if isinstance(part, nn.Linear)).weight.data.fill_(torch.nan)
    x, y = _images(SMALL)
    ball = Ball("linf", 0.1)
    iterates = list(last_iterates(models, x, y, ball, **OPTIONS))  # type: ignore[arg-type]
    assert len(iterates) == 2
    for iterate, model in zip(iterates, (models[0], models[2]), strict=True):
        *_, last = pgd(model, x, y, ball, **OPTIONS)  # type: ignore[arg-type]
        torch.testing.assert_close(iterate.x, last.x)
