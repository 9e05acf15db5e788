"""Is the defended model more accurate than its best expert? One column for each seed, from finished experiments.

    for seed in 0 1 2; do
        python -m dwf_cluster.launch --local --seed $seed --set experts.epochs=20 joint.epochs=6
    done
    python benchmarks/mixture_against_experts.py runs/digits-seed*

The best expert is chosen for each column and seed on the same test images, which is an advantage for the experts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from dwf_cluster.experiment import Experiment

COLUMNS = {
    "clean": ("clean", None),
    "PGD-20": ("pgd", 20),
    "PGD, restarts": ("pgd_restarts", None),
    "PGD, adaptive": ("pgd_adaptive", None),
}


def main(folders: list[str]) -> None:
    """Print a Markdown table of experiments that differ only in their seed."""
    evaluations = pd.concat([pd.read_parquet(Path(folder) / "results" / "evaluations") for folder in folders])
    defended = Experiment.from_json((Path(folders[0]) / "experiment.json").read_text()).defended
    seeds = sorted(evaluations.seed.unique())
    print(f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean ± std |")
    print("|---|" + "---:|" * (len(seeds) + 1))
    for title, (attack, steps) in COLUMNS.items():
        rows = evaluations[evaluations.attack == attack]
        rows = rows if steps is None else rows[rows.steps == steps]
        accuracy = 100 * rows.pivot(index="seed", columns="model", values="accuracy")
        best = accuracy[list(defended.parents)].max(axis=1)
        _print_row(f"{title}, {defended.name}", accuracy[defended.name])
        _print_row(f"{title}, best expert", best)
        _print_row(f"{title}, difference", accuracy[defended.name] - best, sign="+")


def _print_row(title: str, values: pd.Series[float], sign: str = "") -> None:
    cells = [f"{value:{sign}.1f}" for value in values]
    print(f"| {title} | {' | '.join(cells)} | {values.mean():{sign}.1f} ± {values.std():.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
