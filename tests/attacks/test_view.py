"""The frozen view: the model in evaluation mode, up to the rounding of folded BatchNorm."""

from __future__ import annotations

import copy

import torch

from dwf_cluster import attacks
from dwf_cluster.models import Mixture, ResNet18
from dwf_cluster.models.mixture import Gate


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
    view = attacks.frozen(mixture)
    slow = copy.deepcopy(mixture).eval()
    x, y = torch.rand(16, 1, 8, 8, dtype=torch.float64), torch.arange(16) % 10
    torch.testing.assert_close(view(x), slow(x))
    torch.testing.assert_close(attacks.input_gradient(view, x, y), attacks.input_gradient(slow, x, y))


def test_no_parameter_of_the_view_asks_for_a_gradient_and_no_batchnorm_is_left() -> None:
    view = attacks.frozen(_mixture())
    assert not any(parameter.requires_grad for parameter in view.parameters())
    assert not any(module.training for module in view.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in view.modules())


def test_a_batchnorm_that_cannot_be_folded_uses_its_running_statistics() -> None:
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 3))
    model(torch.rand(32, 1, 8, 8))
    x = torch.rand(4, 1, 8, 8)
    view = attacks.frozen(model)
    torch.testing.assert_close(view(x)[:1], view(x[:1]))
    assert model.training
