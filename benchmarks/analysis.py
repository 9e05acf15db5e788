"""What Table 3 and the figures over epsilon and iterations cost from a million and from ten million predictions.

    python benchmarks/analysis.py

Writes results that are made up (CIFAR-10's sizes, but nobody was trained), has another process read every row of them,
test every pair of models and draw, and prints its seconds and its peak memory. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy import stats

from dwf_cluster.evaluation.registry import CHECKS, Column, columns, suite_names, transfer_column
from dwf_cluster.experiment import MIXTURE, Experiment, build
from dwf_cluster.store import tables

SLICE = 8192
"""Images of a file, as evaluation tasks have them."""

WORK = """
import sys
from analysis import figures, load, outcomes, tables

for group in load(sys.argv[1]).groups:
    measured, _, made, _ = tables.of_group(group, outcomes.outcomes(group))
    for table in made:
        print(tables.text(table))
    figures.save({"fgsm": figures.fgsm(group, measured), "pgd": figures.pgd(group, measured)}, sys.argv[2])
"""


def make_up(storage: Path, experiment: Experiment, examples: int, classes: int = 10) -> Path:
    """Write the tables of an experiment that never ran: a pure function of its seed; accuracies fall with strength.

    Args:
        storage: the experiment's folder is made in it.
        experiment: whose models and columns.
        examples: test images.
        classes: their labels are 0..classes-1.

    Returns:
        The experiment's folder.
    """
    folder = storage / experiment.folder
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(experiment.to_json())
    images = np.random.default_rng(1)
    label, hardness = images.integers(0, classes, examples), images.random(examples)
    random = np.random.default_rng([experiment.seed, 2])
    names = [*(regime.name for regime in experiment.regimes), MIXTURE]
    skill = dict(zip(names, random.normal(0, 0.02, len(names)), strict=True))
    for model in names:
        for family in suite_names(experiment, model):
            if family == CHECKS:
                continue
            found = [(model, column) for column in columns(experiment, family)]
            if family == "paper" and "transfer" in experiment.evaluation.beyond:
                found += [(other, transfer_column(experiment, model)) for other in names if other != model]
            outcomes = [_outcome(experiment, m, c, skill[m], hardness, label, classes, random) for m, c in found]
            rows = [_evaluation(m, c, o[0], label) for (m, c), o in zip(found, outcomes, strict=True)]
            _write(folder, "evaluations", f"evaluate-{model}-{family}", experiment, pa.Table.from_pylist(rows))
            for first in range(0, examples, SLICE):
                parts = [_predictions(m, c, o, label, first) for (m, c), o in zip(found, outcomes, strict=True)]
                file = f"evaluate-{model}-{family}-{first:09d}"
                _write(folder, "predictions", file, experiment, pa.concat_tables(parts))
        _write_small_tables(folder, experiment, model, random)
    return folder


Outcome = tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]


def _outcome(
    experiment: Experiment,
    model: str,
    column: Column,
    skill: float,
    hardness: NDArray[np.float64],
    label: NDArray[np.int64],
    classes: int,
    random: np.random.Generator,
) -> Outcome:
    """Predictions, margins and, for the mixture, gate weights of one model in one column."""
    kind = model.split("-", maxsplit=1)[0]
    clean, lost = {"benign": (0.95, 0.95), "fgsm": (0.90, 0.55), "pgd": (0.88, 0.45), MIXTURE: (0.93, 0.40)}[kind]
    strength = (column.epsilon or 0) / max(experiment.evaluation.fgsm_epsilons)
    if column.attack.startswith(("pgd", "apgd", "autoattack")):
        strength = 0.6 + 0.2 * (1 - 1 / (column.steps or 100))
    elif column.attack in ("transfer", "noise"):
        strength = 0.2
    share = np.clip(clean - lost * strength + skill, 0.02, 0.99)
    right = 0.8 * hardness + 0.2 * random.random(len(label)) < share
    wrong = (label + random.integers(1, classes, len(label))) % classes
    margin = np.abs(random.normal(2, 1, len(label))).astype(np.float32)
    gate = None
    if model == MIXTURE:
        experts = [regime.attack for regime in experiment.mixture_regimes]
        attacked = {"clean": "benign", "fgsm": "fgsm"}.get(column.attack, "pgd")
        logits = random.normal(0, 0.4, (len(label), len(experts))) + [1.5 * (e == attacked) for e in experts]
        logits[np.arange(len(label)), label % len(experts)] += 0.8
        weights = np.exp(logits)
        gate = (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    return np.where(right, label, wrong), np.where(right, margin, -margin), gate


def _predictions(model: str, column: Column, outcome: Outcome, label: NDArray[np.int64], first: int) -> pa.Table:
    prediction, margin, gate = (None if part is None else part[first : first + SLICE] for part in outcome)
    assert prediction is not None
    rows = len(prediction)
    if gate is None:
        gates = pa.nulls(rows, pa.list_(pa.float32()))
    else:
        gates = pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * gate.shape[1], gate.ravel())
    of = {"model": model, **{key: getattr(column, key) for key in ("attack", "source", "epsilon", "steps")}}
    types = tables.SCHEMAS["predictions"]
    return pa.table(
        {
            **{name: pa.repeat(pa.scalar(value, types.field(name).type), rows) for name, value in of.items()},
            "example": np.arange(first, first + rows),
            "label": label[first : first + SLICE],
            "prediction": prediction,
            "margin": margin,
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


def _write_small_tables(folder: Path, experiment: Experiment, model: str, random: np.random.Generator) -> None:
    stage = "joint" if model == MIXTURE else "experts"
    epochs = min(experiment.training(stage).epochs, 30)
    seconds = 90.0 if stage == "joint" else {"benign": 3.0, "fgsm": 5.0, "pgd": 40.0}[model.split("-", maxsplit=1)[0]]
    metrics = [
        {
            "stage": stage,
            "model": model,
            "epoch": epoch,
            "step": epoch * 390,
            "loss": 2.3 * float(np.exp(-3 * epoch / epochs) + random.normal(0, 0.01)),
            "clean_accuracy": 0.9 * float(1 - np.exp(-4 * epoch / epochs)),
            "probe_pgd_accuracy": (0.05 if model == "benign" else 0.5) * float(1 - np.exp(-3 * epoch / epochs)),
            "learning_rate": 0.05 * (1 + float(np.cos(np.pi * epoch / epochs))),
            "images_per_second": 50_000 / seconds,
            "seconds": seconds,
            "device": "cuda",
        }
        for epoch in range(1, epochs + 1)
    ]
    _write(folder, "metrics", model, experiment, pa.Table.from_pylist(metrics))
    signs = [("more_steps", 0.01, "PGD-10 leaves 60.0%, PGD-40 59.0%"), ("black_box", 0.02, "Square fools 2.0%")]
    checks = [
        {"model": model, "check": check, "value": value, "limit": 0.05, "fired": False, "meaning": why, "examples": 64}
        for check, value, why in signs
    ]
    _write(folder, "checks", f"evaluate-{model}-checks-000000000", experiment, pa.Table.from_pylist(checks))
    task = "joint" if stage == "joint" else f"expert {model}"
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
    """As the store writes it: the schema's columns, zstd."""
    schema, of = tables.SCHEMAS[table], tables.rows_of(experiment, [{}])[0]
    arrays = []
    for field in schema:
        if field.name in of:
            arrays.append(pa.repeat(pa.scalar(of[field.name], field.type), len(rows)))
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
    found = {}
    for seeds, examples in ((1, 5_000), (5, 10_000)):
        with tempfile.TemporaryDirectory() as folder:
            storage, out = Path(folder, "runs"), Path(folder, "figures")
            for seed in range(seeds):
                make_up(storage, build("cifar10", seed), examples)
            rows = pq.ParquetDataset([str(f) for f in storage.glob("*/results/predictions/*")]).read(["seed"]).num_rows
            size = sum(f.stat().st_size for f in storage.glob("*/results/predictions/*")) / 2**20
            found[f"{rows:,} predictions"] = cost = measure(storage, out)
            print(f"{rows:,} rows, {size:.0f} MiB: {cost}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
