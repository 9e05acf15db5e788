"""Alarms of the checks for gradient masking on honest models, and what the checks cost.

Reads the experiments of finished runs, whose models were trained without any masking:

    python -m dwf_cluster.launch --local --seed 0..1
    python benchmarks/checks.py runs/digits-seed*
"""

from __future__ import annotations

import sys

import pandas as pd


def main(folders: list[str]) -> None:
    """Print the number of models with an alarm, the largest gap of each check, and the seconds of the checks."""
    checks = pd.concat(pd.read_parquet(f"{folder}/results/checks") for folder in folders)
    jobs = pd.concat(pd.read_parquet(f"{folder}/results/jobs") for folder in folders)
    models = checks.groupby(["experiment", "model"])
    alarmed = models.fired.any()
    print(f"models: {len(alarmed)}, with an alarm: {int(alarmed.sum())}")
    for row in checks[checks.fired].itertuples():
        print(f"  seed {row.seed}, {row.model}, {row.check}: {row.meaning}")
    print(f"checks of a model: {models.size().mean():.1f}, that could fire: {models.could_fire.sum().mean():.1f}")
    tested = checks[checks.p.notna()].groupby("check", sort=False)
    print(tested.agg(mean=("value", "mean"), largest=("value", "max"), limit=("limit", "max")).round(3).to_string())
    seconds = jobs[jobs.task.str.contains(" checks ")].groupby("seed").seconds.sum()
    print("\n".join(f"seed {seed}: {value:.1f} s of checks in all jobs" for seed, value in seconds.items()))


if __name__ == "__main__":
    main(sys.argv[1:])
