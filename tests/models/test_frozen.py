"""The frozen model: the model in evaluation mode, up to the rounding of folded BatchNorm."""

from __future__ import annotations

import copy

import pytest
import torch

from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.resnet import ResNet18


def _mixture() -> Mixture:
    """In double precision: rounding must not decide on which side of zero a ReLU's input lies."""
    torch.manual_seed(0)
    experts = [ResNet18(10, (0.5,), (0.25,), width=4) for _ in range(3)]
    mixture = Mixture(experts, Gate(3, (1, 8, 8), (0.5,), (0.25,), hidden=8)).double()
    for _ in range(4):
        mixture(torch.rand(32, 1, 8, 8, dtype=torch.float64) * 2)
    return mixture


def test_logits_and_gradients_are_those_of_the_model_in_evaluation_mode() -> None:
    mixture = _mixture()
    frozen_model = frozen(mixture)
    slow = copy.deepcopy(mixture).eval()
    x, y = torch.rand(16, 1, 8, 8, dtype=torch.float64), torch.arange(16) % 10
    torch.testing.assert_close(frozen_model(x), slow(x))
    torch.testing.assert_close(differentiate(frozen_model, x, y), differentiate(slow, x, y))


def test_no_parameter_of_the_view_asks_for_a_gradient_and_no_batchnorm_is_left() -> None:
    frozen_model = frozen(_mixture())
    assert not any(parameter.requires_grad for parameter in frozen_model.parameters())
    assert not any(module.training for module in frozen_model.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen_model.modules())


@pytest.mark.parametrize(("count", "passes"), [(128, 0), (129, 3)])
def test_few_images_go_through_all_experts_in_one_pass_with_the_same_numbers(count: int, passes: int) -> None:
    mixture = _mixture()
    frozen_model = frozen(mixture)
    calls = []
    for expert in frozen_model.experts:
        expert.register_forward_pre_hook(lambda *_: calls.append(1))
    x, y = torch.rand(count, 1, 8, 8, dtype=torch.float64), torch.arange(count) % 10
    found = differentiate(frozen_model, x, y)
    assert len(calls) in (passes, 1)  # stacked, the first expert stands for all
    torch.testing.assert_close(found, differentiate(copy.deepcopy(mixture).eval(), x, y))


def test_experts_of_different_shapes_go_one_by_one() -> None:
    experts = [ResNet18(10, (0.5,), (0.25,), width=width).double() for width in (2, 4)]
    mixture = Mixture(experts, Gate(2, (1, 8, 8), (0.5,), (0.25,), hidden=8).double())
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(frozen(mixture)(x), mixture.eval()(x))


def test_a_batchnorm_that_cannot_be_folded_uses_its_running_statistics() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 3))
    model(torch.rand(32, 1, 8, 8))
    x = torch.rand(4, 1, 8, 8)
    frozen_model = frozen(model)
    torch.testing.assert_close(frozen_model(x)[:1], frozen_model(x[:1]))
    assert model.training
