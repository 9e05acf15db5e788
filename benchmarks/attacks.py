"""Time of the result table's columns, compared with torchattacks, foolbox and ART.

    OMP_WAIT_POLICY=PASSIVE python benchmarks/attacks.py [--images 512] [--mixture-images 24]

Width-16 ResNet-18s, one trained on clean digits and one on PGD examples, on digits scaled to 32x32 with three
channels. Every contestant attacks the same model, with both cores of the machine: ours as it runs, in shards of
the test set on one-thread workers; the peers in one process with the number of threads and the batch size that
are fastest for them. The contestants take turns on parts of the images (foolbox and ART only on the first, the
undefended model on half of the images), and times are medians over parts, for all images. (Threads that wait by
spinning lose much time on a machine that others use, hence the variable.) The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.evaluation.run import evaluate
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.resnet import ResNet
from dwf_cluster.presets import build

EPSILON, STEP_SIZE = 0.15, 0.03
COLUMNS = [f"evaluation.fgsm_epsilons={','.join(f'{0.03 * i:.2f}' for i in range(1, 10))}"]
FIFTEEN = [*COLUMNS, "evaluation.pgd_steps=10,20,30,40,50", "evaluation.restarts=1", "evaluation.restart_steps=1"]
PAPER = [*COLUMNS, "evaluation.pgd_steps=10,20,30,40,50", "evaluation.restarts=3", "evaluation.restart_steps=100"]
FGSM = [0.03 * i for i in range(1, 10)]
PGD = [10, 20, 30, 40, 50]
CORES = 2
ONCE = ("foolbox 15", "art 15")
"""Contestants that are timed in the first turn only."""

Columns = dict[str, torch.Tensor]
"""Whether each image was classified correctly, by column."""


# ------------------------------------------------------------------------------------------ models and images


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """1,797 digits, float in [0, 1], shape (n, 3, 32, 32), multiples of 1/255; and their labels."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    x = F.interpolate(x, scale_factor=4, mode="bilinear").expand(-1, 3, -1, -1)
    return (x * 255).round() / 255, torch.tensor(digits.target)


