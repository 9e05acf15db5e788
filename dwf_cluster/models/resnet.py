"""ResNet-18 in its CIFAR form (He et al. 2016; 3x3 stem, no max-pooling), with a variable width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.data.registry import ImageFormat


class Normalize(nn.Module):
    """Per-channel (x - mean) / std, as buffers, so that attacks work in pixel space.

    Args:
        mean, std: one number a channel, of pixels in [0, 1].
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - self.mean) / self.std


def _conv_norm(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (a 1x1 convolution where the shape changes)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv_norm(inputs, outputs, 3, stride)
        self.second = _conv_norm(outputs, outputs, 3, 1)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else _conv_norm(inputs, outputs, 1, 1)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # A slice and a 1x1 convolution of stride 1 are a 1x1 convolution of stride 2, whose weight gradient
        # oneDNN writes past its workspace for few channels in channels_last (its issue 6035).
        skipped = x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride]
        out = self.second(F.relu(self.first(x), inplace=True))
        out += self.shortcut(skipped)
        return F.relu(out, inplace=True)


class ResNet18(nn.Module):
    """ResNet-18 for small images.

    Args:
        classes: number of logits.
        mean, std: per channel, of pixels in [0, 1]; their number is the number of input channels.
        width: channels of the first convolution; 64 gives the usual 11.17 million parameters.
    """

    def __init__(self, classes: int, mean: Sequence[float], std: Sequence[float], width: int = 64) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = _conv_norm(len(mean), width, 3, 1)
        plan = [(1, 1), (1, 1), (1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1)]  # (input width, stride)
        outputs = [1, 1, 2, 2, 4, 4, 8, 8]
        self.blocks = nn.Sequential(
            *(BasicBlock(i * width, o * width, s) for (i, s), o in zip(plan, outputs, strict=True))
        )
        self.classifier = nn.Linear(8 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to logits, shape (n, classes)."""
        features = self.blocks(F.relu(self.stem(self.normalize(x)), inplace=True))
        # A mean, not adaptive pooling: the latter has no deterministic gradient on CUDA.
        logits: torch.Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


def resnet18(images: ImageFormat, width: int) -> ResNet18:
    """The backbone `resnet18` for images of this format."""
    return ResNet18(images.classes, images.mean, images.std, width)
