"""A model as attacks see it: frozen, in evaluation mode, BatchNorm folded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_weights

from dwf_cluster.models.exchange import ExchangedExperts, owned
from dwf_cluster.models.mixture import Experts
from dwf_cluster.models.precision import cast_inputs
from dwf_cluster.models.stack import MODULE_ATTRIBUTES, Stack, are_stackable

_NOTHING = nn.Identity().eval()

FAULTS = "_faults"
"""Attribute of a frozen model whose faults are collected: `models.refresh.FrozenModel.faults`."""

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
    return build_frozen(model, batch_statistics).frozen


@dataclass
class FrozenTree:
    """A frozen module tree, while it is built and after.

    Attributes:
        done: frozen modules by the `id` of the original; BatchNorm without running statistics is not folded.
        dtype: of convolutions (`models.precision`); None: their own.
        updates: functions that compute all tensors again which are not the model's own, in place.
        is_copied: whether it has tensors that nothing updates.
    """

    done: dict[int, nn.Module]
    dtype: torch.dtype | None = None
    updates: list[Callable[[], None]] = field(default_factory=list)
    is_copied: bool = False
    frozen: nn.Module = field(init=False)


def build_frozen(model: nn.Module, batch_statistics: bool, dtype: torch.dtype | None = None) -> FrozenTree:
    """Build the tree whose `frozen` is the frozen model."""
    norms = norms_by_batch(model) if batch_statistics else []
    tree = FrozenTree({id(norm): _by_batch(norm) for norm in norms}, dtype)
    tree.frozen = _frozen(model, tree)
    if batch_statistics:
        setattr(tree.frozen, WHOLE_BATCH, True)
    return tree


def norms_by_batch(model: nn.Module) -> list[nn.Module]:
    """BatchNorms in training mode."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]


def _by_batch(norm: nn.Module) -> nn.Module:
    """BatchNorm without running statistics: it uses those of the batch in either mode."""
    copied = copy.copy(norm)
    copied.__dict__["_parameters"] = {n: p if p is None else p.detach() for n, p in norm._parameters.items()}
    copied.__dict__["_buffers"] = dict.fromkeys(norm._buffers)
    copied.training = False
    return copied


def _frozen(model: nn.Module, tree: FrozenTree) -> nn.Module:
    """Freeze a module once: it may have several places in the tree, or refer to one that contains it."""
    done = tree.done
    if id(model) in done:
        return done[id(model)]
    if isinstance(model, Experts):
        done[id(model)] = experts = _frozen_experts(model, tree)
        return experts
    if isinstance(model, torch.jit.ScriptModule):
        done[id(model)] = scripted = copy.deepcopy(model).eval()
        tree.is_copied = True
        return scripted
    if isinstance(compiled := model._modules.get("_orig_mod"), nn.Module):
        # torch.compile's wrapper calls the module that it was made with, whatever is in that module's place.
        done[id(model)] = plain = _frozen(compiled, tree)
        return plain
    if _is_foldable(model, done):
        done[id(model)] = folded = _folded(model, tree)  # type: ignore[arg-type]
        return folded
    done[id(model)] = copied = _shallow_copy(model)
    attributes = {
        name: _frozen_value(value, tree) for name, value in vars(model).items() if name not in MODULE_ATTRIBUTES
    }
    copied.__dict__.update(attributes)
    copied.__dict__["_modules"] = {name: child and _frozen(child, tree) for name, child in model._modules.items()}
    copied.__dict__["_parameters"] = {n: p if p is None else p.detach() for n, p in model._parameters.items()}
    copied.__dict__["_buffers"] = dict(model._buffers)
    copied.training = False
    if tree.dtype is not None:
        if type(model) is nn.Conv2d:
            _convert(copied, tree.dtype, tree)
        if model._parameters and not isinstance(model, _BatchNorm):  # which takes inputs of any type
            cast_inputs(copied)
    return copied


def _convert(copied: nn.Module, dtype: torch.dtype, tree: FrozenTree) -> None:
    """Give a frozen module parameters of this type in place of those that it shares with the model."""
    shared = {name: p for name, p in copied._parameters.items() if p is not None}
    own = {name: p.to(dtype) for name, p in shared.items()}
    copied.__dict__["_parameters"] = {**copied._parameters, **own}

    def update() -> None:
        for name, tensor in own.items():
            tensor.copy_(shared[name])

    tree.updates.append(update)


def _shallow_copy(model: nn.Module) -> nn.Module:
    if "parametrizations" not in model._modules:
        return copy.copy(model)
    copied: nn.Module = object.__new__(type(model))  # `copy.copy` refuses torch.nn.utils.parametrizations
    copied.__dict__.update(vars(model))
    return copied


def _frozen_value(value: Any, tree: FrozenTree) -> Any:
    """The value of an attribute, with the modules in it frozen; the value itself if there are none."""
    if isinstance(value, nn.Module):
        return _frozen(value, tree)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _frozen(value.__self__, tree))
    if isinstance(value, dict):
        values = {key: _frozen_value(item, tree) for key, item in value.items()}
        changed = any(values[key] is not item for key, item in value.items())
        return values if changed else value
    if type(value) in (list, tuple):
        items = [_frozen_value(item, tree) for item in value]
        changed = any(new is not old for new, old in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    return value


def _frozen_experts(experts: Experts, tree: FrozenTree) -> Experts:
    if isinstance(experts, ExchangedExperts):
        own = owned(len(experts))
        modules = (_frozen(expert, tree) if number in own else _NOTHING for number, expert in enumerate(experts))
        exchanged = ExchangedExperts(modules)
        exchanged.training = False
        return exchanged
    stacked = _FrozenExperts(_frozen(expert, tree) for expert in experts)
    tree.updates.append(stacked.expire)
    return stacked


class _FrozenExperts(Experts):
    """Frozen experts that run one after the other, or all in one pass where that is faster."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        self.training = False
        self._stack = Stack(list(self)) if are_stackable(list(self)) else None

    def expire(self) -> None:
        """Let the next pass stack the experts' weights again, in place."""
        if self._stack is not None:
            self._stack.expire()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._stack is None or not self._stack.is_faster(x):
            return super().forward(x)
        return self._stack.classify(x)


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


def _folded(pair: nn.Sequential, tree: FrozenTree) -> nn.Sequential:
    """The convolution with the BatchNorm in its weights, and in the BatchNorm's place a module that does nothing."""
    folded, copied = copy.copy(pair), copy.copy(pair[0])
    weight, bias = (tensor.to(tree.dtype or tensor.dtype) for tensor in _fused(pair))
    weight = weight.contiguous(memory_format=torch.channels_last)
    copied.__dict__["_parameters"] = {"weight": weight, "bias": bias}
    folded.__dict__["_modules"] = dict(zip(pair._modules, (copied, _NOTHING), strict=True))
    copied.training = folded.training = False
    if tree.dtype is not None:
        cast_inputs(copied)

    def update() -> None:
        for tensor, new in zip((weight, bias), _fused(pair), strict=True):
            tensor.copy_(new)

    tree.updates.append(update)
    return folded


def _fused(pair: nn.Sequential) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the convolution with the BatchNorm."""
    convolution, norm = pair
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return weight.detach(), bias.detach()
