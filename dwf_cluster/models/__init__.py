"""Classifiers: pixels in [0, 1] in, logits out, normalisation inside."""

from dwf_cluster.models.mixture import Mixture
from dwf_cluster.models.resnet import ResNet18

__all__ = ["Mixture", "ResNet18"]
