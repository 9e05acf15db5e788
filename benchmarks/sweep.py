"""Overhead of a sweep: the share of all CPU time, from the command to the table, that no job uses.

    python benchmarks/sweep.py

Five seeds, two sets of PGD step counts, digits at reduced size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd

SIZE = ["data.train_examples=720", "data.test_examples=120", "experts.epochs=2", "evaluation.check_examples=32"]
"""Half the images, a third of the test set, half the epochs; nine experts, width 8, all columns."""

SWEEP = ["seeds=0..4", "pgd.steps=2,4,6,8,10", "pgd.steps=6"]


def main() -> None:
    """Run the sweep in a new folder and print its times."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--cpus", type=int, default=2)
    cpus = parser.parse_args().cpus
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dwf_cluster.launch", "--local", f"--cpus={cpus}", "--gpus=0"]
        began = time.perf_counter()
        subprocess.run([*command, "--storage", folder, "--set", *SIZE, "--sweep", *SWEEP], check=True)
        wall = time.perf_counter() - began
        jobs = pd.concat([pd.read_parquet(path / "results" / "jobs") for path in Path(folder).glob("digits-*")])
    finished = jobs[jobs.state == "done"]
    # The joint stage uses all CPUs, every other job one.
    busy = (finished.seconds * finished.stage.map({"joint": cpus}).fillna(1)).groupby(finished.stage).sum()
    print(f"\n{wall:.1f} s on {cpus} CPUs; used by jobs:")
    for stage, seconds in busy.items():
        print(f"  {stage}: {seconds:.1f} CPU-seconds")
    shared = (jobs.state == "shared").groupby(jobs.stage).sum()
    print(f"  copied instead: {shared['experts']} experts, {shared['evaluate']} evaluations")
    print(f"overhead: {100 * (1 - busy.sum() / (cpus * wall)):.1f} % of all CPU time")


if __name__ == "__main__":
    main()
