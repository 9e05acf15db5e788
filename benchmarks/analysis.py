"""Time and memory of Table 3 and of the figures over epsilon and iterations, for 1 and 10 million predictions.

    python benchmarks/analysis.py

Writes synthetic results with the sizes of CIFAR-10; no model is trained. Another process then reads every row, tests
every pair of models and draws; its seconds and peak memory are printed. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats

from dwf_cluster.defences.registry import METHODS, ModelSpec
from dwf_cluster.evaluation.column import EXPERT, EXPERT_SUITE, expert_columns
from dwf_cluster.evaluation.registry import CHECKS, PAPER, TRANSFER, Column, columns, transfer_column
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import EXPERTS, JOINT
from dwf_cluster.presets import build
from dwf_cluster.store import tables

SHARD = 8192
"""Images of a file, as in evaluation tasks."""

ACCURACY = {"standard": (0.95, 0.95), "fgsm": (0.90, 0.55), "pgd": (0.88, 0.45), "dwf": (0.93, 0.40)}
"""By method: accuracy on clean images, and the loss of accuracy under the strongest attack."""

SECONDS = {"standard": 3.0, "fgsm": 5.0, "pgd": 40.0, "dwf": 90.0}
"""By method: seconds of an epoch."""

WORK = """
import sys
from analysis import figures, formats, load, predictions, tables

for group in load(sys.argv[1]).groups:
    predicted = predictions.read_predictions(group)
    measured, _, shown, _ = tables.make_tables(group, predicted)
    for table in shown:
        print(formats.text(table))
    data = figures.FigureData(group, measured, predicted)
    figures.save({name: figures.draw(name, data) for name in ("fgsm", "pgd")}, sys.argv[2])
