"""What could explain the paper's undefended rows: 37 to 49 % under every PGD column, where a correct PGD leaves none.

    python benchmarks/undefended_rows.py [--data-folder data] [--train 6000] [--epochs 6] [--width 16] [--images 256]

Two undefended ResNet-18s of different seeds are trained on Fashion-MNIST if its files are found, else on the digits.
The first one is measured under PGD at epsilon 0.02 with steps of 0.005, the bound and step that fit the paper's
defended rows, as it should be and in three ways that could keep accuracy up:

- float16: gradients of the mean loss over the batch, computed in float16; where the softmax's error is below the
  smallest number of that type, the gradient is zero and the sign too (a CPU needs ten times as long for it, so these
  runs end after 10 iterations);
- transfer: the images are made on the second network;
- normalised space: the normalised image is clipped to [0, 1], so only pixels between mean and mean + std survive.

For each: the share of images whose input gradient is zero, and accuracy under FGSM and PGD. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import differentiate, predict
from dwf_cluster.attacks.pgd import fgsm, pgd
from dwf_cluster.data.device import DeviceImages, to_float
from dwf_cluster.data.registry import DATASETS
from dwf_cluster.data.sources import Images, load
from dwf_cluster.defences.build import untrained
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.presets import build

EPSILON, STEP_SIZE, STEPS = 0.02, 0.005, (10, 20, 30, 40, 50)
FGSM = (0.01, 0.02, 0.03, 0.09)
BATCH = 128
"""Images of a batch: the mean loss divides every gradient by it."""

Gradient = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of images and labels, the gradient that an attack takes the sign of."""


# ---------------------------------------------------------------------------------------------------- networks


def network(experiment: Experiment, images: Images, seed: int) -> nn.Module:
    """A ResNet-18 trained on clean images: SGD, cosine annealing, no augmentation."""
    settings = experiment.experts
    model = untrained(experiment.spec("standard"), images.format, seed, {}).to(memory_format=torch.channels_last)
    data = DeviceImages(images, experiment.data, torch.device("cpu"))
    optimizer = torch.optim.SGD(
        model.parameters(), settings.learning_rate, settings.momentum, weight_decay=settings.weight_decay
    )
    batches = -(-len(images.x_train) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.epochs * batches)
    for epoch in range(settings.epochs):
        for step, indices in enumerate(data.epoch(BATCH, Draws((seed, epoch)))):
            x, y = data.train_batch(indices, Draws((seed, epoch, step)))
            loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


# ----------------------------------------------------------------------------------------------- measurements


def plain_pgd(
    x: torch.Tensor, y: torch.Tensor, gradient: Gradient, steps: Sequence[int] = STEPS
) -> dict[int, torch.Tensor]:
    """PGD's images after each of `steps`, by any gradient; clipped to the ball and to [0, 1]."""
    moved, seen = x, {}
    for step in range(1, max(steps) + 1):
        moved = moved + STEP_SIZE * gradient(moved, y).sign()
        moved = torch.minimum(torch.maximum(moved, x - EPSILON), x + EPSILON).clamp(0, 1)
        if step in steps:
            seen[step] = moved
    return seen


def of_mean_loss(model: nn.Module) -> Gradient:
    """The gradient of the mean loss over a batch, as autocast computes it: network in float16, loss in float32."""

    def gradient(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16):
            loss = F.cross_entropy(model(leaf), y)
        (result,) = torch.autograd.grad(loss, leaf)
        return result

    return gradient


