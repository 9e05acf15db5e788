"""Cost of a training step: the package's loop, compared with torchattacks' PGD in a plain PyTorch loop.

    python benchmarks/training.py [--steps 5] [--joint-steps 3]

A PGD expert (10 iterations, batch 128, width 16, 32x32) and a joint step of nine experts, both on one thread, as
an expert's training runs; the two ways alternate. Images are random: the cost of a step does not depend on them. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchattacks
from torch import nn

from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images
from dwf_cluster.defences.build import untrained
from dwf_cluster.determinism import make_deterministic
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.presets import build
from dwf_cluster.store import Store
from dwf_cluster.training.loop import Task, train
from dwf_cluster.training.probe import Probe

ITERATIONS, BATCH = 10, 128


def experiment(stage: str, steps: int) -> Experiment:
    """An experiment with `steps` epochs of one batch each."""
    return build(
        "cifar10",
        0,
        [
            "model.width=16",
            f"pgd.steps={ITERATIONS}",
            f"data.train_examples={BATCH}",
            f"{stage}.epochs={steps}",
        ],
    )


def images() -> Images:
    """One batch of random images."""
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (BATCH, 3, 32, 32)).astype(np.uint8)
    y = np.arange(BATCH) % 10
    return Images(x, y, x[:1], y[:1], 10, (0.5,) * 3, (0.25,) * 3)


def plain_step(model: nn.Module, settings: Experiment, parts: bool) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A plain PyTorch step: torchattacks, then forward, backward, SGD; channels first."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    pgd = torchattacks.PGD(
        model, eps=settings.pgd.epsilon, alpha=settings.pgd.step_size, steps=ITERATIONS, random_start=False
    )
    fgsm = torchattacks.FGSM(model, eps=0.05)

    def step(x: torch.Tensor, y: torch.Tensor) -> None:
        model.train()  # torchattacks switches to evaluation mode and back
        batch = torch.cat([x, fgsm(x, y), pgd(x, y)]) if parts else pgd(x, y)
        optimizer.zero_grad()
        F.cross_entropy(model(batch), y.repeat(3) if parts else y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def bare(model: nn.Module, parts: int, x: torch.Tensor, y: torch.Tensor) -> float:
    """Seconds of a step's gradients and of its training pass, with nothing around them."""
    frozen_model, seconds = frozen(model), []
    model.train()
    for _ in range(4):
        clock = time.perf_counter()
        for chunk, labels in zip(torch.split(x, 32), torch.split(y, 32), strict=True):
            leaf = chunk.contiguous(memory_format=torch.channels_last).requires_grad_()
            torch.autograd.grad(F.cross_entropy(frozen_model(leaf), labels, reduction="sum"), leaf)
        gradient = time.perf_counter() - clock
        clock = time.perf_counter()
        batch = torch.cat([x] * parts).contiguous(memory_format=torch.channels_last)
        F.cross_entropy(model(batch), y.repeat(parts)).backward()  # type: ignore[no-untyped-call]
        seconds.append(ITERATIONS * gradient + time.perf_counter() - clock)
        model.zero_grad()
    return statistics.median(seconds[1:])


def compare(stage: str, steps: int) -> dict[str, Any]:
    """Seconds of a step, ours and plain, and how far ours is from the limit."""
    settings, data = experiment(stage, steps + 1), images()
    spec = settings.defended if stage == "joint" else settings.spec("pgd-1")
    parts = 3 if stage == "joint" else 1

    def new_model() -> nn.Module:
        parents = {name: untrained(settings.spec(name), data.format, 0, {}) for name in spec.parents}
        return untrained(spec, data.format, 0, parents)

    model, slow = new_model(), new_model()
    step = plain_step(slow, settings, stage == "joint")
    device_images = DeviceImages(data, settings.data, torch.device("cpu"))
    x, y = device_images.x_train.float() / 255, device_images.y_train
    fast, plain = [], []

    def turn(row: dict[str, Any]) -> None:
        fast.append(row["seconds"])
        clock = time.perf_counter()
        step(x, y)
        plain.append(time.perf_counter() - clock)

    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder, "benchmark", labels=settings.labels)
        task = Task(spec, stage, 0, Probe(settings.threat, 1, 1), settings.checkpoint_minutes, store, turn)
        train(task, model, device_images)
    limit = bare(model, parts, x, y)
    ours, seconds_plain = statistics.median(fast[1:]), statistics.median(plain[1:])  # the first warms up
    return {
        "seconds": round(ours, 3),
        "seconds_plain": round(seconds_plain, 3),
        "ratio": round(statistics.median(p / f for p, f in zip(plain[1:], fast[1:], strict=True)), 2),
        "times_the_limit": round(ours / limit, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--joint-steps", type=int, default=3)
    options = parser.parse_args()
    make_deterministic(1)
    report = {stage: compare(stage, n) for stage, n in (("experts", options.steps), ("joint", options.joint_steps))}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
