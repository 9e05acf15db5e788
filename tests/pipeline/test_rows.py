"""Every row of Table 3 that fits images of 8x8, and every other method: trained, killed, resumed, attacked, shown."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pandas as pd
import psutil
import pytest

from analysis import report, tables
from analysis.results import load
from analysis.tables import accuracies
from dwf_cluster.presets import PRESETS, build

from ..conftest import LOCAL, assert_same
from ..process import Launch

ROWS = (*PRESETS["table3-small"][0].baselines, "trades", "free", "fgsm-rs", "n-fgsm")
SMALL = [
    f"baselines={','.join(ROWS)}",
    "data.train_examples=96",
    "data.test_examples=24",
    "gate.hidden=8",
    "experts.benign=1",
    "experts.fgsm=1",
    "experts.pgd=1",
    "experts.epochs=2",
    "experts.batch_size=48",
    "joint.epochs=1",
    "joint.batch_size=48",
    "pgd.steps=1,2",
    "soe.steps=1",
    "trades.steps=1",
    "free.replays=2",
    "evaluation.fgsm_epsilons=0.1,0.2",
    "evaluation.pgd_steps=1",
    "evaluation.restarts=2",
    "evaluation.restart_steps=1",
    "evaluation.adaptive_steps=1",
    "evaluation.check_examples=4",
    "evaluation.batch_size=24",
    "evaluation.probe_examples=16",
    "evaluation.probe_steps=1",
]
ARGUMENTS = [*LOCAL, "--preset", "table3-small", "--set", *SMALL]


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The experiment's folder of a run that was killed in the middle of its trainings, and resumed to its end."""
    launch = Launch(tmp_path_factory.mktemp("killed_run"))

    def kill(driver: psutil.Process, line: str) -> None:
        driver.kill()

    launch.run_and_act_at(r"^expert advmoe: epoch 1/2", kill, *ARGUMENTS)
    result = launch(*ARGUMENTS)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])


def test_a_killed_run_resumes_every_row_to_the_bits_of_an_uninterrupted_one(killed_run: Path, tmp_path: Path) -> None:
    result: subprocess.CompletedProcess[str] = Launch(tmp_path)("--stages", "experts,joint", *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    experiment = build("table3-small", 0, SMALL)
    trained = [spec.name for spec in experiment.models if spec.method not in ("uniform", "expert")]
    assert_same(killed_run, Path(result.stdout.splitlines()[-1]), trained, ["metrics"])


def test_every_row_is_attacked_and_those_that_select_also_by_attacks_on_their_choice(killed_run: Path) -> None:
    experiment = build("table3-small", 0, SMALL)
    evaluations = pd.read_parquet(killed_run / "results" / "evaluations")
    attacks = evaluations.groupby("model").attack.agg(set)
    assert set(attacks.index) == set(experiment.names)
    for name in experiment.names:
        assert {"clean", "fgsm", "pgd", "pgd_restarts", "pgd_adaptive", "worst_case"} <= attacks[name]
    for name in ("soe", "advmoe"):
        assert {"pgd_route", "pgd_expert"} <= attacks[name]
    metrics = pd.read_parquet(killed_run / "results" / "metrics").set_index("model")
    assert [len(shares) for shares in metrics.expert_shares[["advmoe"]]] == [2, 2]
    assert metrics.expert_shares[["benign", "resnet50"]].isna().all()


def test_the_table_and_the_report_have_the_numbers_of_every_row(
    killed_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = build("table3-small", 0, SMALL)
    measured = accuracies(load(str(killed_run)).groups[0])
    clean = measured[measured.attack == "clean"].set_index("model")["mean"]
    assert set(clean.index) == set(experiment.names)
    page = tmp_path / "report.html"
    assert report.main([str(killed_run), "--out", str(page)]) == 0
    text = re.sub("<[^>]+>", " ", page.read_text())
    assert tables.main([str(killed_run)]) == 0
    printed = capsys.readouterr().out
    for name in experiment.names:
        row = rf"(?<![\w-]){re.escape(name)} .*(?<![\d.]){100 * clean[name]:.1f}(?![\d.])"
        assert re.search(row, printed), name
        assert re.search(row.replace(" .*", r"\s[^A-Za-z]*"), text), name
