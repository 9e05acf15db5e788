"""The frozen model: the model in evaluation mode, up to the rounding of folded BatchNorm."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.models.advmoe import AdvMoE
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.refresh import FrozenModel
from dwf_cluster.models.resnet import ResNet
from dwf_cluster.models.soe import SynergyOfExperts


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


# ------------------------------------------------------------------------------------ a model that is trained


def _advmoe() -> nn.Module:
    return AdvMoE(ImageFormat((1, 8, 8), 10, (0.5,), (0.25,)), width=4, experts=2, ratio=0.5)


def _soe() -> nn.Module:
    return SynergyOfExperts(ResNet(11, (0.5,), (0.25,), width=4) for _ in range(3))


def _resnet() -> nn.Module:
    return ResNet(10, (0.5,), (0.25,), width=4)


def _step(model: nn.Module) -> None:
    """An optimiser step, which changes every parameter and every running statistic."""
    x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("make", [_resnet, lambda: _mixture().float(), _advmoe, _soe])
def test_a_refreshed_frozen_model_equals_a_new_one_and_keeps_its_tensors(
    make: Callable[[], nn.Module], batch_statistics: bool
) -> None:
    torch.manual_seed(0)
    model, few, many = make(), torch.rand(4, 1, 8, 8), torch.rand(256, 1, 8, 8)
    frozen_model = FrozenModel(model, batch_statistics=batch_statistics)
    _step(model)
    first = frozen_model()
    places = {name: tensor.data_ptr() for name, tensor in _tensors(first).items()}
    logits = [first(x) for x in (few, many)]  # stacked experts, and one by one
    _step(model)
    assert frozen_model() is first  # not expired: the attack goes on with the model before the step
    frozen_model.expire()
    assert frozen_model() is first
    new = frozen(model, batch_statistics=batch_statistics)
    assert {name: tensor.data_ptr() for name, tensor in _tensors(first).items()} == places
    assert _tensors(first).keys() == _tensors(new).keys()
    for name, tensor in _tensors(new).items():
        assert torch.equal(_tensors(first)[name], tensor), name
        assert _tensors(first)[name].stride() == tensor.stride(), name
    for x, old in zip((few, many), logits, strict=True):
        assert torch.equal(first(x), new(x))
        assert not torch.equal(first(x), old)


def _replace_data(model: nn.Sequential) -> None:
    model[2].weight.data = model[2].weight.data + 1


def _replace_parameter(model: nn.Sequential) -> None:
    model[2].bias = nn.Parameter(model[2].bias + 1)


def _append(model: nn.Sequential) -> None:
    model.append(nn.Linear(3, 3))


def _fill_list(model: nn.Sequential) -> None:
    model.extra.append(nn.Linear(3, 3))  # type: ignore[operator, union-attr]


def _in_double(model: nn.Sequential) -> None:
    model.double()


def _other_epsilon(model: nn.Sequential) -> None:
    model[0][1].eps = 0.5


@pytest.mark.parametrize("change", [_replace_data, _replace_parameter, _append, _fill_list, _in_double, _other_epsilon])
def test_a_model_with_other_modules_attributes_or_storage_is_frozen_anew(
    change: Callable[[nn.Sequential], None],
) -> None:
    class Extended(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = super().forward(x)
            for layer in self.extra:  # type: ignore[union-attr]
                logits = layer(logits)
            return logits

    pair = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3))
    model = Extended(pair, nn.Flatten(), nn.Linear(108, 3))
    model.extra = []  # type: ignore[assignment]
    frozen_model, x = FrozenModel(model), torch.rand(4, 1, 8, 8)
    before = frozen_model()(x)
    change(model)
    frozen_model.expire()
    x = x.to(next(model.parameters()).dtype)
    after = frozen_model()(x)
    assert torch.equal(after, frozen(model)(x))
    assert not torch.equal(after, before.to(after.dtype))


def test_a_state_dict_that_is_loaded_reaches_the_frozen_model() -> None:
    model, other, x = _resnet(), _resnet(), torch.rand(4, 1, 8, 8)
    frozen_model = FrozenModel(model)
    frozen_model()
    _step(other)
    model.load_state_dict(other.state_dict())
    frozen_model.expire()
    assert torch.equal(frozen_model()(x), frozen(other)(x))


def test_a_scripted_part_is_copied_again() -> None:
    part = torch.jit.script(nn.Linear(4, 3))
    frozen_model, x = FrozenModel(part), torch.rand(6, 4)
    frozen_model()
    with torch.no_grad():
        part.bias += 1
    frozen_model.expire()
    assert torch.equal(frozen_model()(x), part(x))
