"""The benchmark of a GPU on a CPU, at sizes at which every section works and no speed means anything."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.__main__ import SECTIONS, main, measured_speeds, merged
from benchmarks.gpu.correctness import EVALUATION_SPEED
from benchmarks.gpu.measure import Row, Setup, attacked, random_batch
from benchmarks.gpu.speed import step_flop, step_title
from dwf_cluster.plan.speeds import FILE, entries

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


def test_every_section_works_on_a_cpu_and_writes_the_speeds_that_the_plan_reads(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--out", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    report = json.loads(result.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    assert list(report["sections"]) == list(SECTIONS)
    assert all(report["sections"].values())
    compared = [row for rows in report["sections"].values() for row in rows if row["value"] is False]
    assert [row for row in compared if row["predicted"]] == []
    assert "predicted for an H100: 2.9" not in result.stdout  # of batch 128, which was not measured
    assert "predicted for an H100: 18.0" in result.stdout
    assert entries(out) == entries(FILE)  # small sizes give no speeds


def test_a_section_that_does_not_exist_is_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--device", "cpu", "--sections", "iteration,rockets"])
    assert exited.value.code == 2
    assert "--sections: 'rockets' cannot be used: allowed are versions, ceilings" in capsys.readouterr().err


def test_measured_steps_become_speeds_of_their_stages() -> None:
    setup = Setup(CPU, quick=False)
    rows = {
        "training": [
            Row(step_title(setup, "benign", "float32"), 1.0, "ms"),
            Row(step_title(setup, "pgd-1", "float32"), 40.0, "ms"),
            Row(step_title(setup, "mixture", "float32"), 400.0, "ms"),
        ],
        "accuracy": [Row(EVALUATION_SPEED, 7.0, "TFLOP/s")],
    }
    measured = measured_speeds(setup, rows)
    assert {entry.stage: entry.teraflops for entry in measured} == pytest.approx(
        {
            "experts": step_flop(setup, "pgd-1") / 40e-3 / 1e12,
            "joint": step_flop(setup, "mixture") / 400e-3 / 1e12,
            "evaluate": 7.0,
        }
    )
    assert all(entry.source.startswith("measured on ") for entry in measured)
    assert measured_speeds(replace(setup, quick=True), rows) == []


def test_a_measurement_replaces_the_last_one_of_the_same_card_and_no_estimate() -> None:
    known = entries(FILE)
    old = replace(known[0], kind="measurement", card="A", versions={"torch": "1"})
    other, new = replace(old, card="B"), replace(old, teraflops=1.0)
    assert merged([*known, old, other], [new]) == [*known, other, new]


def test_an_attack_in_bfloat16_follows_nearly_the_gradient_of_float32() -> None:
    setup = Setup(CPU, quick=True)
    experiment = setup.experiment()
    x, y = random_batch(setup, 16)
    for name in ("benign", "mixture"):
        model = setup.model(experiment, experiment.spec(name))
        gradients = []
        for precision in ("ieee", "bf16"):
            leaf = x.clone().requires_grad_()
            logits = attacked(model, precision)(leaf)
            assert logits.dtype == torch.float32
            (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, y), leaf)
            gradients.append(gradient.flatten())
        similarity = torch.nn.functional.cosine_similarity(*gradients, dim=0)
        assert 0.9 < float(similarity) < 1.0, name
