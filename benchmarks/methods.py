"""Seconds of a training step of each method, in units of its counted passes at the speed of a standard step.

    python benchmarks/methods.py [--steps 2] [--width 64] [--batch 32] [--threads 2]

Every method that trains a model without parents, and `dwf`, takes the same number of steps on one batch of random
32x32 images, by the package's own loop; the cost of a step does not depend on the images. The methods take turns, one
training of a few steps each, and medians are over all steps but the first of each turn. A standard step counts 3
passes; passes of a smaller or larger network count by its FLOPs, as in the plan. A ratio above 1 is overhead that the
plan does not count. The exit status is 1 if a ratio is above 1.3. `dwf` has three experts here, and a standard step is
of one network. The last line is JSON.

The default width is the paper's. Convolutions of few channels are slow for their operations, so at width 16 the ratio
of ADVMoE, which has half of them, is 3 and says nothing about its overhead.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images
from dwf_cluster.defences.build import untrained
from dwf_cluster.defences.registry import METHODS, OWN_MODEL, ModelSpec, recipe
from dwf_cluster.determinism import make_deterministic
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import forward_flops
from dwf_cluster.presets import build
from dwf_cluster.store import Store
from dwf_cluster.training.loop import Task, train
from dwf_cluster.training.probe import Probe

TURNS, SHAPE = 3, (3, 32, 32)
LIMIT = 1.3
"""The largest ratio of a method without hidden overhead."""


def experiment(steps: int, width: int, batch: int) -> Experiment:
    """An experiment with one batch an epoch, and `steps` epochs after one to warm up."""
    settings = [f"model.width={width}", f"data.train_examples={batch}", "pgd.steps=4", "trades.steps=4"]
    for stage in ("experts", "joint"):
        settings += [f"{stage}.epochs={steps + 1}", f"{stage}.batch_size={batch}"]
    return build("cifar10", 0, [*settings, "experts.fgsm=1", "experts.pgd=1"])


def images(count: int) -> Images:
    """One batch of random images."""
    x = np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32)).astype(np.uint8)
    y = np.arange(count) % 10
    return Images(x, y, x[:1], y[:1], 10, (0.5,) * 3, (0.25,) * 3)


def specs(settings: Experiment) -> dict[str, ModelSpec]:
    """A model of each method, `standard` first, all with the same epochs."""
    alone = [
        name
        for name, method in METHODS.items()
        if not method.needs_parents and method.losses is not None and name != OWN_MODEL
    ]
    training = settings.experts.of_a_model
    models = {name: replace(recipe(name, settings)[-1], training=training) for name in alone}
    return models | {"dwf": settings.spec("mixture")}


def seconds_of_steps(settings: Experiment, spec: ModelSpec, data: Images) -> list[float]:
    """Seconds of each step of a training, without the first, by the loop's own clock."""
    parents = {name: untrained(settings.spec(name), data.format, 0, {}) for name in spec.parents}
    model = untrained(spec, data.format, 0, parents)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder, "benchmark", labels=settings.labels)
        stage = "joint" if spec.parents else "experts"
        task = Task(spec, stage, 0, Probe(settings.threat, 1, 1), settings.checkpoint_minutes, store, rows.append)
        train(task, model, DeviceImages(data, settings.data, torch.device("cpu")))
    return [row["seconds"] for row in rows[1:]]


def main() -> int:
    """Measure and print; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    make_deterministic(options.threads)
    settings, data = experiment(options.steps, options.width, options.batch), images(options.batch)
    models = specs(settings)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(TURNS):
        for name, spec in models.items():
            seconds[name] += seconds_of_steps(settings, spec, data)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    report = {}
    print(f"{'method':<10} {'passes':>8} {'seconds':>9} {'ratio':>6}")
    for name, spec in models.items():
        relative = forward_flops(spec, SHAPE) / forward_flops(models["standard"], SHAPE)
        passes = METHODS[spec.method].passes(spec) * relative
        ratio = medians[name] / (passes * medians["standard"] / 3)
        report[name] = {"passes": passes, "seconds": round(medians[name], 4), "ratio": round(ratio, 2)}
        print(f"{name:<10} {passes:8.1f} {medians[name]:9.4f} {ratio:6.2f}")
    print(json.dumps(report))
    return int(any(row["ratio"] > LIMIT for row in report.values()))


if __name__ == "__main__":
    sys.exit(main())
