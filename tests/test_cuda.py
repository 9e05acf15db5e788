"""What only a GPU can show: captured kernels give the bits of eager ones, a resumed training those of a whole one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from benchmarks.gpu.__main__ import SECTIONS

from .conftest import TINY
from .process import Launch

pytestmark = pytest.mark.cuda

ROOT = Path(__file__).parents[1]

Sections = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def sections() -> Sections:
    """The benchmark's rows by section, from a process of its own: kernels are chosen before CUDA starts."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cuda", "--quick"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    measured: Sections = json.loads(result.stdout.splitlines()[-1])["sections"]
    return measured


def _comparisons(rows: list[dict[str, Any]], what: str) -> dict[str, Any]:
    return {row["what"]: row["value"] for row in rows if what in row["what"]}


def test_every_section_of_the_benchmark_works_on_a_gpu(sections: Sections) -> None:
    assert list(sections) == list(SECTIONS)
    assert all(sections.values())


@pytest.mark.parametrize("section", ["iteration", "mixture"])
def test_a_captured_iteration_of_pgd_gives_the_bits_of_eager_kernels(sections: Sections, section: str) -> None:
    compared = _comparisons(sections[section], "graph equals eager")
    assert len(compared) >= 3  # a row for each precision
    assert set(compared.values()) == {True}, compared


def test_a_training_on_a_gpu_resumed_in_an_epoch_ends_with_the_bits_of_an_uninterrupted_one(sections: Sections) -> None:
    compared = _comparisons(sections["resume"], "resumed equals uninterrupted")
    assert compared
    assert set(compared.values()) == {True}, compared


def test_a_run_computes_on_the_gpu_and_records_its_name(launch: Launch) -> None:
    result = launch("--local", "--gpus", "1", "--set", *TINY)
    assert result.returncode == 0, result.stderr
    jobs = pd.read_parquet(Path(result.stdout.splitlines()[-1]) / "results/jobs")
    assert set(jobs.device) == {torch.cuda.get_device_name(0)}
    assert set(jobs.gpus) == {1.0}
