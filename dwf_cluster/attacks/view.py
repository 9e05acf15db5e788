"""The view of a model that attacks see."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils import fuse_conv_bn_weights


def frozen(model: nn.Module) -> nn.Module:
    """A second module tree for attacks: evaluation mode, no parameter gradients, BatchNorm folded.

    Weights are shared, save for convolutions that are followed by BatchNorm in an `nn.Sequential`: their
    folded weights are new, so the view holds the statistics of the moment it was made. The model itself, its
    modes, gradients and statistics stay as they are.

    Args:
        model: any module; it may be in either mode.
    """
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
