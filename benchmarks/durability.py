"""Cost of durability: a checkpoint compared with the training that it saves, and the status of 10,000 experiments.

    python benchmarks/durability.py [--images 512] [--experiments 10000]

A benign epoch, the cheapest kind, of ResNet-18 at width 64 on random images of 32x32, with the checkpoint that a
run saves after it. In turn, training goes on while the checkpoint is written, as in a run, or waits for it; then the
same tensors are written with one `torch.save`. Seconds are medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images
from dwf_cluster.defences.build import untrained
from dwf_cluster.determinism import make_deterministic
from dwf_cluster.presets import build
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.store.status import HEARTBEAT, Status, now
from dwf_cluster.training import loop
from dwf_cluster.training.background import BackgroundWriter
from dwf_cluster.training.loop import Task, train
from dwf_cluster.training.probe import Probe

EPOCH = 50_000
"""Images of CIFAR-10's training set; a checkpoint's time is compared with an epoch of them."""


def checkpointing(images: int, epochs: int) -> dict[str, Any]:
    """Seconds of an epoch, of its checkpoint, and of training being held up by it; the checkpoint's bytes."""
    make_deterministic(os.cpu_count() or 1)
    assignments = [f"experts.epochs={epochs}", f"data.train_examples={images}"]
    experiment = build("cifar10", 0, assignments)
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (images, 3, 32, 32)).astype(np.uint8)
    data = Images(x, np.arange(images) % 10, x[:1], np.zeros(1, np.int64), 10, (0.5,) * 3, (0.25,) * 3)
    waiting: list[float] = []
    held_up: list[float] = []
    pickled: list[float] = []
    save, written = loop._save, dict[str, torch.Tensor]()
    write = checkpoints.save

    def keep_tensors(store: Store, model: str, epoch: int, steps: int, tensors: Any, state: Any) -> None:
        written.update(tensors)
        write(store, model, epoch, steps, tensors, state)

    def timed(task: Task, model: Any, optimizer: Any, progress: Any, writer: BackgroundWriter) -> None:
        writer.join()
        started = time.perf_counter()
        save(task, model, optimizer, progress, writer)
        if progress.epoch == epochs:  # its checkpoint has no momentum
            return
        if progress.epoch % 2:
            held_up.append(time.perf_counter() - started)
            return
        writer.join()
        waiting.append(time.perf_counter() - started)
        started = time.perf_counter()
        with open(Path(task.store.url) / "pickle", "wb") as file:
            torch.save(written, file)
            os.fsync(file.fileno())
        pickled.append(time.perf_counter() - started)

    patches = mock.patch.object(loop, "_save", timed), mock.patch.object(checkpoints, "save", keep_tensors)
    with tempfile.TemporaryDirectory() as folder, patches[0], patches[1]:
        store = experiment.store(folder)
        spec = experiment.spec("benign")
        task = Task(spec, "experts", 0, Probe(experiment.threat, 1, 1), experiment.checkpoint_minutes, store)
        model = untrained(spec, data.format, 0, {})
        train(task, model, DeviceImages(data, experiment.data, torch.device("cpu")))
        seconds = [row["seconds"] for row in tables.read(store, "metrics").to_pylist()]
        (with_momentum, _) = store.names("checkpoints/benign")
        size = store.size(f"checkpoints/benign/{with_momentum}/tensors.safetensors")
    epoch, cost, held = statistics.median(seconds), statistics.median(waiting), statistics.median(held_up)
    return {
        "bytes": size,
        "seconds": cost,
        "seconds_held_up": held,
        "torch_save_seconds": statistics.median(pickled),
        "images_per_second": images / epoch,
        "share_of_these_epochs": held / epoch,
        "share_of_an_epoch_of_50000": held / (epoch * EPOCH / images),
    }


def status(experiments: int, times: int) -> dict[str, Any]:
    """Seconds of `python -m dwf_cluster.status` on a store of this number of experiments."""
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(experiments):
            Status(
                run=1,
                state="done",
                host="n1",
                job="",
                started=now(),
                heartbeat=now(),
                seconds=HEARTBEAT,
                stages={"experts": (11, 11), "joint": (1, 1), "evaluate": (140, 140)},
                reason="",
                resume="python -m dwf_cluster.launch --local",
                rows={"predictions": 1_000_000},
            ).write(Store(folder, f"cifar10-seed{seed}-0123456789"))
        seconds = []
        for _ in range(times):
            started = time.perf_counter()
            subprocess.run([sys.executable, "-m", "dwf_cluster.status", folder], stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - started)
    return {"experiments": experiments, "status_seconds": statistics.median(seconds)}


def main() -> None:
    """Measure, print, and print as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--experiments", type=int, default=10_000)
    options = parser.parse_args()
    results = checkpointing(options.images, options.epochs) | status(options.experiments, 3)
    seconds, plain = results["seconds"], results["torch_save_seconds"]
    print(
        f"checkpoint at width 64: {results['bytes']:,} bytes, {seconds:.2f} s "
        f"(torch.save: {plain:.2f} s, ratio {seconds / plain:.1f}), holds training up for "
        f"{results['seconds_held_up']:.3f} s"
    )
    print(
        f"training at {results['images_per_second']:.0f} images/s: {results['share_of_these_epochs']:.2%} of epochs of "
        f"{options.images} images, {results['share_of_an_epoch_of_50000']:.3%} of an epoch of {EPOCH:,}"
    )
    print(f"status of {results['experiments']:,} experiments: {results['status_seconds']:.2f} s")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
