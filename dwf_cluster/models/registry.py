"""Backbones by name, and the settings that choose one. To add one: a file beside this one, and an entry here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from dwf_cluster.data.registry import Shape
from dwf_cluster.settings import OneOf, Settings


@dataclass(frozen=True)
class Backbone:
    """A network that classifies images.

    Attributes:
        build: `module:function`; takes `images: ImageFormat` and `width: int`, returns an untrained `nn.Module`: pixels
            in [0, 1] in, logits out, normalisation inside.
        flops: floating-point operations of one forward pass of one image, of (width, shape of the image).
        parameters: numbers in its state, buffers included, of (width, channels of the image).
    """

    build: str
    flops: Callable[[int, Shape], float]
    parameters: Callable[[int, int], int]


def _resnet18_flops(width: int, shape: Shape) -> float:
    channels, rows, columns = shape
    macs = 9 * channels * width * rows * columns
    for level, pairs in enumerate(((1, 1), (1, 2), (2, 4), (4, 8))):
        inputs, outputs = (pair * width for pair in pairs)
        rows, columns = (rows, columns) if level == 0 else (-(-rows // 2), -(-columns // 2))
        shortcut = 0 if inputs == outputs else inputs * outputs
        macs += rows * columns * (9 * inputs * outputs + 3 * 9 * outputs * outputs + shortcut)
    return 2.0 * macs


def _resnet18_parameters(width: int, channels: int) -> int:
    """Convolutions, four vectors for each BatchNorm, and the last layer for ten classes."""
    w = width
    count = 9 * channels * w + 4 * w + 10 * (8 * w + 1)
    for inputs, outputs in ((w, w), (w, 2 * w), (2 * w, 4 * w), (4 * w, 8 * w)):
        shortcut = 0 if inputs == outputs else inputs * outputs + 4 * outputs
        count += 9 * inputs * outputs + 3 * 9 * outputs * outputs + 4 * 4 * outputs + shortcut
    return count


BACKBONES: Mapping[str, Backbone] = {
    "resnet18": Backbone("dwf_cluster.models.resnet:resnet18", _resnet18_flops, _resnet18_parameters),
}


class Model(Settings):
    """The backbone of every expert."""

    backbone: Annotated[str, OneOf(lambda: BACKBONES)] = "resnet18"
    """Its network."""
    width: Annotated[int, Field(ge=1, le=1024)] = 64
    """Channels of the first convolution; 64 is ResNet-18."""
