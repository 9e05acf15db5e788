"""Backbones by name, and the settings that choose one. To add one: a file beside this one, and an entry here."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, Field

from dwf_cluster.data.registry import Shape
from dwf_cluster.models import layers
from dwf_cluster.models.layers import Layers
from dwf_cluster.settings import InvalidInput, OneOf, Settings, as_tuple


@dataclass(frozen=True)
class Backbone:
    """A network that classifies images.

    Attributes:
        build: `module:function`; takes `images: ImageFormat` and `width: int`, returns an untrained `nn.Module`: pixels
            in [0, 1] in, logits out, normalisation inside.
        flops: floating-point operations of the convolutions in one forward pass of one image, of (width, shape of the
            image); those of linear layers are not counted.
        parameters: weights and biases, of (width, channels of the image, classes).
        smallest: pixels that an image needs, at least, in height and width.
        width_step: allowed widths are its multiples; 0: only 64, because its construction has no other.
    """

    build: str
    flops: Callable[[int, Shape], float]
    parameters: Callable[[int, int, int], int]
    smallest: int = 1
    width_step: int = 1

    @property
    def widths(self) -> str:
        """The allowed widths, for messages: `are multiples of 8`, or `is 64`."""
        return f"are multiples of {self.width_step}" if self.width_step else "is 64"

    def has_width(self, width: int) -> bool:
        """Whether the network can be built with this width."""
        return width % self.width_step == 0 if self.width_step else width == 64


def _backbone(build: str, count: Callable[[int, Shape], Layers], smallest: int = 1, width_step: int = 1) -> Backbone:
    """A backbone whose layers are counted by a function of `models.layers`."""
    counted = functools.cache(count)  # a plan asks for the same counts thousands of times

    def parameters(width: int, channels: int, classes: int) -> int:
        net = counted(width, (channels, 32, 32))
        return net.parameters + net.classifier(classes)

    return Backbone(
        f"dwf_cluster.models.{build}",
        lambda width, shape: 2.0 * counted(width, shape).macs,
        parameters,
        smallest,
        width_step,
    )


def _resnet(build: str, blocks: Sequence[int], expansion: int) -> Backbone:
    return _backbone(build, lambda width, shape: layers.resnet(width, shape, blocks, expansion))


def _densenet(build: str, blocks: Sequence[int], growth: int, first: int, width_step: int) -> Backbone:
    count = lambda width, shape: layers.densenet(width, shape, blocks, growth, first)  # noqa: E731 - of two lines
    return _backbone(build, count, 8, width_step)


BACKBONES: Mapping[str, Backbone] = {
    "resnet18": _resnet("resnet:resnet18", (2, 2, 2, 2), 1),
    "resnet34": _resnet("resnet:resnet34", (3, 4, 6, 3), 1),
    "resnet50": _resnet("resnet:resnet50", (3, 4, 6, 3), 4),
    "vgg19": _backbone("plain:vgg19", layers.vgg19, 32),
    "densenet121": _densenet("plain:densenet121", (6, 12, 24, 16), 32, 64, 2),
    "densenet169": _densenet("plain:densenet169", (6, 12, 32, 32), 32, 64, 2),
    "densenet121-k12": _densenet("plain:densenet121_k12", (6, 12, 24, 16), 12, 24, 16),
    "googlenet": _backbone("plain:googlenet", layers.googlenet, 2, 0),
    "inception-v3": _backbone("plain:inception_v3", layers.inception_v3, 9, 0),
    "xception": _backbone("xception:xception", layers.xception, width_step=8),
    "mobilenet-v2": _backbone("plain:mobilenet_v2", layers.mobilenet_v2),
}
"""Backbones by name. At width 64 each is the usual network; other widths scale its channels by width / 64."""


def fail_if_not_buildable(name: str, width: int, side: int | None, field: str) -> None:
    """Compare a width and a size of images with those that a backbone has and takes.

    Args:
        name: of the backbone.
        width: of the network.
        side: the smaller one of height and width of the images, with their padding; None: unknown.
        field: that gives the width, for the message.

    Raises:
        InvalidInput: if the backbone has no such width, or needs larger images.
    """
    backbone = BACKBONES[name]
    if not backbone.has_width(width):
        raise InvalidInput(f"{field}: {width} cannot be used with {name}: allowed {backbone.widths}")
    if side is not None and side < backbone.smallest:
        size = f"{backbone.smallest}x{backbone.smallest}"
        raise InvalidInput(
            f"data.source: images with a side of {side} cannot be used with {name}: allowed are {size} and larger; "
            "data.padding adds pixels"
        )


class Model(Settings):
    """The backbones of the experts and of the models beside them."""

    backbone: Annotated[
        tuple[Annotated[str, OneOf(lambda: BACKBONES)], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = ("resnet18",)
    """Their network. Several are dealt to the experts of `dwf` in turn, in the order of the gate's outputs; every other
    model has the first. A model that is named after a network has that network."""
    width: Annotated[int, Field(ge=1, le=1024)] = 64
    """64 is the usual network; other widths scale its channels by width / 64. A ResNet's first convolution has so many
    channels. `googlenet` and `inception-v3` have no other width."""
