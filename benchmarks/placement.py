"""Quality of the plan: makespan compared with its lower bound, and with a real run on this machine.

    python benchmarks/placement.py [--hours] [--run]

The first table is the planned timeline of the paper's experiment on 1 to 64 GPUs; `--hours` prints the hours of each
stage of some experiments on one GPU instead. With `--run`, the digits preset is run twice in a temporary folder: the
speeds of its stages on seed 0 give the plan for seed 1, which is compared with the run of seed 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import pandas as pd

from dwf_cluster.data.sources import sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import STAGES, Job, jobs
from dwf_cluster.plan.resources import Resources, allocate, cpus_here
from dwf_cluster.plan.schedule import Planned, lower_bound, timeline
from dwf_cluster.plan.speeds import Speeds
from dwf_cluster.presets import build
from dwf_cluster.store import tables

GPUS = (1, 2, 4, 8, 9, 16, 32, 64)
BFLOAT16 = ("experts.precision=bfloat16", "joint.precision=bfloat16")
TIMED = {
    "`cifar10`": ("cifar10", ()),
    "`cifar10`, trained in bfloat16": ("cifar10", BFLOAT16),
    "`svhn`": ("svhn", ()),
    "`cifar10-table3`": ("cifar10-table3", ()),
    "`svhn-table3`": ("svhn-table3", ()),
}
"""Experiments of `--hours`: presets and assignments."""


def all_jobs(experiments: Sequence[Experiment], stages: Sequence[str] = STAGES) -> list[Job]:
    """The jobs of some stages."""
    return [job for e in experiments for stage in stages for job in jobs(e, stage, sizes(e.data))]


def planned(
    experiments: Sequence[Experiment], stages: Sequence[str], resources: Resources, storage: str
) -> tuple[dict[Job, Planned], float]:
    """The timeline, and its lower bound, in seconds."""
    every = all_jobs(experiments, stages)
    allocations = allocate(every, resources)
    length = Speeds(every, allocations, storage).seconds
    return (
        timeline(every, allocations, resources.slots, length),
        lower_bound(every, allocations, resources.slots, length),
    )


def simulate(storage: str) -> None:
    """Print makespan and lower bound at the paper's scale."""
    heads = ("GPUs", "seeds", "experts: hours", "over the bound", "all stages: hours", "over the bound")
    print(f"| {' | '.join(heads)} |")
    print("|---:|---:|---:|---:|---:|---:|")
    for seeds in (1, 5):
        experiments = [build("cifar10", seed) for seed in range(seeds)]
        for gpus in GPUS:
            cells = []
            for stages in (("experts",), STAGES):
                timed, bound = planned(experiments, stages, Resources(8, gpus), storage)
                makespan = max(planned.end for planned in timed.values())
                cells += [f"{makespan / 3600:.1f}", f"{100 * max(0.0, makespan / bound - 1):.1f} %"]
            print(f"| {gpus} | {seeds} | {' | '.join(cells)} |")


def hours(storage: str) -> None:
    """Print the GPU-hours of each stage on one GPU, and what they rest on."""
    print(f"| experiment | {' | '.join(STAGES)} | total |\n|---|{'---:|' * (len(STAGES) + 1)}")
    lines: dict[str, None] = {}
    for name, (preset, settings) in TIMED.items():
        every = all_jobs([build(preset, 0, settings)])
        allocations = allocate(every, Resources(8, 1))
        speeds = Speeds(every, allocations, storage)
        spent = [sum(speeds.seconds(j, allocations[j]) for j in every if j.stage == stage) / 3600 for stage in STAGES]
        lines |= dict.fromkeys(speeds.lines(every))
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in (*spent, sum(spent)))} |")
    print("", *lines, sep="\n")


def run() -> None:
    """Run the demo for two seeds; print the plan of the second beside its measured times."""
    with tempfile.TemporaryDirectory() as storage:
        for seed in ("0", "1"):
            command = [sys.executable, "-m", "dwf_cluster.launch", "--local", "--gpus", "0", "--storage", storage]
            subprocess.run([*command, "--seed", seed], stdout=subprocess.DEVNULL, check=True)
        first, second = build("digits", 0), build("digits", 1)
        resources = Resources(cpus_here(), 0)
        every = all_jobs([first])
        speeds = Speeds(every, allocate(every, resources), storage)
        rows = pd.DataFrame(tables.read(second.store(storage), "jobs").to_pylist()).set_index("task")
    every = all_jobs([second])
    timed = timeline(every, allocate(every, resources), resources.slots, speeds.seconds)
    began = rows.started.min()
    print("| task | planned start | end | real start | end |\n|---|---:|---:|---:|---:|")
    for job, plan in timed.items():
        real = [(rows.loc[job.name, column] - began).total_seconds() for column in ("started", "finished")]
        cells = [f"{seconds:.1f}" for seconds in (plan.start, plan.end, *real)]
        if job.stage != "evaluate":
            print(f"| {job.name} | {' | '.join(cells)} |")
    makespan = max(plan.end for plan in timed.values())
    real_makespan = (rows.finished.max() - began).total_seconds()
    print(f"| all of {len(timed)} tasks | 0.0 | {makespan:.1f} | 0.0 | {real_makespan:.1f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hours", action="store_true", help="GPU-hours of each stage instead of the timelines")
    parser.add_argument("--run", action="store_true", help="compare with a real run too: minutes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage:  # without finished jobs
        (hours if options.hours else simulate)(storage)
    if options.run:
        print()
        run()


if __name__ == "__main__":
    main()
