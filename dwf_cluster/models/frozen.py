"""A model as attacks see it: frozen, in evaluation mode, BatchNorm folded."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_weights

from dwf_cluster.models.mixture import Experts

_SMALL = 2**15
"""Values of a first feature map, over a batch, up to which a CPU is faster with all experts in one pass. Measured
at widths 8 and 16, on images of 8x8 to 32x32: 1.2 to 2.7 times below it, 0.7 to 1 times above."""

_OWN = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

_NOTHING = nn.Identity().eval()

WHOLE_BATCH = "_uses_whole_batch"
"""Attribute of a frozen model whose outputs depend on the batch: attacks must not cut the batch."""


def frozen(model: nn.Module, *, batch_statistics: bool = False) -> nn.Module:
    """A second module tree for attacks: evaluation mode, no parameter gradients, BatchNorm folded.

    Weights are shared, except for convolutions that are followed by BatchNorm in an `nn.Sequential`: their folded
    weights are new, so the frozen model holds the statistics of the moment it was made. Modules in plain lists, tuples
    and dicts of a module's attributes are frozen too. The model itself, its modes, gradients and statistics stay as
    they are.

    Args:
        model: any module; it may be in either mode.
        batch_statistics: BatchNorm that is in training mode normalises with the statistics of the batch under attack,
            as a training step does, and is not folded; no statistics change.
    """
    if not batch_statistics:
        return _frozen(model, {})
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    copied = _frozen(model, {id(norm): _by_batch(norm) for norm in norms})
    setattr(copied, WHOLE_BATCH, True)
    return copied


def _by_batch(norm: nn.Module) -> nn.Module:
    """BatchNorm without running statistics: it uses those of the batch in either mode."""
    copied = copy.copy(norm)
    copied.__dict__["_parameters"] = {n: p if p is None else p.detach() for n, p in norm._parameters.items()}
    copied.__dict__["_buffers"] = dict.fromkeys(norm._buffers)
    copied.training = False
    return copied


def _frozen(model: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """Freeze a module once: it may have several places in the tree, or refer to one that contains it.

    Args:
        model: the module.
        done: frozen modules by the `id` of the original; BatchNorm without running statistics is not folded.
    """
    if id(model) in done:
        return done[id(model)]
    if isinstance(model, Experts):
        done[id(model)] = experts = _FrozenExperts(_frozen(expert, done) for expert in model)
        return experts
    if isinstance(model, torch.jit.ScriptModule):
        done[id(model)] = scripted = copy.deepcopy(model).eval()
        return scripted
    if isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
        # torch.compile's wrapper calls the module that it was made with, whatever is in that module's place.
        done[id(model)] = plain = _frozen(compiled, done)
        return plain
    if _is_foldable(model, done):
        done[id(model)] = folded = _folded(model)  # type: ignore[arg-type]
        return folded
    done[id(model)] = copied = _shallow_copy(model)
    attributes = {name: _frozen_value(value, done) for name, value in vars(model).items() if name not in _OWN}
    copied.__dict__.update(attributes)
    copied.__dict__["_modules"] = {name: child and _frozen(child, done) for name, child in model._modules.items()}
    copied.__dict__["_parameters"] = {n: p if p is None else p.detach() for n, p in model._parameters.items()}
    copied.__dict__["_buffers"] = dict(model._buffers)
    copied.training = False
    return copied


def _shallow_copy(model: nn.Module) -> nn.Module:
    if "parametrizations" not in model._modules:
        return copy.copy(model)
    copied: nn.Module = object.__new__(type(model))  # `copy.copy` refuses torch.nn.utils.parametrizations
    copied.__dict__.update(vars(model))
    return copied


def _frozen_value(value: Any, done: dict[int, nn.Module]) -> Any:
    """The value of an attribute, with the modules in it frozen; the value itself if there are none."""
    if isinstance(value, nn.Module):
        return _frozen(value, done)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _frozen(value.__self__, done))
    if isinstance(value, dict):
        values = {key: _frozen_value(item, done) for key, item in value.items()}
        changed = any(values[key] is not item for key, item in value.items())
        return values if changed else value
    if type(value) in (list, tuple):
        items = [_frozen_value(item, done) for item in value]
        changed = any(new is not old for new, old in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    return value


class _FrozenExperts(Experts):
    """Frozen experts that run one after the other, or all in one pass over stacked weights where that is faster."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        self.training = False
        shapes = [{name: tensor.shape for name, tensor in _state(expert).items()} for expert in self]
        kernels = [shape for shape in shapes[0].values() if len(shape) == 4]
        # Different networks may have weights of the same names and shapes.
        structures = [(_structure(expert), shape) for expert, shape in zip(self, shapes, strict=True)]
        self._width = kernels[0][0] if kernels and all(entry == structures[0] for entry in structures) else None
        self._stacked: dict[str, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._width is None or x.device.type != "cpu" or x[:, 0].numel() * self._width > _SMALL:
            return super().forward(x)
        if self._stacked is None:
            states = [_state(expert) for expert in self]
            self._stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
        first = self[0]
        logits: torch.Tensor = torch.vmap(lambda state: functional_call(first, state, (x,)), out_dims=1)(self._stacked)
        return logits


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _structure(module: nn.Module) -> list[tuple[type[nn.Module], dict[str, Any]]]:
    """The classes of a module's parts and their plain attributes, such as strides."""
    plain = (bool, int, float, str, tuple, type(None))
    return [
        (
            type(part),
            {name: value for name, value in vars(part).items() if name not in _OWN and isinstance(value, plain)},
        )
        for part in module.modules()
    ]


def _is_foldable(model: nn.Module, done: dict[int, nn.Module]) -> bool:
    """Whether it is a convolution and a BatchNorm that uses running statistics, plainly one after the other."""
    if type(model) is not nn.Sequential or len(model) != 2:
        return False
    convolution, norm = model
    is_pair = type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d
    if not is_pair or norm.running_mean is None or getattr(done.get(id(norm)), "running_mean", norm) is None:
        return False
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return not any(getattr(module, name) for module in (model, convolution, norm) for name in hooks)


def _folded(pair: nn.Sequential) -> nn.Sequential:
    """The convolution with the BatchNorm in its weights, and in the BatchNorm's place a module that does nothing."""
    convolution, norm = pair
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    folded, copied = copy.copy(pair), copy.copy(convolution)
    copied.__dict__["_parameters"] = {
        "weight": weight.detach().contiguous(memory_format=torch.channels_last),
        "bias": bias.detach(),
    }
    folded.__dict__["_modules"] = dict(zip(pair._modules, (copied, _NOTHING), strict=True))
    copied.training = folded.training = False
    return folded
