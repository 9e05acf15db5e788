"""An experiment that version 0.1 finished, before models had specs: this version reads it as finished, untouched."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from analysis import load as load_results
from analysis import report
from dwf_cluster import status
from dwf_cluster.attacks.gradient import margin, predict
from dwf_cluster.data import sources
from dwf_cluster.data.device import to_float
from dwf_cluster.defences.build import trained
from dwf_cluster.defences.registry import METHODS
from dwf_cluster.experiment import Experiment
from dwf_cluster.launch import main
from dwf_cluster.plan import jobs
from dwf_cluster.presets import build
from dwf_cluster.store import tables

ARCHIVE = Path(__file__).with_name("finished") / "version-0.1.zip"
ASSIGNMENTS = [
    "data.train_examples=64",
    "data.test_examples=30",
    "model.width=2",
    "gate.hidden=4",
    "gate.kind=hard",
    "experts.fgsm=1",
    "experts.pgd=1",
    "experts.epochs=1",
    "experts.batch_size=32",
    "joint.epochs=1",
    "joint.batch_size=32",
    "pgd.steps=1,2",
    "evaluation.pgd_steps=1,2",
    "evaluation.restarts=2",
    "evaluation.restart_steps=2",
    "evaluation.adaptive_steps=2",
    "evaluation.beyond=pgd_expert,transfer",
    "evaluation.check_examples=8",
    "evaluation.batch_size=16",
    "evaluation.shard_examples=16",
    "evaluation.probe_examples=30",
    "evaluation.probe_steps=2",
    "baselines=pgd-at",
]
"""Settings of the experiment."""


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    shutil.unpack_archive(ARCHIVE, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def experiment() -> Experiment:
    return build("digits", 0, ASSIGNMENTS)


def _files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of change of every file of checkpoints and tables."""
    paths = [path for part in ("checkpoints", "results") for path in folder.glob(f"*/{part}/**/*") if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_the_same_command_uses_its_folder_skips_every_stage_and_adds_the_worst_cases(
    storage: Path, experiment: Experiment, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Without the attack on routing, which the version did not have: see the next test.
    monkeypatch.setitem(METHODS, "dwf", replace(METHODS["dwf"], selects=lambda spec: False))
    for _ in range(2):
        before = _files(storage)
        assert main(["--local", "--gpus", "0", "--storage", str(storage), "--set", *ASSIGNMENTS]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[:3] == [f"{stage}: done already, skipped" for stage in ("experts", "joint", "evaluate")]
        assert lines[-1] == str(storage / experiment.folder)
        added = _files(storage).keys() - before.keys()
        assert before.items() <= _files(storage).items()
        if len(before) < len(_files(storage)):
            names = {Path(path).stem for path in added}
            assert names == {f"evaluate-{n}-{what}" for n in experiment.names for what in ("worst_case", "stronger")}
    assert not added  # by the second command
    rows = tables.read(experiment.store(str(storage)), "predictions").to_pandas()
    within = rows[rows.epsilon.isna() | (rows.epsilon <= experiment.threat.epsilon)]
    for model, own in within.groupby("model"):
        attacks, worst = own[own.attack != "worst_case"], own[own.attack == "worst_case"]
        robust = (attacks.prediction == attacks.label).groupby(attacks.example).all()
        assert (worst.prediction == worst.label).tolist() == robust.sort_index().tolist(), model


def test_its_hard_gate_lacks_only_the_attack_on_routing(storage: Path, experiment: Experiment) -> None:
    pending = jobs.pending(experiment, experiment.store(str(storage)), sources.sizes(experiment.data))
    assert [job.name for listed in pending.values() for job in listed] == [
        "evaluate mixture pgd_route 0-15",
        "evaluate mixture pgd_route 16-29",
    ]


def test_status_lists_it_as_done(storage: Path, experiment: Experiment) -> None:
    _, line = status.lines(str(storage))
    assert line.split()[:5] == [experiment.folder, "done", "4/4", "1/1", "17/17"]


def test_its_weights_give_the_margins_that_it_stored(storage: Path, experiment: Experiment) -> None:
    store = experiment.store(str(storage))
    images = sources.load(experiment.data, Path())
    x, y = to_float(torch.tensor(images.x_test)), torch.tensor(images.y_test)
    rows = [row for row in tables.read(store, "predictions").to_pylist() if row["attack"] == "clean"]
    for name in experiment.names:
        stored = sorted((row["example"], row["margin"]) for row in rows if row["model"] == name)
        model = trained(experiment.models, name, images.format, experiment.seed, store).eval()
        # Other processors round differently.
        torch.testing.assert_close(
            margin(predict(model, x), y), torch.tensor([m for _, m in stored]), atol=1e-4, rtol=1e-3
        )


def test_the_analysis_reads_every_table_of_it(storage: Path, experiment: Experiment) -> None:
    results = load_results(str(storage))
    (group,) = results.groups
    assert experiment.names == ("benign", "fgsm-1", "pgd-1", "pgd-at", "mixture")
    assert group.models == ("benign", "pgd-at", "mixture", "fgsm-1", "pgd-1")
    counts = {name: len(getattr(results, name)) for name in ("evaluations", "predictions", "metrics", "checks", "jobs")}
    assert counts == {"evaluations": 91, "predictions": 2730, "metrics": 5, "checks": 55, "jobs": 22}
    assert "digits" in report.page([str(storage)])
