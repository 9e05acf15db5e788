"""ADVMoE's network (Zhang et al. 2023): a ResNet-18 whose residual convolutions own groups of filters, and its router.

Each image passes one group of filters in every such convolution; stem, shortcuts, BatchNorms and last layer are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.models.advmoe_size import STRIDES, convolutions, pathway_widths, router_widths
from dwf_cluster.models.mixture import Experts, Gated
from dwf_cluster.models.resnet import Normalize, conv_norm, shortcut, strided


class _RouterBlock(nn.Module):
    """Two 3x3 convolutions; where the shape changes, the shortcut is every second pixel with channels of zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = conv_norm(inputs, outputs, 3, stride)
        self.second = conv_norm(outputs, outputs, 3, 1)
        self.stride, self.added = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skipped = strided(x, self.stride)
        if self.added:
            skipped = F.pad(skipped, (0, 0, 0, 0, self.added // 2, self.added - self.added // 2))
        out = self.second(F.relu(self.first(x), inplace=True))
        return F.relu(out + skipped, inplace=True)


class Router(nn.Module):
    """A CIFAR ResNet-20 (He et al. 2016, section 4.2) that scores the experts: the gate of ADVMoE.

    Args:
        images: what it sees.
        width: of the network that it routes; at 64 the router has 16, 32 and 64 channels.
        experts: scores of one vector.
        vectors: number of score vectors: 1 for all layers, or one for each layer.
    """

    experts: int
    hard = True
    """Each image passes one expert."""

    def __init__(self, images: ImageFormat, width: int, experts: int, vectors: int) -> None:
        super().__init__()
        first, *_ = widths = router_widths(width)
        self.experts = experts
        self.normalize = Normalize(images.mean, images.std)
        self.stem = conv_norm(images.shape[0], first, 3, 1)
        self.blocks = nn.Sequential(
            *(_RouterBlock(i, o, 1 + (i != o)) for i, o in zip((first, *widths), widths, strict=False))
        )
        self.classifier = nn.Linear(widths[-1], vectors * experts)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to scores, shape (n, vectors, experts)."""
        features = self.blocks(F.relu(self.stem(self.normalize(x)), inplace=True))
        scores: torch.Tensor = self.classifier(features.mean(dim=(2, 3)))
        return scores.view(len(x), -1, self.experts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels to weights, shape (n, experts): 1 for the expert that is chosen; its score alone has the gradient.

        With several score vectors, the mean over them: the share of the layers that have chosen an expert.
        """
        scores = self.scores(x)
        choice = F.one_hot(scores.argmax(2), self.experts).to(scores.dtype)
        return (choice * (1 + (scores - scores.detach()))).mean(1)

    def log_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Logarithms of the soft weights behind the choice, shape (n, experts); the mean over the score vectors."""
        return self.scores(x).log_softmax(2).mean(1)


class ExpertConvolution(nn.Module):
    """A 3x3 convolution with a group of filters for each expert, and the BatchNorm that the experts share.

    Args:
        experts: number of groups.
        inputs, outputs: channels of one group.
        stride: of the convolution.
    """

    def __init__(self, experts: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False) for _ in range(experts)
        )
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor, route: _Route) -> torch.Tensor:
        """Convolve each image with its expert's filters; BatchNorm sees the whole batch."""
        if route.order is not None:
            x = x.index_select(0, route.order)
        parts = zip(self.convolutions, torch.split(x, route.counts), strict=True)
        out = torch.cat([convolution(part) for convolution, part in parts if len(part)])
        if route.inverse is not None:
            out = out.index_select(0, route.inverse)
        return self.norm(out if route.factor is None else out * route.factor)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class _Route:
    """The experts of the n images of a batch in one layer.

    Attributes:
        counts: images of each expert.
        factor: 1, with the gradient of the chosen score (straight-through), shape (n, 1, 1, 1); None: no gradient.
        order: puts the images in the order of their experts; None: they are.
        inverse: of `order`.
    """

    counts: list[int]
    factor: torch.Tensor | None
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None


class Pathway(nn.Module):
    """The network of one expert: a ResNet-18 whose modules are parts of an `AdvMoE`.

    Args:
        network: an `AdvMoE`.
        number: of the expert, from 0.
    """

    def __init__(self, network: AdvMoE, number: int) -> None:
        super().__init__()
        self.normalize, self.stem, self.classifier = network.normalize, network.stem, network.classifier
        self.shortcuts = network.shortcuts
        self.layers = nn.ModuleList(
            nn.Sequential(layer.convolutions[number], layer.norm)  # type: ignore[index, arg-type]
            for layer in network.layers
        )
        self.training = network.training

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to logits, shape (n, classes)."""
        return _logits(self, x, lambda number, features: self.layers[number](features))


class AdvMoE(Gated):
    """A ResNet-18 with groups of filters, one of which each image passes in every residual convolution.

    Its `experts` are the pathways, views of this network without tensors of their own, so attacks and tables treat it
    as any mixture. With one score vector for all layers, its logits are those of the chosen pathway. With a vector for
    each layer an image may change its group from layer to layer: then `experts[j]` passes group j everywhere, and
    the weights of `gate` are means over the layers. Both are our reading; the paper does not
    attack single experts (remembered, not checked).

    Args:
        images: what it classifies.
        width: channels of the stem; 64 is the paper's.
        experts: groups of filters.
        ratio: width of a pathway's residual blocks, relative to `width`.
        per_layer: a score vector for each layer, as in the paper (remembered); else one for all, as released.
    """

    is_weighted_sum = False
    gate: Router

    def __init__(self, images: ImageFormat, width: int, experts: int, ratio: float, per_layer: bool = False) -> None:
        super().__init__()
        self.per_layer = per_layer
        widths = pathway_widths(width, ratio)
        shapes = convolutions(width, ratio)
        self.normalize = Normalize(images.mean, images.std)
        self.stem = conv_norm(images.shape[0], width, 3, 1)
        self.layers = nn.ModuleList(ExpertConvolution(experts, *shape) for shape in shapes)
        self.shortcuts = nn.ModuleList(shortcut(inputs, outputs, stride) for (inputs, outputs, stride) in shapes[::2])
        self.classifier = nn.Linear(widths[-1], images.classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Last: as released, the router keeps PyTorch's own initialisation.
        self.gate = Router(images, width, experts, len(shapes) if per_layer else 1)

    @property
    def experts(self) -> Experts:  # type: ignore[override]
        """The pathways, built of this network's modules at each access, so the state has no tensor twice."""
        return Experts(Pathway(self, number) for number in range(self.gate.experts))

    def forward(self, x: torch.Tensor, *, scores_only: bool = False) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to logits, shape (n, classes).

        Args:
            x: the images.
            scores_only: return the router's scores instead, shape (n, vectors, experts).
        """
        scores = self.gate.scores(x)
        return scores if scores_only else self.routed(x, scores)

    def routed(self, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, classes), of images that scores, shape (n, vectors, experts), send through the network.

        The largest score chooses. Where scores have a gradient, the chosen one of each layer receives that of a factor
        1 on the layer's output (straight-through estimator), and the others none, as in the release.
        """
        choice = scores.argmax(2)
        counts: list[list[int]] = F.one_hot(choice, self.gate.experts).sum(0).tolist()
        order = choice.argsort(dim=0, stable=True)
        inverse = order.argsort(dim=0)
        factor = None
        if scores.requires_grad:
            chosen = scores.gather(2, choice.unsqueeze(2))[:, :, 0]
            factor = (1 + (chosen - chosen.detach()))[:, :, None, None, None]
        if self.per_layer:
            routes = [
                _Route(counts[i], None if factor is None else factor[:, i], order[:, i], inverse[:, i])
                for i in range(len(self.layers))
            ]
            return _logits(self, x, lambda number, features: self.layers[number](features, routes[number]))
        # One order serves all layers, so the images are put in it once.
        first = order[:, 0]
        route = _Route(counts[0], None if factor is None else factor[:, 0].index_select(0, first))
        images = x.index_select(0, first)
        logits = _logits(self, images, lambda number, features: self.layers[number](features, route))
        return logits.index_select(0, inverse[:, 0])


def _logits(
    network: Pathway | AdvMoE, x: torch.Tensor, convolve: Callable[[int, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """The forward pass of a ResNet-18.

    Args:
        network: has the shared modules.
        x: pixels in [0, 1], shape (n, channels, height, width).
        convolve: (number of a residual convolution, features) -> its output, normalised.
    """
    out = F.relu(network.stem(network.normalize(x)), inplace=True)
    strides: Sequence[int] = STRIDES[::2]
    for block, (skip, stride) in enumerate(zip(network.shortcuts, strides, strict=True)):
        skipped = skip(strided(out, stride))
        out = convolve(2 * block + 1, F.relu(convolve(2 * block, out), inplace=True))
        out = F.relu(out + skipped, inplace=True)
    logits: torch.Tensor = network.classifier(out.mean(dim=(2, 3)))
    return logits
