"""Time of the demo's evaluation, with and without the reuse of gradients.

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
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from dwf_cluster.data.registry import Sizes
from dwf_cluster.data.sources import Images, load
from dwf_cluster.data.subsets import checked
from dwf_cluster.defences.build import trained
from dwf_cluster.determinism import make_deterministic
from dwf_cluster.evaluation.registry import CHECKS
from dwf_cluster.evaluation.run import check, evaluate
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import Job, jobs
from dwf_cluster.presets import build

CPU = torch.device("cpu")
WAYS: tuple[tuple[str, tuple[str, ...]], ...] = ("all", ()), ("reused", ("cpu",))
"""Which gradients are computed or reused, and on which devices they are reused."""


def results(experiment: Experiment, job: Job, images: Images, models: dict[str, nn.Module]) -> Any:
    """The rows of one evaluation, without their seconds."""
    suite, name = job.suite or "", job.model
    if suite == CHECKS:
        part = checked(experiment.data.source, images.y_test, job.stop)
        others = {other: model for other, model in models.items() if other != name}
        settings: dict[str, Any] = {"seed": experiment.seed, "device": CPU, "others": others}
        arguments = images.x_test[part], images.y_test[part], experiment.evaluation, experiment.threat
        return check(models[name], name, *arguments, **settings)
    shard = slice(job.first, job.stop)
    rows, predictions = evaluate(
        *(models, name, suite, images.x_test[shard], images.y_test[shard], experiment.evaluation, experiment.threats),
        seed=experiment.seed,
        device=CPU,
        first=job.first,
        experts=job.spec.experts,
    )
    return [{key: row[key] for key in row if key != "seconds"} for row in rows], predictions


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
            for way, devices in WAYS[:: (1, -1)[turn % 2]]:
                with patch("dwf_cluster.attacks.gradient_cache._DEVICES", devices):
                    clock = time.process_time()
                    rows.append(results(experiment, job, images, models))
                    of = "mixture" if job.model == "mixture" else "experts"
                    seconds[of, job.suite or "", way].append(time.process_time() - clock)
            assert repr(rows[0]) == repr(rows[1]), f"{job.model} {job.suite}"
    report = {}
    for model, suite in dict.fromkeys((model, suite) for model, suite, _ in seconds):
        turns = options.turns
        a, b = (sum_of_medians(seconds[model, suite, way], turns) for way, _ in WAYS)
        report[f"{model} {suite}"] = {"all": round(a, 2), "reused": round(b, 2), "ratio": round(a / b, 2)}
    a, b = (sum(row[way] for row in report.values()) for way, _ in WAYS)
    print(json.dumps({**report, "total": {"all": round(a, 1), "reused": round(b, 1), "ratio": round(a / b, 2)}}))


def sum_of_medians(seconds: list[float], turns: int) -> float:
    """The sum over models of the median over turns; the models of a turn follow each other."""
    models = len(seconds) // turns
    return sum(statistics.median(seconds[i::models]) for i in range(models))


if __name__ == "__main__":
    main()
