"""Xception (Chollet 2017) in its 32x32 form, with a variable width: the stem and the third block have stride 1."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.models.layers import XCEPTION
from dwf_cluster.models.plain import Mean, Normalized
from dwf_cluster.models.resnet import conv_norm, strided


def _separable(inputs: int, outputs: int) -> nn.Sequential:
    """A 3x3 convolution of each channel by itself, a 1x1 convolution of all channels, and BatchNorm."""
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
    return nn.Sequential(depthwise, *conv_norm(inputs, outputs, 1))


class Block(nn.Module):
    """Separable convolutions, each behind a ReLU, and a shortcut.

    Args:
        channels: of the input, and after each convolution.
        stride: of the max-pooling after the convolutions, and of the shortcut's 1x1 convolution; 0: neither.
        starts_active: whether the input passes a ReLU. The shortcut then has the ReLU's output, as in
            weiaicunzai's 32x32 network, whose form the paper's checkpoint has (inferred, not checked); in Chollet's it
            has the input.
    """

    def __init__(self, channels: tuple[int, ...], stride: int, starts_active: bool) -> None:
        super().__init__()
        pairs = itertools.pairwise(channels)
        self.convolutions = nn.ModuleList(_separable(inputs, outputs) for inputs, outputs in pairs)
        self.pool = nn.MaxPool2d(3, stride, padding=1) if stride else nn.Identity()
        shortcut = nn.Conv2d(channels[0], channels[-1], 1)
        self.shortcut = nn.Sequential(shortcut, nn.BatchNorm2d(channels[-1])) if stride else nn.Identity()
        self.stride = stride
        self.starts_active = starts_active

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(x) if self.starts_active else x
        out = x
        for number, convolution in enumerate(self.convolutions):
            out = convolution(F.relu(out) if number else out)
        total: torch.Tensor = self.pool(out) + self.shortcut(strided(x, self.stride or 1))
        return total


def xception(images: ImageFormat, width: int) -> Normalized:
    """The backbone `xception` for images of this format; 20.83 million parameters at width 64."""
    layers: list[nn.Module] = [conv_norm(images.shape[0], width // 2, 3), nn.ReLU()]
    layers += [conv_norm(width // 2, width, 3), nn.ReLU()]
    for number, (inputs, outputs, stride) in enumerate(XCEPTION):
        first, last = int(inputs * width / 2), int(outputs * width / 2)
        middle = first if number == len(XCEPTION) - 1 else last
        channels = (first, middle, last) if stride else (first, last, last, last)
        layers.append(Block(channels, stride, starts_active=number > 0))
    layers += [_separable(32 * width // 2, 24 * width), nn.ReLU(), _separable(24 * width, 32 * width), nn.ReLU()]
    network = nn.Sequential(*layers, Mean(), nn.Linear(32 * width, images.classes))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return Normalized(images, network)
