"""Synergy of Experts (Cui et al. 2022): sub-models with confidence heads, of which the surest one decides."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.models.mixture import Experts, Gated


class Classifier(nn.Module):
    """A sub-model alone: its logits.

    Args:
        network: pixels in [0, 1] in, shape (n, classes + 1) out: logits, then the logit of the confidence head.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to logits, shape (n, classes)."""
        outputs: torch.Tensor = self.network(x)
        return outputs[:, :-1]


class Selection(nn.Module):
    """The choice of the surest sub-model, as a gate.

    Args:
        networks: as of `SynergyOfExperts`.
    """

    hard = True

    def __init__(self, networks: Experts) -> None:
        super().__init__()
        self.networks = networks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pixels, shape (n, channels, height, width), to weights, shape (n, networks): 1 for the surest one, else 0.

        They have no gradient.
        """
        with torch.no_grad():
            surest = log_confidences(self.networks(x)).argmax(1)
        return F.one_hot(surest, len(self.networks)).to(x.dtype)

    def log_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Logarithms of the confidences divided by their sum, with their gradient; shapes as of `forward`."""
        return log_confidences(self.networks(x)).log_softmax(1)


class SynergyOfExperts(Gated):
    """Sub-models with confidence heads; the logits are those of the sub-model with the largest confidence.

    A confidence head is one linear unit on the features that the sub-model classifies, so it is one more output of the
    sub-model's last layer. The choice has no gradient: that of the logits reaches the chosen sub-model only.

    Args:
        networks: pixels in [0, 1] in, shape (n, classes + 1) out: logits, then the logit of the confidence head.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.networks = Experts(networks)

    # Made when asked for: they share the networks, which a state dict of this model would otherwise name three times.
    @property
    def experts(self) -> Experts:  # type: ignore[override]
        """The sub-models as classifiers."""
        return Experts(Classifier(network) for network in self.networks)

    @property
    def gate(self) -> Selection:  # type: ignore[override]
        """The choice of the surest sub-model."""
        return Selection(self.networks)

    def forward(self, x: torch.Tensor, *, of_each: bool = False) -> torch.Tensor:
        """Pixels in [0, 1], shape (n, channels, height, width), to logits, shape (n, classes).

        Args:
            x: the images.
            of_each: return what each sub-model returns instead, shape (n, networks, classes + 1).
        """
        outputs: torch.Tensor = self.networks(x)
        if of_each:
            return outputs
        surest = log_confidences(outputs.detach()).argmax(1)
        return outputs[torch.arange(len(x), device=x.device), surest, :-1]


def log_confidences(outputs: torch.Tensor) -> torch.Tensor:
    """Logarithms of the confidences c = max softmax(logits) * sigmoid(head) of each image and sub-model.

    It keeps its order and its gradient where the confidences themselves underflow.

    Args:
        outputs: of the sub-models, shape (n, networks, classes + 1).

    Returns:
        Shape (n, networks), 0 at most.
    """
    return outputs[..., :-1].log_softmax(2).amax(2) + F.logsigmoid(outputs[..., -1])
