"""Measure one GPU, from its limits to a training step, beside what was predicted for an H100.

    python -m benchmarks.gpu [--sections iteration,mixture] [--out dwf_cluster/plan/gpu.json]
    python -m benchmarks.gpu --device cpu --quick

Needs no Ray: torch, numpy, pyarrow and pydantic; the sections that save checkpoints, safetensors too. Images are random
where only time is measured; accuracies are on Fashion-MNIST or digits. A section that cannot measure something says
why. The last line is JSON. `--out` writes it to a file that has all speeds of the plan: those of `plan/gpu.json`, with
the measured ones in the place of earlier measurements of the same card.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import correctness, processes, speed
from benchmarks.gpu.measure import Row, Setup
from dwf_cluster.determinism import make_deterministic
from dwf_cluster.plan.jobs import EVALUATE, EXPERTS, JOINT
from dwf_cluster.plan.speeds import FILE, FLOAT32, Entry, entries


def versions(setup: Setup) -> Iterator[Row]:
    """Of the card and what drives it, and the flags that decide kernels."""
    yield Row("card", card(setup))
    for name, version in installed(setup).items():
        yield Row(name, version)
    yield Row("deterministic algorithms", torch.are_deterministic_algorithms_enabled())
    yield Row("TF32 in convolutions, where nothing else is said", torch.backends.cudnn.allow_tf32)
    yield Row("TF32 in matrix products", torch.backends.cuda.matmul.allow_tf32)


def training(setup: Setup) -> Iterator[Row]:
    """A step of the product's training loop, in each precision that it can train in."""
    for precision in correctness.TRAINING_PRECISIONS:
        yield from speed.training(setup, precision)


SECTIONS: Mapping[str, Callable[[Setup], Iterator[Row]]] = {
    "versions": versions,
    "ceilings": speed.ceilings,
    "training": training,
    "iteration": speed.iteration,
    "mixture": speed.mixture,
    "parts": speed.parts,
    "processes": processes.processes,
    "resume": correctness.resume,
    "accuracy": correctness.accuracy,
    "columns": correctness.columns,
}


def card(setup: Setup) -> str:
    """The device's name."""
    return torch.cuda.get_device_name(setup.device) if setup.is_cuda else platform.processor() or platform.machine()


def installed(setup: Setup) -> dict[str, str]:
    """Versions of what computes."""
    found = {"torch": str(torch.__version__)}
    if setup.is_cuda:
        cudnn: Any = torch.backends.cudnn
        found |= {"CUDA": str(torch.version.cuda), "cuDNN": str(cudnn.version())}
    return found


def measured_speeds(setup: Setup, sections: Mapping[str, Sequence[Row]]) -> list[Entry]:
    """The entries of the plan that follow from the sections `training` and `accuracy`; of `--quick`, none."""
    if setup.quick:
        return []
    device, today = ("gpu" if setup.is_cuda else "cpu"), datetime.now(timezone.utc).date().isoformat()
    measured = list[tuple[str, str, float]]()
    for precision in correctness.TRAINING_PRECISIONS:
        for stage, name in ((EXPERTS, "pgd-1"), (JOINT, "mixture")):
            for row in sections.get("training", ()):
                if row.what == speed.step_title(setup, name, precision):
                    flop = speed.step_flop(setup, name)
                    measured.append((stage, precision, 1e-9 * flop / float(row.value)))
    for row in sections.get("accuracy", ()):
        if row.what == correctness.EVALUATION_SPEED:
            measured.append((EVALUATE, FLOAT32, float(row.value)))
    launch = speed.launch_microseconds(setup) if measured else {}
    return [
        Entry(device, stage, precision, rate, launch[stage], "measurement", card(setup), today, installed(setup))  # type: ignore[arg-type]
        for stage, precision, rate in measured
    ]


def merged(known: Sequence[Entry], measured: Sequence[Entry]) -> list[Entry]:
    """All entries; a measurement replaces earlier ones of the same device, stage, precision and card."""

    def key(entry: Entry) -> tuple[str, ...]:
        return entry.device, entry.stage, entry.precision, entry.kind, entry.card

    replaced = {key(entry) for entry in measured}
    return [*(entry for entry in known if key(entry) not in replaced), *measured]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status: 1 if a section failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="some of them, separated by commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small sizes: whether every section works")
    parser.add_argument("--out", type=Path, help="file for the JSON, such as dwf_cluster/plan/gpu.json")
    options = parser.parse_args(arguments)
    chosen = options.sections.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"--sections: {unknown[0]!r} cannot be used: allowed are {', '.join(SECTIONS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: 'cuda' cannot be used: PyTorch sees no GPU; allowed is cpu")
    make_deterministic(1)  # as the product's evaluations; `float32_as` makes the flags of its trainings
    setup = Setup(torch.device(options.device), options.quick)
    sections, failed = dict[str, list[Row]](), list[str]()
    for name in chosen:
        clock, rows = time.perf_counter(), sections.setdefault(name, [])
        print(f"{name}: {(SECTIONS[name].__doc__ or '').splitlines()[0]}", flush=True)
        try:
            for row in SECTIONS[name](setup):
                rows.append(row)
                print(row, flush=True)
        except (RuntimeError, OSError, ImportError, ValueError) as error:  # the other sections are measured anyway
            failed.append(name)
            print(f"error: section {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        print(f"  ({time.perf_counter() - clock:.0f} s)")
    speeds = measured_speeds(setup, sections)
    report = {
        "speeds": [asdict(entry) for entry in merged(entries(FILE), speeds)],
        "measured": {"card": card(setup), "versions": installed(setup), "quick": setup.quick},
        "sections": {name: [asdict(row) for row in rows] for name, rows in sections.items()},
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
