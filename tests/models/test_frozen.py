"""The frozen model: the model in evaluation mode, up to the rounding of folded BatchNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch.nn.utils import parametrizations

from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.resnet import ResNet


def _mixture() -> Mixture:
    """In double precision: rounding must not decide on which side of zero a ReLU's input lies."""
    torch.manual_seed(0)
    experts = [ResNet(10, (0.5,), (0.25,), width=4) for _ in range(3)]
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


def test_no_parameter_of_the_frozen_model_requires_a_gradient_and_no_batchnorm_remains() -> None:
    frozen_model = frozen(_mixture())
    assert not any(parameter.requires_grad for parameter in frozen_model.parameters())
    assert not any(module.training for module in frozen_model.modules())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in frozen_model.modules())


@pytest.mark.parametrize(("count", "passes"), [(128, 0), (129, 3)])
def test_few_images_pass_all_experts_at_once_with_the_same_logits(count: int, passes: int) -> None:
    mixture = _mixture()
    frozen_model = frozen(mixture)
    calls = []
    for expert in frozen_model.experts:
        expert.register_forward_pre_hook(lambda *_: calls.append(1))
    x, y = torch.rand(count, 1, 8, 8, dtype=torch.float64), torch.arange(count) % 10
    stacked = differentiate(frozen_model, x, y)
    assert len(calls) in (passes, 1)  # stacked, the first expert stands for all
    torch.testing.assert_close(stacked, differentiate(copy.deepcopy(mixture).eval(), x, y))


def test_experts_of_different_shapes_run_one_by_one() -> None:
    experts = [ResNet(10, (0.5,), (0.25,), width=width).double() for width in (2, 4)]
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


class _Looping(torch.nn.Module):
    """Refers to itself, and to one layer twice, in plain containers; its method is an attribute of the object."""

    def __init__(self) -> None:
        super().__init__()
        norm = torch.nn.BatchNorm1d(4)
        self.layers = {"pair": (norm, [torch.nn.Linear(4, 3)]), "self": [self]}
        self.norms = [norm]
        self.run = self._run

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        assert self.layers["self"][0] is self
        assert self.norms[0] is self.layers["pair"][0]
        logits: torch.Tensor = self.layers["pair"][1][0](self.norms[0](x))  # type: ignore[index]
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.run(x)


def test_modules_in_plain_containers_are_frozen_once_and_the_model_stays_in_its_mode() -> None:
    model = _Looping()
    frozen_model = frozen(model)
    x = torch.rand(6, 4)
    torch.testing.assert_close(frozen_model(x)[:1], frozen_model(x[:1]))
    assert model.norms[0].training
    assert int(model.norms[0].num_batches_tracked) == 0
    assert not frozen_model(x).requires_grad


def test_a_scripted_model_is_frozen_as_a_copy() -> None:
    model = torch.jit.script(torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3)))
    frozen_model = frozen(model)
    x = torch.rand(6, 4)
    torch.testing.assert_close(frozen_model(x)[:1], frozen_model(x[:1]))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("parametrization", [parametrizations.spectral_norm, parametrizations.weight_norm])
def test_a_parametrized_layer_is_frozen(parametrization: Callable[[torch.nn.Module], torch.nn.Module]) -> None:
    layers = (parametrization(torch.nn.Conv2d(1, 4, 3)), torch.nn.BatchNorm2d(4), torch.nn.Flatten())
    model = torch.nn.Sequential(*layers, torch.nn.Linear(144, 10))
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    model(x)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found, frozen_model = differentiate(frozen(model), x, y), frozen(model)
    assert not any(parameter.requires_grad for parameter in frozen_model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(found, differentiate(copy.deepcopy(model).eval(), x, y))


def test_a_part_that_was_compiled_in_train_mode_is_frozen() -> None:
    part = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Dropout(0.5))
    model = torch.nn.Sequential(torch.compile(part, backend="eager"), torch.nn.Flatten())
    x = torch.rand(8, 1, 8, 8)
    logits = frozen(model)(x)
    assert part.training
    assert int(part[1].num_batches_tracked) == 0
    torch.testing.assert_close(logits, torch.nn.Sequential(part, torch.nn.Flatten()).eval()(x))


def test_a_pair_that_is_called_layer_by_layer_gives_the_same_logits() -> None:
    pair = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3)).double()
    pair(torch.rand(8, 1, 8, 8, dtype=torch.float64))
    frozen_pair, x = frozen(pair), torch.rand(4, 1, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(frozen_pair[1](frozen_pair[0](x)), pair.eval()(x))  # type: ignore[index]


def test_a_batchnorm_without_running_statistics_is_not_folded() -> None:
    pair = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.BatchNorm2d(3, track_running_stats=False))
    assert isinstance(frozen(pair)[1], torch.nn.BatchNorm2d)  # type: ignore[index]
