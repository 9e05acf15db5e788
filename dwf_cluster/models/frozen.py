"""The view of a model that attacks see."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import fuse_conv_bn_weights

from dwf_cluster.models.mixture import Experts

_SMALL = 2**15
"""Values of a first feature map, over a batch, up to which a CPU is faster with all experts in one pass. Measured
at widths 8 and 16, on images of 8x8 to 32x32: 1.2 to 2.7 times below it, 0.7 to 1 times above."""


def frozen(model: nn.Module) -> nn.Module:
    """A second module tree for attacks: evaluation mode, no parameter gradients, BatchNorm folded.

    Weights are shared, save for convolutions that are followed by BatchNorm in an `nn.Sequential`: their
    folded weights are new, so the view holds the statistics of the moment it was made. The model itself, its
    modes, gradients and statistics stay as they are.

    Args:
        model: any module; it may be in either mode.
    """
    if isinstance(model, Experts):
        return _FrozenExperts(frozen(expert) for expert in model)
    if isinstance(model, nn.Sequential) and len(model) == 2:
        first, second = model
        if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
            return _folded(first, second)
    view = copy.copy(model)
    view.__dict__["_modules"] = {name: child and frozen(child) for name, child in model._modules.items()}
    view.__dict__["_parameters"] = {n: p if p is None else p.detach() for n, p in model._parameters.items()}
    view.__dict__["_buffers"] = dict(model._buffers)
    view.training = False
    return view


class _FrozenExperts(Experts):
    """Frozen experts that run one after the other, or all in one pass over stacked weights where that is faster."""

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__(experts)
        self.training = False
        shapes = [{name: tensor.shape for name, tensor in _state(expert).items()} for expert in self]
        kernels = [shape for shape in shapes[0].values() if len(shape) == 4]
        self._width = kernels[0][0] if kernels and all(shape == shapes[0] for shape in shapes) else None
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


def _folded(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    view = copy.copy(convolution)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    view.__dict__["_parameters"] = {
        "weight": weight.detach().contiguous(memory_format=torch.channels_last),
        "bias": bias.detach(),
    }
    view.training = False
    return view
