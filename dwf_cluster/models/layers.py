"""The layers of every backbone as plain numbers, for its operations and its parameters. Imports no torch.

Tests compare both with the networks themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dwf_cluster.data.registry import Shape


@dataclass
class Layers:
    """Counts the layers of a network in the order in which an image passes them.

    Attributes:
        channels, rows, columns: shape of the features after the last layer.
        macs: multiplications of the convolutions so far, for one image.
        parameters: of the convolutions and BatchNorms so far: weights and biases.
    """

    channels: int
    rows: int
    columns: int
    macs: int = field(default=0)
    parameters: int = field(default=0)

    @staticmethod
    def of(shape: Shape) -> Layers:
        """Before the first layer."""
        return Layers(*shape)

    def norm(self) -> None:
        """BatchNorm."""
        self.parameters += 2 * self.channels

    def resized(self, kernel: int, stride: int, padding: int) -> None:
        """Height and width after a convolution or pooling."""
        self.rows, self.columns = ((n + 2 * padding - kernel) // stride + 1 for n in (self.rows, self.columns))

    def conv(
        self,
        outputs: int,
        kernel: int | tuple[int, int] = 3,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        extra: int = 0,
    ) -> None:
        """A convolution.

        Args:
            outputs: channels.
            kernel: height and width; of two numbers, both are odd and the size stays.
            stride: of both directions.
            padding: on each side; None: half of the kernel.
            groups: of channels.
            extra: parameters of each output beside the weights: 1 for a bias.
        """
        high, wide = kernel if isinstance(kernel, tuple) else (kernel, kernel)
        if isinstance(kernel, int):
            self.resized(kernel, stride, kernel // 2 if padding is None else padding)
        weights = high * wide * self.channels // groups * outputs
        self.macs += weights * self.rows * self.columns
        self.parameters += weights + extra * outputs
        self.channels = outputs

    def conv_norm(
        self, outputs: int, kernel: int | tuple[int, int] = 3, stride: int = 1, padding: int | None = None
    ) -> None:
        """A convolution and BatchNorm."""
        self.conv(outputs, kernel, stride, padding)
        self.norm()

    def branch(self) -> Layers:
        """Another path from here; `joined` adds what it has counted."""
        return Layers(self.channels, self.rows, self.columns)

    def joined(self, *branches: Layers, channels: int | None = None) -> None:
        """Add parallel paths, and go on with the shape of the last one.

        Args:
            branches: of `branch`.
            channels: after them; None: all of theirs, one after the other.
        """
        self.macs += sum(branch.macs for branch in branches)
        self.parameters += sum(branch.parameters for branch in branches)
        self.channels = sum(branch.channels for branch in branches) if channels is None else channels
        self.rows, self.columns = branches[-1].rows, branches[-1].columns

    def classifier(self, classes: int) -> int:
        """Parameters of the last layer, which sees the mean over rows and columns; its operations are not counted."""
        return classes * (self.channels + 1)


def resnet(width: int, shape: Shape, blocks: Sequence[int], expansion: int) -> Layers:
    """The ResNets of `models.resnet`."""
    net = Layers.of(shape)
    net.conv_norm(width)
    for level, count in enumerate(blocks):
        for number in range(count):
            planes, stride = width << level, 2 if level and not number else 1
            main, shortcut = net.branch(), net.branch()
            if expansion > 1:
                main.conv_norm(planes, 1)
            main.conv_norm(planes, 3, stride)
            main.conv_norm(expansion * planes, 3 if expansion == 1 else 1)
            if stride > 1 or net.channels != main.channels:
                shortcut.conv_norm(expansion * planes, 1, stride)
            net.joined(main, shortcut, channels=main.channels)
    return net


def vgg19(width: int, shape: Shape) -> Layers:
    """VGG-19 with BatchNorm; its convolutions have biases."""
    net = Layers.of(shape)
    for level, count in ((1, 2), (2, 2), (4, 4), (8, 4), (8, 4)):
        for _ in range(count):
            net.conv(level * width, extra=1)
            net.norm()
        net.resized(2, 2, 0)
    return net


def densenet(width: int, shape: Shape, blocks: Sequence[int], growth: int, first: int) -> Layers:
    """DenseNet-BC; `growth` and `first` channels are those at width 64."""
    growth, first = growth * width // 64, first * width // 64
    net = Layers.of(shape)
    net.conv(first)
    for number, count in enumerate(blocks):
        for _ in range(count):
            layer = net.branch()
            layer.norm()
            layer.conv(4 * growth, 1)
            layer.norm()
            layer.conv(growth, 3)
            net.joined(layer, channels=net.channels + growth)
        net.norm()
        if number < len(blocks) - 1:
            net.conv(net.channels // 2, 1)
            net.resized(2, 2, 0)
    return net


_GOOGLENET = (
    (64, 96, 128, 16, 32, 32),
    (128, 128, 192, 32, 96, 64),
    (192, 96, 208, 16, 48, 64),
    (160, 112, 224, 24, 64, 64),
    (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64),
    (256, 160, 320, 32, 128, 128),
    (256, 160, 320, 32, 128, 128),
    (384, 192, 384, 48, 128, 128),
)
"""Channels of torchvision's Inception blocks: 1x1; 1x1 and 3x3; 1x1 and 3x3; after the pooling."""


