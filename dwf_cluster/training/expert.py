"""Pre-training of one expert: algorithm 1 (FGSM), algorithm 2 (PGD), or clean batches (benign)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from dwf_cluster import attacks
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment, Pgd, Regime
from dwf_cluster.models import ResNet18
from dwf_cluster.training.loop import Perturb, Task, train


def build(experiment: Experiment, images: Images, name: str) -> ResNet18:
    """An untrained expert; experts of different names start from different weights."""
    draws = Draws((experiment.seed, name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.generator("weights").initial_seed())
        return ResNet18(images.classes, images.mean, images.std, experiment.model.width)


def adversary(regime: Regime, pgd: Pgd) -> Perturb:
    """The attack of algorithm 1 or 2 on the expert itself, of random strength for each batch.

    With `fraction` < 1 (the baselines) it attacks the first images of each part of the batch, at least that share of
    them. The order of images is random, so these are a random sample.
    """
    ball = attacks.Ball("linf", pgd.epsilon)

    def perturb(
        frozen: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if regime.attack == "benign":
            return x, y
        count = math.ceil(regime.fraction * len(x))
        clean, labels = x[:count], y[:count]
        if regime.attack == "fgsm":
            epsilon = draws.choice("epsilon", regime.epsilons)
            gradient, _, _ = attacks.differentiate(frozen(), clean, labels)
            attacked = attacks.fgsm(clean, gradient, epsilon)
        else:
            steps = draws.choice("steps", regime.steps)
            *_, last = attacks.pgd(frozen(), clean, labels, ball, step_size=pgd.step_size, steps=steps)
            attacked = last.x
        return torch.cat([attacked, x[count:]]), y

    return perturb


def train_expert(task: Task, images: Images, regime: Regime, device: torch.device) -> None:
    """Train one expert to the end, from its last checkpoint if it has one.

    Raises:
        NonFiniteLoss: if the loss becomes NaN or infinite.
    """
    experiment = task.experiment
    model = build(experiment, images, regime.name).to(device)
    train(task, model, DeviceImages(images, experiment.data, device), adversary(regime, experiment.pgd))
