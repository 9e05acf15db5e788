"""The time from sbatch to the first training step, and the cost of an interruption, on a SLURM of two nodes.

    python -m benchmarks.slurm

Needs root, Debian's munge and slurm-wlm, and the extra `test`. The last line is JSON.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from tests.cluster.slurm import Slurm
from tests.process import command_line

SCRIPT = Path(__file__).parents[1] / "slurm" / "full_pipeline.sh"
CPUS = ["--gpus-per-node=0", "--cpus-per-task=1", "--mem=3G"]
ONE_STEP = ["data.train_examples=64", "experts.epochs=1", "experts.benign=1", "experts.fgsm=1", "experts.pgd=0"]


def submit(slurm: Slurm, folder: Path, options: list[str], assignments: list[str]) -> tuple[str, Callable[[], str]]:
    """The number of a new job, and a function that returns its log."""
    arguments = ["--stages", "experts", "--set", *assignments]
    job = slurm.submit(*CPUS, *options, SCRIPT, *arguments, cwd=folder, DWF_PYTHON=sys.executable)
    log = folder / f"slurm-{job}.out"
    return job, lambda: log.read_text() if log.exists() else ""


def to_first_step(slurm: Slurm, folder: Path) -> dict[str, float]:
    """Seconds from sbatch to: batch script, srun's processes, Ray on both nodes, first task, end of its one step."""
    began = time.time()
    job, _ = submit(slurm, folder, ["--nodes=2"], ONE_STEP)

    def started(command: str) -> float:
        times: list[float] = []

        def has_begun() -> bool:
            times[:] = [p.create_time() for p in slurm.processes(job) if command in command_line(p)]
            return bool(times)

        slurm.wait_for(has_begun, command)
        return min(times)

    times = {
        "batch script": started("cluster.allocation"),
        "srun": started("cluster.node"),
        "Ray begins": started("ray.scripts"),
    }
    joined = folder / f"slurm-{job}.status"
    slurm.wait_for(joined.exists, "status file")
    times["all nodes have joined"] = time.time()
    slurm.wait_for(lambda: list(folder.glob("runs/*/results/metrics/*.parquet")), "first step")
    times["first step"] = time.time()
    slurm.wait(job)
    rows = pd.read_parquet(next(folder.glob("runs/*/results/jobs")))
    times["first task"] = rows.started.min().timestamp()
    return {name: round(moment - began, 1) for name, moment in sorted(times.items(), key=lambda item: item[1])}


def lost(slurm: Slurm, folder: Path) -> dict[str, dict[str, float]]:
    """Seconds of training that each kind of interruption undoes, beside the seconds of the epoch it falls into."""
    two_experts = ["experts.fgsm=0", "experts.pgd=1", "experts.epochs=12"]
    job, log = submit(slurm, folder, ["--nodes=1", "--cpus-per-task=2"], two_experts)
    costs: dict[str, dict[str, float]] = {}
    for number, (name, command) in enumerate(
        {"warned": ["scancel", "--signal=USR2"], "requeued": ["scontrol", "requeue"]}.items(), start=1
    ):
        slurm.wait_for(lambda: re.search(r"pgd-1: epoch \d", log().rpartition("experts: ")[2]), "epoch of this start")
        time.sleep(1)
        sent = time.time()
        slurm(*command, job)
        slurm.wait_for(lambda n=number: int(slurm.field(job, "Restarts")) >= n, "requeue")
        (checkpoints,) = folder.glob("runs/*/checkpoints/pgd-1")
        saved = max(file.stat().st_mtime for file in checkpoints.glob("*/manifest.json"))
        metrics = pd.read_parquet(next(folder.glob("runs/*/results/metrics")), filters=[("model", "==", "pgd-1")])
        costs[name] = {
            "seconds lost": round(max(0.0, sent - saved), 1),
            "seconds from the signal to the checkpoint": round(max(0.0, saved - sent), 1),
            "seconds of an epoch": round(metrics.seconds.mean(), 1),
            "seconds until it runs again": 0.0,
        }
        slurm.wait_for(lambda n=number: log().count("experts: ") >= n + 1, "next start", 300)
        costs[name]["seconds until it runs again"] = round(time.time() - sent, 1)
    slurm.wait(job)
    return costs


def main() -> None:
    """Measure and print."""
    slurm = Slurm()
    try:
        slurm.start()
        with tempfile.TemporaryDirectory() as folder:
            first = [to_first_step(slurm, Path(tempfile.mkdtemp(dir=folder))) for _ in range(3)]
            costs = lost(slurm, Path(tempfile.mkdtemp(dir=folder)))
    finally:
        slurm.stop()
    for times in first:
        print(times)
    print(
        json.dumps({"to_first_step": sorted(first, key=lambda times: times["first step"])[1], "interruptions": costs})
    )


if __name__ == "__main__":
    main()
