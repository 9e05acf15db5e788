"""Algorithm 3: experts and gate trained together, end to end; nothing is frozen, unless `joint.freeze_experts`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from dwf_cluster import attacks
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import MIXTURE, Experiment
from dwf_cluster.models import Mixture
from dwf_cluster.models.mixture import Gate
from dwf_cluster.store import Store, checkpoints
from dwf_cluster.training import expert
from dwf_cluster.training.loop import Perturb, Task, train, weights


def build(experiment: Experiment, images: Images) -> Mixture:
    """An untrained mixture."""
    draws = Draws((experiment.seed, MIXTURE))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draws.generator("weights").initial_seed())
        experts, settings = len(experiment.mixture_regimes), experiment.gate
        gate = Gate(experts, images.shape, images.mean, images.std, settings.hidden, settings.kind == "hard")
    return Mixture((expert.build(experiment, images, r.name) for r in experiment.mixture_regimes), gate)


def three_parts(experiment: Experiment) -> Perturb:
    """The batch of algorithm 3: clean images, then FGSM's and PGD's against the whole mixture."""
    fgsm, pgd = experiment.fgsm, experiment.pgd
    ball = attacks.Ball("linf", pgd.epsilon)

    def perturb(
        frozen: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        epsilon, steps = draws.choice("epsilon", fgsm.epsilons), draws.choice("steps", pgd.steps)
        first, *_, last = attacks.pgd(frozen(), x, y, ball, step_size=pgd.step_size, steps=steps)
        assert first.gradient is not None  # FGSM's too
        return torch.cat([x, attacks.fgsm(x, first.gradient, epsilon), last.x]), torch.cat([y, y, y])

    return perturb


def train_joint(task: Task, images: Images, device: torch.device) -> None:
    """Train the mixture to the end, from the trained experts or, where it has one, from its last checkpoint.

    Raises:
        NonFiniteLoss: if the loss becomes NaN or infinite.
    """
    experiment = task.experiment
    mixture = build(experiment, images)
    _load_experts(mixture, experiment, task.store)
    mixture.experts.requires_grad_(not experiment.joint.freeze_experts)
    train(task, mixture.to(device), DeviceImages(images, experiment.data, device), three_parts(experiment))


def _load_experts(mixture: Mixture, experiment: Experiment, store: Store) -> None:
    for module, regime in zip(mixture.experts, experiment.mixture_regimes, strict=True):
        checkpoint = checkpoints.load_trained(store, regime.name, experiment.experts.epochs)
        module.load_state_dict(weights(checkpoint))