def trained(x: torch.Tensor, y: torch.Tensor, adversarial: bool) -> ResNet:
    """Train for two epochs on clean images, or for four on those of a short PGD."""
    torch.manual_seed(0)
    model = ResNet(10, (0.3,) * 3, (0.35,) * 3, width=16).to(memory_format=torch.channels_last)
    epochs, ball = (4 if adversarial else 2), Ball("linf", EPSILON)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * -(-len(x) // 64))
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(x)), 64):
            part = x[batch]
            if adversarial:
                *_, last = pgd(frozen(model), part, y[batch], ball, step_size=0.06, steps=4)
                part = last.x
            optimizer.zero_grad()
            F.cross_entropy(model(part), y[batch]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    # Peers do not freeze models, so autograd would otherwise compute gradients of the weights.
    return model.to(memory_format=torch.contiguous_format).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------ contestants


def _ours(experiment: Experiment, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[Columns, int]:
    torch.set_num_threads(1)
    name = experiment.defended.name if isinstance(model, Mixture) else "model"
    pixels = (x * 255).round().to(torch.uint8).numpy()
    settings, cpu = (experiment.evaluation, experiment.threats), torch.device("cpu")
    rows, predictions = evaluate(
        {name: model}, name, "paper", pixels, y.numpy(), *settings, seed=experiment.seed, device=cpu
    )
    columns = {}
    for row in rows:
        own = [p for p in predictions if all(p[k] == row[k] for k in ("attack", "epsilon", "steps"))]
        columns[_name(row["attack"], row["epsilon"], row["steps"])] = torch.tensor(
            [p["prediction"] == p["label"] for p in own]
        )
    return columns, sum(row["gradients"] for row in rows)


def _name(attack: str, epsilon: float | None, steps: int | None) -> str:
    return f"fgsm {epsilon:.2f}" if attack == "fgsm" else f"pgd {steps}" if attack == "pgd" else attack


def ours(pool: ProcessPoolExecutor, experiment: Experiment, model: nn.Module) -> Callable[..., tuple[Columns, int]]:
    """The evaluation of this package: a shard of the images for each core."""

    def run(x: torch.Tensor, y: torch.Tensor) -> tuple[Columns, int]:
        parts = zip(x.tensor_split(CORES), y.tensor_split(CORES), strict=True)
        results = [future.result() for future in [pool.submit(_ours, experiment, model, *part) for part in parts]]
        return {name: torch.cat([part[name] for part, _ in results]) for name in results[0][0]}, sum(
            n for _, n in results
        )

    return run


def _right(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        right: torch.Tensor = model(x).argmax(1) == y
        return right


def torchattacks_columns(model: nn.Module, which: str) -> Callable[[torch.Tensor, torch.Tensor], Columns]:
    """Column by column; `which`: the first 15, or the two others."""
    import torchattacks

    def fifteen(x: torch.Tensor, y: torch.Tensor) -> Columns:
        columns = {"clean": _right(model, x, y)}
        for epsilon in FGSM:
            columns[f"fgsm {epsilon:.2f}"] = _right(model, torchattacks.FGSM(model, eps=epsilon)(x, y), y)
        for steps in PGD:
            attack = torchattacks.PGD(model, eps=EPSILON, alpha=STEP_SIZE, steps=steps, random_start=False)
            columns[f"pgd {steps}"] = _right(model, attack(x, y), y)
        return columns

    def two(x: torch.Tensor, y: torch.Tensor) -> Columns:
        starts = [
            torchattacks.PGD(model, eps=EPSILON, alpha=STEP_SIZE, steps=100, random_start=i > 0) for i in range(3)
        ]
        restarts = torchattacks.MultiAttack(starts)  # skips images that are fooled already
        adaptive = torchattacks.EOTPGD(model, eps=EPSILON, alpha=STEP_SIZE, steps=100, eot_iter=1, random_start=False)
        return {"pgd_restarts": _right(model, restarts(x, y), y), "pgd_adaptive": _right(model, adaptive(x, y), y)}

    return fifteen if which == "15" else two


def foolbox_columns(model: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], Columns]:
    """The first 15 columns."""
    import foolbox

    target = foolbox.PyTorchModel(model, bounds=(0, 1))

    def run(x: torch.Tensor, y: torch.Tensor) -> Columns:
        columns = {"clean": _right(model, x, y)}
        fgsm = foolbox.attacks.LinfFastGradientAttack(random_start=False)
        for epsilon in FGSM:
            columns[f"fgsm {epsilon:.2f}"] = _right(model, fgsm(target, x, y, epsilons=epsilon)[1], y)
        for steps in PGD:
            pgd = foolbox.attacks.LinfPGD(abs_stepsize=STEP_SIZE, steps=steps, random_start=False)
            columns[f"pgd {steps}"] = _right(model, pgd(target, x, y, epsilons=EPSILON)[1], y)
        return columns

    return run


def art_columns(model: nn.Module, batch: int) -> Callable[[torch.Tensor, torch.Tensor], Columns]:
    """The first 15 columns."""
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    target = PyTorchClassifier(model, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0.0, 1.0), device_type="cpu")

    def run(x: torch.Tensor, y: torch.Tensor) -> Columns:
        columns, one_hot = {"clean": _right(model, x, y)}, np.eye(10, dtype=np.float32)[y]
        runs: list[tuple[str, Any]] = [
            (f"fgsm {epsilon:.2f}", FastGradientMethod(target, eps=epsilon, batch_size=batch)) for epsilon in FGSM
        ]
        for steps in PGD:
            pgd = ProjectedGradientDescentPyTorch(
                target,
                eps=EPSILON,
                eps_step=STEP_SIZE,
                max_iter=steps,
                batch_size=batch,
                verbose=False,
            )
            runs.append((f"pgd {steps}", pgd))
        for name, attack in runs:
            columns[name] = _right(model, torch.tensor(attack.generate(x.numpy(), one_hot)), y)
        return columns

    return run


# ------------------------------------------------------------------------------------------------ measurement


def median_seconds(run: Callable[[], object], times: int = 5) -> float:
    """Median of a few runs, after one that warms up."""
    run()
    seconds = []
    for _ in range(times):
        clock = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - clock)
    return statistics.median(seconds)


