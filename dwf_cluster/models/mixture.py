"""The soft-gated mixture of experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.models.resnet import Normalize


class Gate(nn.Module):
    """Equation (2): a softmax over experts, from a small multilayer perceptron on the pixels.

    Args:
        experts: number of weights.
        shape: (channels, height, width) of an image.
        mean, std: per channel, of pixels in [0, 1].
        hidden: units of the hidden layer.
        hard: give all weight to the expert of the largest; the gradient is that of the soft weights
            (straight-through estimator, Bengio et al. 2013).
    """

    def __init__(
        self,
        experts: int,
        shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        hidden: int,
        hard: bool = False,
    ) -> None:
        super().__init__()
        self.hard = hard
        channels, height, width = shape
        self.layers = nn.Sequential(
            Normalize(mean, std),
            nn.Flatten(),
            nn.Linear(channels * height * width, hidden),
            nn.ReLU(),
            nn.Linear(hidden, experts),
            nn.Softmax(dim=1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to weights, shape (n, experts), summing to 1."""
        weights: torch.Tensor = self.layers(x)
        if not self.hard:
            return weights
        chosen = F.one_hot(weights.argmax(1), weights.shape[1]).to(weights.dtype)
        return chosen + (weights - weights.detach())  # what is added is zero, its gradient is not

    def log_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Logarithms of the soft weights, of a hard gate those behind its choice; shapes as of `forward`."""
        scores: torch.Tensor = self.layers[:-1](x)
        return scores.log_softmax(1)


class Experts(nn.ModuleList):
    """Classifiers of equal output shape that see the same images."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to logits, shape (n, experts, classes)."""
        return torch.stack([expert(x) for expert in self], dim=1)


class Gated(nn.Module):
    """A classifier with experts and a gate, which attacks can aim at and analyses read.

    A gate that gives each image to one expert has `hard = True`, and `log_weights(x)`: logarithms of soft weights whose
    largest is that expert's.

    Attributes:
        experts: classifiers of the images that the model classifies.
        gate: their weights, shape (n, experts).
        is_weighted_sum: whether the model's logits are `mix(gate(x), experts(x))`.
    """

    experts: Experts
    gate: nn.Module
    is_weighted_sum = True


class Mixture(Gated):
    """Equation (1): y(x) = sum_i g_i(x) f_i(x), over logits; every expert always runs.

    Args:
        experts: classifiers of equal output shape, pixels in, logits out.
        gate: weights for them, shape (n, number of experts).
    """

    def __init__(self, experts: Iterable[nn.Module], gate: nn.Module) -> None:
        super().__init__()
        self.experts = Experts(experts)
        self.gate = gate

    def train(self, mode: bool = True) -> Mixture:
        """As every module's; experts without a parameter that is trained stay in evaluation mode."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.experts.parameters()):
            self.experts.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to logits, shape (n, classes)."""
        return mix(self.gate(x), self.experts(x))


def mix(weights: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Equation (1): weights, shape (n, experts), and logits, shape (n, experts, classes), to shape (n, classes)."""
    return (weights.unsqueeze(2) * logits).sum(dim=1)