def googlenet(width: int, shape: Shape) -> Layers:
    """GoogLeNet; `width` is 64."""
    net = Layers.of(shape)
    net.conv_norm(192)
    for number, (one, reduced, three, reduced_again, five, pooled) in enumerate(_GOOGLENET):
        if number in (2, 7):  # a pooling that rounds up
            net.rows, net.columns = -(-net.rows // 2), -(-net.columns // 2)
        net.joined(*_paths(net, [(one, 1)], [(reduced, 1), (three, 3)], [(reduced_again, 1), (five, 3)], [(pooled, 1)]))
    return net


Path = list[tuple[int, int | tuple[int, int]]]


def _paths(net: Layers, *paths: Path, stride: int = 1) -> list[Layers]:
    """Parallel paths of convolutions, each with BatchNorm: channels and kernel.

    With a stride, the last convolution of each path has it and no padding.
    """
    branches = []
    for path in paths:
        branch = net.branch()
        for number, (outputs, kernel) in enumerate(path, start=1):
            if stride > 1 and number == len(path):
                branch.conv_norm(outputs, kernel, stride, 0)
            else:
                branch.conv_norm(outputs, kernel)
        branches.append(branch)
    return branches


def _split(net: Layers, path: Path) -> Layers:
    """A path whose end goes through a 1x3 and a 3x1 convolution of the same input."""
    (branch,) = _paths(net, path)
    branch.joined(*_paths(branch, [(384, (1, 3))], [(384, (3, 1))]))
    return branch


def _reduced(net: Layers, *paths: Path) -> None:
    """Parallel paths whose last convolution has stride 2, and a max-pooling."""
    branches, pooled = _paths(net, *paths, stride=2), net.branch()
    pooled.resized(3, 2, 0)
    net.joined(*branches, pooled)


def inception_v3(width: int, shape: Shape) -> Layers:
    """Inception-V3; `width` is 64."""
    net = Layers.of(shape)
    net.conv_norm(32)
    net.conv_norm(32)
    net.conv_norm(64)
    net.conv_norm(80, 1)
    net.conv_norm(192, 3, 1, 0)
    for pooled in (32, 64, 64):
        a: list[Path] = [[(64, 1)], [(48, 1), (64, 5)], [(64, 1), (96, 3), (96, 3)], [(pooled, 1)]]
        net.joined(*_paths(net, *a))
    _reduced(net, [(384, 3)], [(64, 1), (96, 3), (96, 3)])
    for c in (128, 160, 160, 192):
        wide, high = (1, 7), (7, 1)
        double: Path = [(c, 1), (c, high), (c, wide), (c, high), (192, wide)]
        net.joined(*_paths(net, [(192, 1)], [(c, 1), (c, wide), (192, high)], double, [(192, 1)]))
    _reduced(net, [(192, 1), (320, 3)], [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)])
    for _ in range(2):
        one, pool = _paths(net, [(320, 1)], [(192, 1)])
        net.joined(one, _split(net, [(384, 1)]), _split(net, [(448, 1), (384, 3)]), pool)
    return net


MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""Expansion, channels, number and first stride of the blocks of MobileNet-V2; for images of 32x32, the second stage has
stride 1."""


def mobilenet_v2(width: int, shape: Shape) -> Layers:
    """MobileNet-V2; channels are rounded to multiples of 8, as in torchvision."""
    net = Layers.of(shape)
    net.conv_norm(_divisible(32 * width / 64))
    for expansion, channels, count, first in MOBILENET_V2:
        for number in range(count):
            hidden = expansion * net.channels
            if expansion > 1:
                net.conv_norm(hidden, 1)
            net.conv(hidden, 3, 1 if number else first, groups=hidden)
            net.norm()
            net.conv_norm(_divisible(channels * width / 64), 1)
    net.conv_norm(_divisible(1280 * max(1.0, width / 64)), 1)
    return net


def _divisible(value: float) -> int:
    """The nearest multiple of 8 that is not more than a tenth smaller."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


XCEPTION = ((2, 4, 2), (4, 8, 2), (8, 22.75, 1), *((22.75, 22.75, 0),) * 8, (22.75, 32, 2))
"""First and last channels of the blocks of Xception, divided by half of the width, and the stride of the pooling: 0 for
blocks without one. The channels are 64 to 1024 at width 64."""


def xception(width: int, shape: Shape) -> Layers:
    """Xception; `models.xception`."""
    half = width / 2
    net = Layers.of(shape)
    net.conv_norm(int(half))
    net.conv_norm(width)
    for number, (inputs, outputs, stride) in enumerate(XCEPTION):
        first, last = int(inputs * half), int(outputs * half)
        middle = first if number == len(XCEPTION) - 1 else last
        main, shortcut = net.branch(), net.branch()
        for channels in (middle, last) if stride else (last, last, last):
            _separable(main, channels)
        if stride:
            main.resized(3, stride, 1)
            shortcut.conv(last, 1, stride, 0, extra=1)
            shortcut.norm()
        net.joined(main, shortcut, channels=last)
    _separable(net, 24 * width)
    _separable(net, 32 * width)
    return net


def _separable(net: Layers, outputs: int) -> None:
    net.conv(net.channels, 3, groups=net.channels)
    net.conv_norm(outputs, 1)