"""


def make_up(storage: Path, experiment: Experiment, examples: int, classes: int = 10) -> Path:
    """Write synthetic tables of an experiment, a pure function of its seed; accuracies fall with an attack's strength.

    Args:
        storage: the experiment's folder is created in it.
        experiment: gives models and columns.
        examples: test images.
        classes: their labels are 0..classes-1.

    Returns:
        The experiment's folder.
    """
    folder = storage / experiment.folder
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(experiment.to_json())
    images = np.random.default_rng(1)
    test_set = Images(images.integers(0, classes, examples), images.random(examples), classes)
    random = np.random.default_rng([experiment.seed, 2])
    skill = dict(zip(experiment.names, random.normal(0, 0.02, len(experiment.names)), strict=True))
    for spec in experiment.models:
        for suite in experiment.suites(spec):
            if suite == CHECKS:
                continue
            listed = columns(experiment.evaluation, experiment.threats, suite)
            if suite == EXPERT_SUITE:
                listed = expert_columns(experiment.evaluation, experiment.threat, spec.experts)
            cells = [(spec, column) for column in listed]
            if suite == PAPER and TRANSFER in experiment.evaluation.beyond:
                transferred = transfer_column(experiment.evaluation, experiment.threat, spec.name)
                cells += [(other, transferred) for other in experiment.models if other != spec]
            outcomes = [_outcome(experiment, s, column, skill[s.name], test_set, random) for s, column in cells]
            rows = [
                _evaluation(s.name, column, outcome[0], test_set.label)
                for (s, column), outcome in zip(cells, outcomes, strict=True)
            ]
            file = f"evaluate-{spec.name}-{suite}"
            _write(folder, "evaluations", file, experiment, pa.Table.from_pylist(rows))
            for first in range(0, examples, SHARD):
                shards = [
                    _predictions(s.name, column, outcome, test_set.label, first)
                    for (s, column), outcome in zip(cells, outcomes, strict=True)
                ]
                _write(folder, "predictions", f"{file}-{first:09d}", experiment, pa.concat_tables(shards))
        _write_small_tables(folder, experiment, spec, random)
    return folder


@dataclass(frozen=True)
class Images:
    """Synthetic test images: their labels, and how hard each is to classify, 0..1."""

    label: NDArray[np.int64]
    hardness: NDArray[np.float64]
    classes: int


Outcome = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]


def _outcome(
    experiment: Experiment,
    spec: ModelSpec,
    column: Column,
    skill: float,
    test_set: Images,
    random: np.random.Generator,
) -> Outcome:
    """Predictions, margins and, for a mixture, gate weights of one model in one column."""
    clean, lost = ACCURACY.get(spec.method, (0.9, 0.5))
    label, images = test_set.label, len(test_set.label)
    strength = (column.epsilon or 0) / max(experiment.evaluation.fgsm_epsilons)
    if column.attack.startswith(("pgd", "apgd", "autoattack")):
        strength = 0.6 + 0.2 * (1 - 1 / (column.steps or 100))
    elif column.attack in (TRANSFER, "noise"):
        strength = 0.2
    elif column.attack.startswith(EXPERT) and column.source is not None:
        is_own = column.attack.endswith(f"_{column.source}")  # an expert on the images of its own PGD
        strength = (0.9 if is_own else 0.5) if column.epsilon else 0.0
        strength += 0.02 * spec.experts.index(column.source)
    share = np.clip(clean - lost * strength + skill, 0.02, 0.99)
    is_correct = 0.8 * test_set.hardness + 0.2 * random.random(images) < share
    wrong = (label + random.integers(1, test_set.classes, images)) % test_set.classes
    margin = np.abs(random.normal(2, 1, images)).astype(np.float32)
    gate = None
    if METHODS[spec.method].has_gate:
        experts = [experiment.spec(name).method if spec.parents else None for name in spec.experts]
        matching = {"clean": "standard", "fgsm": "fgsm"}.get(column.attack, "pgd")
        logits = random.normal(0, 0.4, (images, len(experts))) + [1.5 * (expert == matching) for expert in experts]
        logits[np.arange(images), label % len(experts)] += 0.8
        weights = np.exp(logits)
        gate = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return np.where(is_correct, label, wrong), np.where(is_correct, margin, -margin), gate


def _predictions(model: str, column: Column, outcome: Outcome, label: NDArray[np.int64], first: int) -> pa.Table:
    prediction, margin, gate = (None if part is None else part[first : first + SHARD] for part in outcome)
    assert prediction is not None
    assert margin is not None
    rows = len(prediction)
    if gate is None:
        gates = pa.nulls(rows, pa.list_(pa.float32()))
    else:
        gates = pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * gate.shape[1], gate.ravel())
    types = tables.SCHEMAS["predictions"]
    cell = {"model": model, **{name: value for name, value in column.settings.items() if name in types.names}}
    return pa.table(
        {
            **{name: pa.repeat(pa.scalar(value, types.field(name).type), rows) for name, value in cell.items()},
            "example": np.arange(first, first + rows),
            "label": label[first : first + SHARD],
            "prediction": prediction,
            "margin": margin,
            "confidence": 1 - 0.9 * np.exp(-np.abs(margin) / 2),
            "gate": gates,
        }
    )


def _evaluation(
    model: str, column: Column, prediction: NDArray[np.int64], label: NDArray[np.int64]
) -> dict[str, object]:
    correct = int((prediction == label).sum())
    interval = stats.binomtest(correct, len(label)).proportion_ci(0.95, method="wilson")
    counted = {"perturbation": column.epsilon or 0.0, "gradients": len(label) * (column.steps or 1), "seconds": 1.0}
    return {
        "model": model,
        **column.settings,
        "examples": len(label),
        "correct": correct,
        "accuracy": correct / len(label),
        "accuracy_low": float(interval.low),
        "accuracy_high": float(interval.high),
        **counted,
    }


def _write_small_tables(folder: Path, experiment: Experiment, spec: ModelSpec, random: np.random.Generator) -> None:
    model, stage = spec.name, JOINT if spec.parents else EXPERTS
    epochs, seconds = min(spec.training.epochs, 30), SECONDS.get(spec.method, 40.0)
    metrics = [
        {
            "stage": stage,
            "model": model,
            "epoch": epoch,
            "step": epoch * 390,
            "loss": 2.3 * float(np.exp(-3 * epoch / epochs) + random.normal(0, 0.01)),
            "clean_accuracy": 0.9 * float(1 - np.exp(-4 * epoch / epochs)),
            "probe_pgd_accuracy": (0.05 if spec.method == "standard" else 0.5) * float(1 - np.exp(-3 * epoch / epochs)),
            "learning_rate": 0.05 * (1 + float(np.cos(np.pi * epoch / epochs))),
            "images_per_second": 50_000 / seconds,
            "seconds": seconds,
            "device": "cuda",
        }
        for epoch in range(1, epochs + 1)
    ]
    _write(folder, "metrics", model, experiment, pa.Table.from_pylist(metrics))
    checked = [("more_steps", 0.01, "PGD-10 leaves 60.0%, PGD-40 59.0%"), ("black_box", 0.02, "Square fools 2.0%")]
    checks = [
        {
            "model": model,
            "check": check,
            "value": value,
            "limit": 0.05,
            "fired": False,
            "meaning": meaning,
            "examples": 64,
        }
        for check, value, meaning in checked
    ]
    _write(folder, "checks", f"evaluate-{model}-checks-000000000", experiment, pa.Table.from_pylist(checks))
    task = JOINT if stage == JOINT else f"expert {model}"
    job = {
        "stage": stage,
        "model": model,
        "task": task,
        "state": "done",
        "started": "2026-01-01T00:00:00Z",
        "finished": "2026-01-01T01:00:00Z",
        "seconds": seconds * epochs,
        "attempts": 1,
        "host": "made-up",
        "device": "cuda",
        "gpus": 1.0,
        "torch_version": "2.10.0",
        "ray_version": "2.60.0",
        "python_version": "3.11.7",
        "dwf_cluster_version": "0.1.0",
        "git_commit": "0" * 40,
    }
    _write(folder, "jobs", task.replace(" ", "-"), experiment, pa.Table.from_pylist([job]))


def _write(folder: Path, table: str, file: str, experiment: Experiment, rows: pa.Table) -> None:
    """Write a file as the store does: the schema's columns, compressed with zstd."""
    schema, labels = tables.SCHEMAS[table], asdict(experiment.labels)
    arrays = []
    for field in schema:
        if field.name in labels:
            arrays.append(pa.repeat(pa.scalar(labels[field.name], field.type), len(rows)))
        elif field.name in rows.column_names:
            column = rows[field.name].combine_chunks()
            arrays.append(column.cast(field.type))
        else:
            arrays.append(pa.nulls(len(rows), field.type))
    path = folder / "results" / table / f"{file}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), path, compression="zstd")


def measure(storage: Path, out: Path) -> dict[str, float]:
    """Seconds and peak memory of a process that makes the tables and the two figures."""
    clock = time.perf_counter()
    command = [sys.executable, "-c", WORK, str(storage), str(out)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL) as process:
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return {
        "seconds": round(time.perf_counter() - clock, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_gib": round(usage.ru_maxrss / 2**20, 2),
    }


def main() -> None:
    """Measure and print."""
    costs = {}
    for seeds, examples in ((1, 5_000), (5, 10_000)):
        with tempfile.TemporaryDirectory() as folder:
            storage, out = Path(folder, "runs"), Path(folder, "figures")
            for seed in range(seeds):
                make_up(storage, build("cifar10", seed), examples)
            rows = pq.ParquetDataset([str(f) for f in storage.glob("*/results/predictions/*")]).read(["seed"]).num_rows
            size = sum(f.stat().st_size for f in storage.glob("*/results/predictions/*")) / 2**20
            costs[f"{rows:,} predictions"] = cost = measure(storage, out)
            print(f"{rows:,} rows, {size:.0f} MiB: {cost}")
    print(json.dumps(costs))


if __name__ == "__main__":
    main()
