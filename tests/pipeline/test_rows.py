"""Every row of Table 3 that fits images of 8x8, and every other method: trained, killed, resumed, attacked, shown."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from analysis import report, tables
from analysis.results import load
from analysis.tables import accuracies
from dwf_cluster.data.sources import load as load_images
from dwf_cluster.defences.build import untrained
from dwf_cluster.defences.registry import METHODS
from dwf_cluster.experiment import Experiment
from dwf_cluster.presets import PRESETS, build
from dwf_cluster.training.given import clean_accuracy

from ..conftest import LOCAL, TIMING_COLUMNS, assert_same, rows_of, store_of
from ..process import Launch

ROWS = (*PRESETS["table3-small"][0].baselines, "trades", "free", "fgsm-rs", "n-fgsm")
SMALL = [
    f"baselines={','.join(ROWS)}",
    "data.train_examples=48",
    "data.test_examples=12",
    "gate.hidden=8",
    "experts.benign=1",
    "experts.fgsm=0",
    "experts.pgd=1",
    "experts.epochs=2",
    "experts.batch_size=24",
    "joint.epochs=1",
    "joint.batch_size=24",
    "pgd.steps=1,2",
    "soe.steps=1",
    "trades.steps=1",
    "free.replays=2",
    "evaluation.fgsm_epsilons=0.1",
    "evaluation.pgd_steps=1",
    "evaluation.restarts=2",
    "evaluation.restart_steps=1",
    "evaluation.adaptive_steps=1",
    "evaluation.check_examples=4",
    "evaluation.batch_size=12",
    "evaluation.probe_examples=8",
    "evaluation.probe_steps=1",
]
GIVEN = "kept"
"""The name of a row with given weights."""


@pytest.fixture(scope="module")
def assignments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of an experiment with every row, one of them with the weights of a file."""
    experiment = build("table3-small", 0, SMALL)
    images = load_images(experiment.data.model_copy(update={"test_examples": None}), Path())
    model = untrained(experiment.spec("benign"), images.format, 1, {})
    file = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save({"net": model.state_dict()}, file)
    accuracy = clean_accuracy(model, images.x_test, images.y_test, torch.device("cpu"))
    entry = {"name": GIVEN, "file": str(file), "width": experiment.model.width, "accuracy": accuracy}
    return [*SMALL, f"given={json.dumps([entry])}"]


@pytest.fixture(scope="module")
def experiment(assignments: list[str]) -> Experiment:
    return build("table3-small", 0, assignments)


@pytest.fixture(scope="module")
def arguments(assignments: list[str]) -> list[str]:
    """Of a launch."""
    return [*LOCAL, "--preset", "table3-small", "--set", *assignments]


@pytest.fixture(scope="module")
def killed_run(tmp_path_factory: pytest.TempPathFactory, arguments: list[str]) -> Path:
    """The experiment's folder of a run that was killed in the middle of its trainings, and resumed to its end."""
    launch = Launch(tmp_path_factory.mktemp("killed_run"))

    def kill(driver: psutil.Process, line: str) -> None:
        driver.kill()

    launch.run_and_act_at(r"^expert advmoe: epoch 1/2", kill, *arguments)
    result = launch(*arguments)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])


def test_a_killed_run_resumes_every_row_to_the_bits_of_an_uninterrupted_one(
    killed_run: Path, experiment: Experiment, arguments: list[str], tmp_path: Path
) -> None:
    result = Launch(tmp_path)(*arguments)
    assert result.returncode == 0, result.stderr
    uninterrupted_run = Path(result.stdout.splitlines()[-1])
    trained = [spec.name for spec in experiment.models if METHODS[spec.method].losses is not None]
    assert {GIVEN, "advmoe-wide", "mixture"} <= set(trained)
    assert_same(killed_run, uninterrupted_run, trained, tables=[])
    stores = [store_of(folder) for folder in (killed_run, uninterrupted_run)]
    for table in TIMING_COLUMNS:
        resumed, uninterrupted = (rows_of(store, table) for store in stores)
        pd.testing.assert_frame_equal(resumed, uninterrupted)
        assert set(resumed.model) == set(trained if table == "metrics" else experiment.names)


def test_every_row_is_attacked_and_those_that_select_also_by_attacks_on_their_choice(
    killed_run: Path, experiment: Experiment
) -> None:
    evaluations = pd.read_parquet(killed_run / "results" / "evaluations")
    attacks = evaluations.groupby("model").attack.agg(set)
    assert set(attacks.index) == set(experiment.names)
    for name in experiment.names:
        assert {"clean", "fgsm", "pgd", "pgd_restarts", "pgd_adaptive", "worst_case"} <= attacks[name]
    for name in ("soe", "advmoe", "advmoe-wide"):
        assert {"pgd_route", "pgd_expert"} <= attacks[name]
    metrics = pd.read_parquet(killed_run / "results" / "metrics").set_index("model")
    assert [len(shares) for shares in metrics.expert_shares[["advmoe", "advmoe-wide"]]] == [2] * 4
    assert metrics.expert_shares[["benign", "resnet50"]].isna().all()


def test_the_table_and_the_report_have_the_numbers_of_every_row(
    killed_run: Path, experiment: Experiment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
