"""Does the mixture beat its best expert? A row a seed, from the tables of finished experiments.

    for seed in 0 1 2; do
        python -m dwf_cluster.launch --local --seed $seed --set experts.epochs=20 joint.epochs=6
    done
    python benchmarks/mixture_against_experts.py runs/digits-seed*

The best expert is chosen anew for each column and seed, on the same test images: an advantage for the experts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

COLUMNS = {
    "clean": ("clean", None),
    "PGD-20": ("pgd", 20),
    "PGD, restarts": ("pgd_restarts", None),
    "PGD, adaptive": ("pgd_adaptive", None),
}


def main(folders: list[str]) -> None:
    """Print a Markdown table."""
    rows = []
    for folder in folders:
        evaluations = pd.read_parquet(Path(folder) / "results" / "evaluations")
        row: dict[str, float | int] = {"seed": int(evaluations.seed.iloc[0])}
        for title, (attack, steps) in COLUMNS.items():
            chosen = evaluations[evaluations.attack == attack]
            chosen = chosen if steps is None else chosen[chosen.steps == steps]
            accuracy = 100 * chosen.set_index("model").accuracy
            row[f"{title}: mixture"] = accuracy["mixture"]
            row[f"{title}: best expert"] = accuracy.drop("mixture").max()
        rows.append(row)
    table = pd.DataFrame(rows).sort_values("seed").set_index("seed")
    print(f"| | {' | '.join(f'seed {seed}' for seed in table.index)} | mean ± std |")
    print("|---|" + "---:|" * (len(table) + 1))
    for title in COLUMNS:
        mixture, best = table[f"{title}: mixture"], table[f"{title}: best expert"]
        for name, values in (("mixture", mixture), ("best expert", best), ("difference", mixture - best)):
            cells = [f"{value:+.1f}" if name == "difference" else f"{value:.1f}" for value in values]
            spread = f"{values.mean():{'+' if name == 'difference' else ''}.1f} ± {values.std():.1f}"
            print(f"| {title}, {name} | {' | '.join(cells)} | {spread} |")


if __name__ == "__main__":
    main(sys.argv[1:])
