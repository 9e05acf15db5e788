"""ResNets in their CIFAR form (He et al. 2016; 3x3 stem, no max-pooling), with a variable width."""

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


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, and its BatchNorm: a pair that attacks see as one convolution."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (a 1x1 convolution where the shape changes).

    Args:
        inputs: input channels.
        planes: channels of the convolutions, and of the output.
        stride: of the first convolution.
    """

    expansion = 1
    """Output channels divided by `planes`."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        self.first = conv_norm(inputs, planes, 3, stride)
        self.second = conv_norm(planes, planes, 3, 1)
        self.shortcut = shortcut(inputs, planes, stride)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.second(F.relu(self.first(x), inplace=True))
        out += self.shortcut(strided(x, self.stride))
        return F.relu(out, inplace=True)


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution to four times the channels, and a shortcut; arguments as of `BasicBlock`.

    The 3x3 convolution has the stride, as in kuangliu's and torchvision's networks.
    """

    expansion = 4
    """Output channels divided by `planes`."""

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * planes
        self.first = conv_norm(inputs, planes, 1, 1)
        self.second = conv_norm(planes, planes, 3, stride)
        self.third = conv_norm(planes, outputs, 1, 1)
        self.shortcut = shortcut(inputs, outputs, stride)
        self.stride = stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.relu(self.second(F.relu(self.first(x), inplace=True)), inplace=True)
        out = self.third(out)
        out += self.shortcut(strided(x, self.stride))
        return F.relu(out, inplace=True)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The identity or, where the shape changes, a 1x1 convolution of `strided` features."""
    return nn.Identity() if stride == 1 and inputs == outputs else conv_norm(inputs, outputs, 1, 1)


def strided(x: torch.Tensor, stride: int) -> torch.Tensor:
    """The input of a shortcut.

    A slice and a 1x1 convolution of stride 1 are a 1x1 convolution of stride 2, whose weight gradient oneDNN writes
    past its workspace for few channels in channels_last (its issue 6035).
    """
    return x if stride == 1 else x[:, :, ::stride, ::stride]


class ResNet(nn.Module):
    """A ResNet for small images, four levels of blocks.

    Args:
        classes: number of logits.
        mean, std: per channel, of pixels in [0, 1]; their number is the number of input channels.
        width: channels of the first convolution; 64 is the usual network.
        blocks: number of blocks of each level.
        block: `BasicBlock` or `Bottleneck`.
    """

    def __init__(
        self,
        classes: int,
        mean: Sequence[float],
        std: Sequence[float],
        width: int = 64,
        blocks: Sequence[int] = (2, 2, 2, 2),
        block: type[BasicBlock | Bottleneck] = BasicBlock,
    ) -> None:
        super().__init__()
        self.normalize = Normalize(mean, std)
        self.stem = conv_norm(len(mean), width, 3, 1)
        listed, inputs = list[nn.Module](), width
        for level, count in enumerate(blocks):
            for number in range(count):
                listed.append(block(inputs, width << level, 2 if level and not number else 1))
                inputs = block.expansion * (width << level)
        self.blocks = nn.Sequential(*listed)
        self.classifier = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to logits, shape (n, classes)."""
        features = self.blocks(F.relu(self.stem(self.normalize(x)), inplace=True))
        # A mean, not adaptive pooling: the latter has no deterministic gradient on CUDA.
        logits: torch.Tensor = self.classifier(features.mean(dim=(2, 3)))
        return logits


def resnet18(images: ImageFormat, width: int) -> ResNet:
    """The backbone `resnet18` for images of this format; 11.17 million parameters at width 64."""
    return ResNet(images.classes, images.mean, images.std, width)


def resnet34(images: ImageFormat, width: int) -> ResNet:
    """The backbone `resnet34` for images of this format; 21.28 million parameters at width 64."""
    return ResNet(images.classes, images.mean, images.std, width, (3, 4, 6, 3))


def resnet50(images: ImageFormat, width: int) -> ResNet:
    """The backbone `resnet50` for images of this format; 23.52 million parameters at width 64."""
    return ResNet(images.classes, images.mean, images.std, width, (3, 4, 6, 3), Bottleneck)
