"""Widths, operations and parameters of ADVMoE's network. Imports no torch: a run is planned with it."""

from __future__ import annotations

from collections.abc import Sequence

from dwf_cluster.data.registry import Shape

STRIDES = (1, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1)
"""Strides of the 16 convolutions of a ResNet-18's residual blocks, two a block."""

LAYERS = len(STRIDES)
"""Number of convolutions with groups of filters."""


def pathway_widths(width: int, ratio: float) -> tuple[int, ...]:
    """Channels of the four levels of one pathway: `ratio` of those of a ResNet-18 of this width, rounded."""
    first = max(1, round(ratio * width))
    return (first, 2 * first, 4 * first, 8 * first)


def router_widths(width: int) -> tuple[int, ...]:
    """Channels of the router's nine blocks; ResNet-20's 16, 32 and 64 where the network is 64 wide or wider.

    Our assumption: a quarter of a narrower network's width, at least 4.
    """
    first = min(16, max(4, width // 4))
    return tuple(first * factor for factor in (1, 1, 1, 2, 2, 2, 4, 4, 4))


def convolutions(width: int, ratio: float) -> list[tuple[int, int, int]]:
    """(inputs, outputs, stride) of one pathway's 16 convolutions; the first one sees the whole stem."""
    outputs = [channels for channels in pathway_widths(width, ratio) for _ in range(4)]
    return list(zip((width, *outputs), outputs, STRIDES, strict=False))


def flops(width: int, ratio: float, shape: Shape) -> tuple[float, float]:
    """Floating-point operations of one image in one pathway, and in the router, without the linear layers.

    Args:
        width: of the stem.
        ratio: of a pathway's width to a ResNet-18's.
        shape: (channels, height, width) of an image.
    """
    channels, rows, columns = shape

    def macs(first: int, shapes: Sequence[tuple[int, int, int]], has_convolved_shortcuts: bool) -> int:
        height, width = rows, columns
        count = 9 * channels * first * height * width
        for number, (inputs, outputs, stride) in enumerate(shapes):
            height, width = -(-height // stride), -(-width // stride)
            shortcut = has_convolved_shortcuts and number % 2 == 0 and (stride > 1 or inputs != outputs)
            count += (9 + shortcut) * inputs * outputs * height * width
        return count

    pathway = macs(width, convolutions(width, ratio), True)
    return 2.0 * pathway, 2.0 * macs(router_widths(width)[0], _router_convolutions(width), False)


def parameters(width: int, ratio: float, experts: int, vectors: int, channels: int) -> int:
    """Weights and biases of network and router for ten classes.

    Args:
        width, ratio: as of `flops`.
        experts: groups of filters.
        vectors: score vectors of the router.
        channels: of an image.
    """
    count = 9 * channels * width + 2 * width + 10 * (pathway_widths(width, ratio)[-1] + 1)
    for number, (inputs, outputs, stride) in enumerate(convolutions(width, ratio)):
        count += experts * 9 * inputs * outputs + 2 * outputs
        if number % 2 == 0 and (stride > 1 or inputs != outputs):
            count += inputs * outputs + 2 * outputs
    widths = router_widths(width)
    count += 9 * channels * widths[0] + 2 * widths[0] + vectors * experts * (widths[-1] + 1)
    return count + sum(9 * inputs * outputs + 2 * outputs for inputs, outputs, _ in _router_convolutions(width))


def _router_convolutions(width: int) -> list[tuple[int, int, int]]:
    """(inputs, outputs, stride) of the 18 convolutions of the router's blocks."""
    widths = router_widths(width)
    shapes = []
    for inputs, outputs in zip((widths[0], *widths), widths, strict=False):
        shapes += [(inputs, outputs, 1 + (inputs != outputs)), (outputs, outputs, 1)]
    return shapes
