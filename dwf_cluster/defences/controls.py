"""Controls of a mixture: models that are built from trained ones and not trained themselves.

They show which part of a mixture's accuracy comes from its gate, from the joint stage, and from having several experts:
each expert as it is inside the mixture, and the mean of all experts, before and after the joint stage.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.models.mixture import Mixture


class UniformGate(nn.Module):
    """A gate that weighs all experts equally.

    Args:
        experts: number of weights.
    """

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels, shape (n, channels, height, width), to weights, shape (n, experts), all equal, summing to 1."""
        return x.new_full((len(x), self.experts), 1 / self.experts)


def uniform(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> Mixture:
    """The mixture of the parents with equal weights: the mean of their logits."""
    return Mixture(parents.values(), UniformGate(len(parents)))


def expert(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> nn.Module:
    """One expert of a mixture, the only parent.

    Options: `number` of the expert, from 0.
    """
    (mixture,) = parents.values()
    assert isinstance(mixture, Mixture)
    network: nn.Module = mixture.experts[spec.option("number")]
    return network
