"""Cost of the demo: seconds, those of Ray and imports, seconds of a second run, and peak memory.

    python benchmarks/demo.py

Runs `python -m dwf_cluster.launch --local` twice in a temporary folder. The last line is JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pandas as pd
import psutil

COMMAND = [sys.executable, "-m", "dwf_cluster.launch", "--local"]


class PeakMemory(threading.Thread):
    """Samples the proportional set size of a process and its descendants, so that shared pages count once."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.root, self.peak, self.ended = psutil.Process(pid), 0, threading.Event()

    def run(self) -> None:
        """Sample until `ended` is set."""
        while not self.ended.wait(0.5):
            total = 0
            for process in [self.root, *self.root.children(recursive=True)]:
                try:
                    total += process.memory_full_info().pss
                except psutil.Error:  # the process has ended
                    continue
            self.peak = max(self.peak, total)


def covered(jobs: pd.DataFrame) -> float:
    """Seconds in which at least one job ran."""
    total, end = 0.0, pd.Timestamp.min.tz_localize("UTC")
    for started, finished in zip(jobs.started.sort_values(), jobs.sort_values("started").finished, strict=True):
        if finished > end:
            total += (finished - max(started, end)).total_seconds()
            end = finished
    return total


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        clock = time.perf_counter()
        with subprocess.Popen(COMMAND, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
            memory = PeakMemory(process.pid)
            memory.start()
            output, _ = process.communicate()
            memory.ended.set()
        first = time.perf_counter() - clock
        clock = time.perf_counter()
        subprocess.run(COMMAND, cwd=folder, stdout=subprocess.DEVNULL, check=True)
        second = time.perf_counter() - clock
        results = Path(output.splitlines()[-1]) / "results"
        jobs = pd.read_parquet(results / "jobs")
        evaluations = pd.read_parquet(results / "evaluations")
    stages = {stage: round(covered(rows), 1) for stage, rows in jobs.groupby("stage")}
    pgd = evaluations[(evaluations.attack == "pgd") & (evaluations.steps == 20)].set_index("model").accuracy
    clean = evaluations[evaluations.attack == "clean"].set_index("model").accuracy
    print(output)
    print(
        json.dumps(
            {
                "seconds": round(first, 1),
                "seconds_of_ray_and_imports": round(first - covered(jobs), 1),
                "seconds_of_stages": stages,
                "seconds_second_time": round(second, 1),
                "peak_memory_gib": round(memory.peak / 2**30, 2),
                "mixture_clean": round(clean["mixture"], 3),
                "pgd20_mixture": round(pgd["mixture"], 3),
                "pgd20_benign": round(pgd["benign"], 3),
                "pgd20_best_expert": round(pgd.drop("mixture").max(), 3),
            }
        )
    )


if __name__ == "__main__":
    main()