def zero_share(gradients: torch.Tensor) -> float:
    """Share of images whose gradient is zero in every pixel."""
    return float((gradients == 0).flatten(1).all(1).double().mean())


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of images that are classified correctly."""
    return float((predict(model, x).argmax(1) == y).double().mean())


def over_batches(x: torch.Tensor, y: torch.Tensor, measure: Callable[..., dict[str, float]]) -> dict[str, float]:
    """Mean of a measurement over batches of `BATCH` images, weighted by their number."""
    sums: dict[str, float] = {}
    for part, labels in zip(torch.split(x, BATCH), torch.split(y, BATCH), strict=True):
        for name, value in measure(part, labels).items():
            sums[name] = sums.get(name, 0.0) + value * len(labels)
    return {name: value / len(y) for name, value in sums.items()}


def by_gradient(tested: nn.Module, made_on: nn.Module) -> Callable[..., dict[str, float]]:
    """FGSM and PGD as they should be: gradients of the sum of losses in float32; transfer if two networks differ."""

    def measure(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        gradient, _, _ = differentiate(made_on, x, y)
        found = {"clean": accuracy(tested, x, y), "zero gradients": zero_share(gradient)}
        found |= {f"fgsm {e}": accuracy(tested, fgsm(x, gradient, e), y) for e in FGSM}
        run = pgd(made_on, x, y, Ball("linf", EPSILON), step_size=STEP_SIZE, steps=max(STEPS))
        found |= {f"pgd-{it.step}": accuracy(tested, it.x, y) for it in run if it.step in STEPS}
        return found

    return measure


def by_mean_loss(model: nn.Module) -> Callable[..., dict[str, float]]:
    """FGSM and PGD by gradients in float16; the attacked images are tested in float32."""

    def measure(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        gradient = of_mean_loss(model)
        at = gradient(x, y)
        found = {"clean": accuracy(model, x, y), "zero gradients": zero_share(at)}
        found |= {f"fgsm {e}": accuracy(model, fgsm(x, at, e), y) for e in FGSM}
        attacked = plain_pgd(x, y, gradient, STEPS[:1])
        return found | {f"pgd-{step}": accuracy(model, moved, y) for step, moved in attacked.items()}

    return measure


def in_normalised_space(model: nn.Module, mean: float, std: float) -> Callable[..., dict[str, float]]:
    """PGD on the normalised image, which is clipped to [0, 1]; epsilon and step in those units."""

    class Renormalised(nn.Module):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = model(z * std + mean)
            return logits

    normalised = Renormalised()

    def gradient(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return differentiate(normalised, z, y)[0]

    def measure(x: torch.Tensor, y: torch.Tensor) -> dict[str, float]:
        z = (x - mean) / std
        at = gradient(z, y)
        found = {"clean": accuracy(normalised, z, y), "zero gradients": zero_share(at)}
        found["clipped, no attack"] = accuracy(normalised, z.clamp(0, 1), y)
        found |= {f"fgsm {e}": accuracy(normalised, (z + e * at.sign()).clamp(0, 1), y) for e in FGSM}
        return found | {
            f"pgd-{step}": accuracy(normalised, moved, y) for step, moved in plain_pgd(z, y, gradient).items()
        }

    return measure


# -------------------------------------------------------------------------------------------------------- main


def main() -> None:
    """Train two networks, measure the first one in each way, print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-folder", default="data", type=Path)
    parser.add_argument("--train", default=6_000, type=int)
    parser.add_argument("--epochs", default=6, type=int)
    parser.add_argument("--width", default=16, type=int)
    parser.add_argument("--images", default=256, type=int)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = DATASETS["fashion-mnist"].location(options.data_folder)
    preset = "fashion-mnist" if found else "digits"
    assignments = [f"model.width={options.width}", f"experts.epochs={options.epochs}"]
    assignments += ["defence=standard", "baselines=[]", "data.flip=false", "data.crop_padding=0"]
    if found:
        assignments += [f"data.train_examples={options.train}", f"data.test_examples={options.images}"]
    experiment = build(preset, 0, assignments)
    images = load(experiment.data, options.data_folder)
    started = time.perf_counter()
    own, other = (network(experiment, images, seed) for seed in (0, 1))
    seconds = time.perf_counter() - started
    print(f"{preset}: two networks of width {options.width} trained in {seconds:.0f} s", flush=True)
    model, second = frozen(own), frozen(other)
    x, y = to_float(torch.tensor(images.x_test[: options.images])), torch.tensor(images.y_test[: options.images])
    (mean,), (std,) = images.format.mean, images.format.std
    ways = {
        "float32": by_gradient(model, model),
        "float16": by_mean_loss(model),
        "transfer": by_gradient(model, second),
        "normalised space": in_normalised_space(model, mean, std),
    }
    results: dict[str, dict[str, float]] = {}
    for way, measure in ways.items():
        results[way] = over_batches(x, y, measure)
        print(f"{way}: " + ", ".join(f"{name} {100 * value:.1f}" for name, value in results[way].items()), flush=True)
    confidence = predict(model, x).softmax(1).amax(1)
    print(f"median top probability on clean images: {float(confidence.median()):.6f}")
    print(json.dumps({"preset": preset, "images": len(y), "results": results}))


if __name__ == "__main__":
    main()
