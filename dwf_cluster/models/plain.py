"""The plain networks of table 3 in their 32x32 form, from torchvision's modules: first strides 1, fewer poolings.

None has dropout: random draws of training come from `determinism.Draws`, so that they do not depend on the number of
workers, and the paper's text has no dropout. Auxiliary classifiers are left out.
"""

from __future__ import annotations

import torch
from torch import nn
from torchvision.models import DenseNet, GoogLeNet, Inception3, MobileNetV2
from torchvision.models.vgg import cfgs, make_layers

from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.models.layers import MOBILENET_V2
from dwf_cluster.models.resnet import Normalize


class Normalized(nn.Module):
    """A network behind the normalisation: pixels in [0, 1] in, logits out.

    Args:
        images: give mean and standard deviation.
        network: normalised images in, logits out.
    """

    def __init__(self, images: ImageFormat, network: nn.Module) -> None:
        super().__init__()
        self.normalize = Normalize(images.mean, images.std)
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to logits, shape (n, classes)."""
        logits: torch.Tensor = self.network(self.normalize(x))
        return logits


class Mean(nn.Module):
    """The mean over height and width; adaptive pooling has no deterministic gradient on CUDA."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shape (n, channels, height, width) to (n, channels)."""
        return x.mean(dim=(2, 3))


def vgg19(images: ImageFormat, width: int) -> Normalized:
    """VGG-19 with BatchNorm (Simonyan and Zisserman 2015): the convolutions, and one linear layer."""
    plan = [entry if isinstance(entry, str) else entry * width // 64 for entry in cfgs["E"]]
    features = make_layers(plan, batch_norm=True)
    features[0] = nn.Conv2d(images.shape[0], width, 3, padding=1)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return Normalized(images, nn.Sequential(features, Mean(), nn.Linear(8 * width, images.classes)))


def densenet121(images: ImageFormat, width: int) -> Normalized:
    """DenseNet-121 (Huang et al. 2017), growth 32 at width 64."""
    return _densenet(images, width, (6, 12, 24, 16), 32, 64)


def densenet169(images: ImageFormat, width: int) -> Normalized:
    """DenseNet-169 (Huang et al. 2017), growth 32 at width 64."""
    return _densenet(images, width, (6, 12, 32, 32), 32, 64)


def densenet121_k12(images: ImageFormat, width: int) -> Normalized:
    """DenseNet-121 with growth 12 at width 64: a seventh of the parameters.

    The checkpoints that the paper's SVHN rows cite have this form; that the paper used it is inferred, not checked.
    """
    return _densenet(images, width, (6, 12, 24, 16), 12, 24)


def _densenet(
    images: ImageFormat, width: int, blocks: tuple[int, int, int, int], growth: int, first: int
) -> Normalized:
    growth, first = growth * width // 64, first * width // 64
    network = DenseNet(growth, blocks, first, num_classes=images.classes)
    features = network.features
    features.conv0 = nn.Conv2d(images.shape[0], first, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(features.conv0.weight)
    features.norm0 = features.relu0 = features.pool0 = nn.Identity()
    return Normalized(images, network)


def googlenet(images: ImageFormat, width: int) -> Normalized:
    """GoogLeNet (Szegedy et al. 2015) with BatchNorm: the stem is one 3x3 convolution; two poolings instead of four."""
    network = GoogLeNet(images.classes, aux_logits=False, init_weights=False, dropout=0.0)
    network.conv1 = type(network.conv1)(images.shape[0], 192, kernel_size=3, padding=1)
    network.maxpool1 = network.conv2 = network.conv3 = network.maxpool2 = nn.Identity()
    return Normalized(images, _initialised(network))


def inception_v3(images: ImageFormat, width: int) -> Normalized:
    """Inception-V3 (Szegedy et al. 2016): the stem has stride 1, padding in all 3x3 convolutions but its last, and no
    poolings."""
    network = Inception3(images.classes, aux_logits=False, init_weights=False, dropout=0.0)
    network.Conv2d_1a_3x3 = type(network.Conv2d_1a_3x3)(images.shape[0], 32, kernel_size=3, padding=1)
    network.Conv2d_2a_3x3.conv.padding = (1, 1)
    network.maxpool1 = network.maxpool2 = nn.Identity()
    return Normalized(images, _initialised(network))


def mobilenet_v2(images: ImageFormat, width: int) -> Normalized:
    """MobileNet-V2 (Sandler et al. 2018): the stem and the second stage have stride 1."""
    network = MobileNetV2(images.classes, width / 64, [list(stage) for stage in MOBILENET_V2], dropout=0.0)
    stem = network.features[0]
    stem[0] = nn.Conv2d(images.shape[0], stem[0].out_channels, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(stem[0].weight, mode="fan_out")
    return Normalized(images, network)


def _initialised(network: nn.Module) -> nn.Module:
    """He's initialisation (He et al. 2015), as in `models.resnet`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
