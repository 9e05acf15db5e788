"""Time of the demo's evaluation, with and without reused gradients and passes that several models share.

    python -m dwf_cluster.launch --local
    python benchmarks/evaluation.py [--storage runs] [--turns 3]

All evaluations and checks of the demo's ten models, on one thread, as the demo's processes run them. Each evaluation
is measured in both ways, in changing order, and the results must be equal. The last line is JSON: ratios of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from dwf_cluster.cluster.tasks import evaluation_rows
from dwf_cluster.data.registry import Sizes
from dwf_cluster.data.sources import Images, load
from dwf_cluster.defences.build import trained
from dwf_cluster.determinism import make_deterministic
from dwf_cluster.plan.jobs import Job, jobs
from dwf_cluster.presets import build

CPU = torch.device("cpu")
BEFORE, NOW = WAYS = "before", "now"
"""Every gradient is computed, and each model that images are made on alone; or as the product does it."""


def each_alone(models: Iterable[nn.Module], x: torch.Tensor) -> list[list[nn.Module]]:
    """No two models share a pass."""
    return [[model] for model in models]


def results(way: str, job: Job, images: Images, models: Mapping[str, nn.Module]) -> dict[str, list[dict[str, Any]]]:
    """The rows of one evaluation by table, computed in one way, without their seconds."""
    with ExitStack() as stack:
        if way == BEFORE:
            stack.enter_context(patch("dwf_cluster.attacks.gradient_cache._DEVICES", ()))
            stack.enter_context(patch("dwf_cluster.attacks.several._groups", each_alone))
        tables = evaluation_rows(job, images, models, CPU)
    return {table: [{**row, "seconds": None} for row in rows] for table, rows in tables.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="runs")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    make_deterministic(1)
    experiment = build("digits", 0, [])
    store, images = experiment.store(options.storage), load(experiment.data, Path())
    sizes = Sizes(len(images.x_train), len(images.x_test), images.x_train.shape[1:])
    loaded: dict[str, nn.Module] = {}
    seconds: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for turn in range(options.turns):
        for job in jobs(experiment, "evaluate", sizes):
            models = {
                name: trained(experiment.models, name, images.format, experiment.seed, store, loaded)
                for name in job.evaluated_with
            }
            rows = []
            for way in WAYS[:: (1, -1)[turn % 2]]:
                clock = time.process_time()
                rows.append(results(way, job, images, models))
                kind = "mixture" if job.model == "mixture" else "experts"
                seconds[kind, job.suite or "", way].append(time.process_time() - clock)
            assert repr(rows[0]) == repr(rows[1]), f"{job.model} {job.suite}"
    report = {}
    for model, suite in dict.fromkeys((model, suite) for model, suite, _ in seconds):
        turns = options.turns
        a, b = (sum_of_medians(seconds[model, suite, way], turns) for way in WAYS)
        report[f"{model} {suite}"] = {BEFORE: round(a, 2), NOW: round(b, 2), "ratio": round(a / b, 2)}
    a, b = (sum(row[way] for row in report.values()) for way in WAYS)
    print(json.dumps({**report, "total": {BEFORE: round(a, 1), NOW: round(b, 1), "ratio": round(a / b, 2)}}))


def sum_of_medians(seconds: list[float], turns: int) -> float:
    """The sum over models of the median over turns; the models of a turn follow each other."""
    models = len(seconds) // turns
    return sum(statistics.median(seconds[i::models]) for i in range(models))


if __name__ == "__main__":
    main()