def bare(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Seconds of a bare forward-backward on the input, for one image; of the frozen model, in parts of 32."""
    frozen_model = frozen(model)

    def run() -> None:
        for part, labels in zip(torch.split(x, 32), torch.split(y, 32), strict=True):
            leaf = part.contiguous(memory_format=torch.channels_last).requires_grad_()
            torch.autograd.grad(F.cross_entropy(frozen_model(leaf), labels, reduction="sum"), leaf)

    return median_seconds(run) / len(x)


def plain(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int) -> float:
    """The same of the model as it is, in parts of `batch`."""

    def run() -> None:
        for part, labels in zip(torch.split(x, batch), torch.split(y, batch), strict=True):
            leaf = part.clone().requires_grad_()
            torch.autograd.grad(F.cross_entropy(model(leaf), labels), leaf)

    return median_seconds(run, 3) / len(x)


def best_for_peers(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> tuple[int, int]:
    """Number of threads and batch size at which a plain gradient is fastest."""
    seconds = {}
    for threads in range(1, CORES + 1):
        torch.set_num_threads(threads)
        for batch in {min(size, len(x)) for size in (32, 64, 128, 256)}:
            seconds[threads, batch] = plain(model, x[:256], y[:256], batch)
    return min(seconds, key=lambda setting: seconds[setting])


def in_batches(run: Callable[[torch.Tensor, torch.Tensor], Columns], size: int) -> Callable[..., Columns]:
    """A contestant that takes `size` images at a time."""

    def batched(x: torch.Tensor, y: torch.Tensor) -> Columns:
        results = [run(*part) for part in zip(torch.split(x, size), torch.split(y, size), strict=True)]
        return {name: torch.cat([part[name] for part in results]) for name in results[0]}

    return batched


def turns(contestants: dict[str, Callable[..., Any]], x: torch.Tensor, y: torch.Tensor, rounds: int) -> Iterator[Any]:
    """Each contestant on each round's share of the images, in turn: (name, seconds, result)."""
    for number, (part, labels) in enumerate(zip(x.tensor_split(rounds), y.tensor_split(rounds), strict=True)):
        for name, run in contestants.items():
            if number and name in ONCE:
                continue
            clock = time.perf_counter()
            result = run(part, labels)
            yield name, time.perf_counter() - clock, result


def compare(
    pool: ProcessPoolExecutor, model: nn.Module, x: torch.Tensor, y: torch.Tensor, rounds: int, peers: bool
) -> dict[str, Any]:
    """Times, ratios and accuracies of one model: 15 columns and 17."""
    threads, batch = best_for_peers(model, x, y)
    torch.set_num_threads(threads)
    fifteen, paper = (build("digits", 0, fields) for fields in (_as(FIFTEEN, 1), _as(PAPER, 100)))
    contestants: dict[str, Callable[..., Any]] = {
        "ours 15": ours(pool, fifteen, model),
        "ours 17": ours(pool, paper, model),
        "torchattacks 15": in_batches(torchattacks_columns(model, "15"), batch),
        "torchattacks 2": in_batches(torchattacks_columns(model, "2"), batch),
    }
    if peers:
        contestants["foolbox 15"] = in_batches(foolbox_columns(model), batch)
        contestants["art 15"] = art_columns(model, batch)
    ours(pool, fifteen, model)(x[:8], y[:8])  # imports
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    right: dict[str, dict[str, list[torch.Tensor]]] = {name: {} for name in contestants}
    gradients = {"ours 15": 0, "ours 17": 0}
    for name, took, result in turns(contestants, x, y, rounds):
        seconds[name].append(took)
        columns = result
        if name in gradients:
            columns, count = result
            gradients[name] += count
        for column, correct in columns.items():
            right[name].setdefault(column, []).append(correct)
    seconds["torchattacks 17"] = [
        a + b for a, b in zip(seconds["torchattacks 15"], seconds.pop("torchattacks 2"), strict=True)
    ]
    right["torchattacks 17"] = right["torchattacks 15"] | right.pop("torchattacks 2")
    accuracy = {
        name: {column: 100 * float(torch.cat(parts).double().mean()) for column, parts in columns.items()}
        for name, columns in right.items()
    }
    report: dict[str, Any] = {
        "images": len(x),
        "peers": {"threads": threads, "batch": batch},
        "seconds": {name: round(rounds * statistics.median(times), 1) for name, times in seconds.items()},
        "accuracy": {name: {c: round(a, 2) for c, a in columns.items()} for name, columns in accuracy.items()},
    }
    report["ratio"] = {
        name: round(statistics.median(_over(seconds[name], seconds[f"ours {name.split()[1]}"])), 2)
        for name in seconds
        if not name.startswith("ours")
    }
    report["largest_difference_in_points"] = {
        name: round(_largest_difference(right["ours 15"], right[name]), 2) for name in report["ratio"]
    }
    torch.set_num_threads(1)
    cost = bare(model, x[:128], y[:128])
    report["gradients"] = gradients
    report["times_the_limit"] = {
        name: round(CORES * sum(seconds[name]) / (gradients[name] * cost), 2) for name in gradients
    }
    return report


def _largest_difference(ours: dict[str, list[torch.Tensor]], peers: dict[str, list[torch.Tensor]]) -> float:
    """Largest difference of accuracy in the 15 columns, in points, on the images that both have attacked."""
    differences = []
    for column, parts in peers.items():
        if column not in ("pgd_restarts", "pgd_adaptive"):
            pairs = zip(ours[column], parts, strict=False)
            difference = torch.cat([a.double() - b.double() for a, b in pairs])
            differences.append(abs(100 * float(difference.mean())))
    return max(differences)


def _as(columns: list[str], adaptive: int) -> list[str]:
    pgd = [f"pgd.epsilon={EPSILON}", f"pgd.step_size={STEP_SIZE}", "evaluation.batch_size=4096"]
    return [*columns, *pgd, f"evaluation.adaptive_steps={adaptive}"]


def _over(above: list[float], below: list[float]) -> list[float]:
    return [a / b for a, b in zip(above, below, strict=False)]  # some are timed once


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--mixture-images", type=int, default=24)
    options = parser.parse_args()
    x, y = images()
    torch.set_num_threads(1)
    undefended, robust = (trained(x[512:], y[512:], adversarial) for adversarial in (False, True))
    gate = Gate(9, (3, 32, 32), (0.3,) * 3, (0.35,) * 3, 128)
    mixture = Mixture((undefended, *[robust] * 8), gate).eval().requires_grad_(False)
    report = {}
    with ProcessPoolExecutor(CORES, multiprocessing.get_context("spawn")) as pool:
        for name, model, which, rounds, peers in (
            ("adversarially trained", robust, slice(0, options.images), 4, True),
            ("undefended", undefended, slice(0, options.images // 2), 2, False),
            ("mixture of nine", mixture, slice(0, options.mixture_images), 1, False),
        ):
            report[name] = compare(pool, model, x[which], y[which], rounds, peers)
            print(name, json.dumps(report[name], indent=1), flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
