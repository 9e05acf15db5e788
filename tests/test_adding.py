"""Adding a thing is adding a file and one entry: one toy of each kind, in a copy of the packages, through a whole run.

Nothing but the new files and the entries differs from the packages: plan, schedule, checkpoints, tables, progress and
figures follow from the registries.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from . import PATIENCE
from .conftest import TINY

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Addition:
    """A new file, and its entry in a registry.

    Attributes:
        file: path of the new file.
        content: of it.
        registry: path of the file with the registry; empty for an attack, whose entry is that of its suite.
        declaration: the line that opens the registry.
        entry: the line that is added to it.
    """

    file: str
    content: str
    registry: str = ""
    declaration: str = ""
    entry: str = ""


BACKBONE = Addition(
    "dwf_cluster/models/toy.py",
    """
from torch import nn

from dwf_cluster.models.resnet import Normalize


def linear(images, width):
    channels, height, columns = images.shape
    pixels = channels * height * columns
    return nn.Sequential(Normalize(images.mean, images.std), nn.Flatten(), nn.Linear(pixels, images.classes))
""",
    "dwf_cluster/models/registry.py",
    "BACKBONES: Mapping[str, Backbone] = {",
    '"toy": Backbone("dwf_cluster.models.toy:linear", lambda width, shape: 1e4, lambda width, channels, classes: 650),',
)
METHOD = Addition(
    "dwf_cluster/defences/toy.py",
    """
import torch.nn.functional as F

from dwf_cluster.defences.adversarial import build
from dwf_cluster.defences.loss import Loss

__all__ = ["build"]


def losses(spec, model, frozen, x, y, draws):
    for _ in range(2):
        yield Loss(F.cross_entropy(model(x), y, reduction="sum", label_smoothing=0.1), len(y))
""",
    "dwf_cluster/defences/registry.py",
    "METHODS: Mapping[str, Method] = {",
    '"smooth": Method("dwf_cluster.defences.toy:build", "dwf_cluster.defences.toy:losses", lambda spec: 6.0),',
)
DEFENCE = Addition(
    "dwf_cluster/defences/toy_pair.py",
    """
from dataclasses import replace

from dwf_cluster.defences.registry import single


def recipe(settings):
    parent = single("parent", "smooth", settings)
    return parent, replace(parent, name="child", method="continued", parents=("parent",))
""",
    "dwf_cluster/defences/registry.py",
    "DEFENCES: Mapping[str, str] = {",
    '"pair": "dwf_cluster.defences.toy_pair:recipe",',
)
CONTINUED = Addition(
    "dwf_cluster/defences/toy_continued.py",
    """
from dwf_cluster.defences.adversarial import standard

losses = standard


def build(spec, images, parents):
    (parent,) = parents.values()
    return parent
""",
    "dwf_cluster/defences/registry.py",
    "METHODS: Mapping[str, Method] = {",
    '"continued": Method("dwf_cluster.defences.toy_continued:build", "dwf_cluster.defences.toy_continued:losses", '
    "lambda spec: 3.0, needs_parents=True),",
)
ATTACK = Addition(
    "dwf_cluster/attacks/toy.py",
    """
def darker(x, epsilon):
    return (x - epsilon).clamp(0, 1)
""",
)
SUITE = Addition(
    "dwf_cluster/evaluation/toy.py",
    """
from dwf_cluster.attacks.toy import darker
from dwf_cluster.evaluation.run import Attacked


def dark(batch):
    (column,) = batch.columns
    yield Attacked(column, darker(batch.x, column.epsilon))
""",
    "dwf_cluster/evaluation/registry.py",
    "SUITES: Mapping[str, Suite] = {",
    '"dark": Suite("dwf_cluster.evaluation.toy:dark", lambda e, threat: [Column("dark", epsilon=threat.epsilon)], '
    "lambda e, parts: 1.0),",
)
CHECK = Addition(
    "dwf_cluster/evaluation/toy_check.py",
    """
from dwf_cluster.evaluation.significance import Check


def large(inspection):
    yield Check("large", float(inspection.scale), 0.0, "outputs are larger than nothing")
""",
    "dwf_cluster/evaluation/registry.py",
    "CHECK_FUNCTIONS: Mapping[str, str] = {",
    '"large": "dwf_cluster.evaluation.toy_check:large",',
)
DATASET = Addition(
    "dwf_cluster/data/toy.py",
    """
import numpy as np

from dwf_cluster.data.sources import Raw


def stripes(folder):
    random = np.random.default_rng(0)
    y = np.arange(140) % 7
    x = (random.integers(0, 60, (140, 8, 8)) + 28 * y[:, None, None]).astype(np.uint8)
    return Raw(x[:100], y[:100], x[100:], y[100:])
""",
    "dwf_cluster/data/registry.py",
    "DATASETS: Mapping[str, Dataset] = {",
    '"stripes": Dataset(100, 40, (1, 8, 8), 7, "dwf_cluster.data.toy:stripes"),',
)
FIGURE = Addition(
    "analysis/toy_figures.py",
    """
from matplotlib.figure import Figure


def counts(data):
    figure = Figure()
    figure.subplots().bar(list(data.group.models), 1)
    return figure
""",
    "analysis/figures.py",
    "FIGURES: Mapping[str, FigureEntry] = {",
    '"counts": FigureEntry("analysis.toy_figures:counts", "One bar for each model."),',
)
MASKED = Addition(
    "dwf_cluster/defences/toy_masked.py",
    """
import torch
from torch import nn

from dwf_cluster.defences import adversarial
from dwf_cluster.defences.adversarial import standard as losses


class Selection(nn.Module):
    # The brightness selects the class, without a gradient; the gradient is that of one pixel, which decides nothing.

    def __init__(self, trained):
        super().__init__()
        self.trained = trained

    def forward(self, x):
        if self.training:
            return self.trained(x)
        brightness = (29.5 + 28 * torch.arange(7)) / 255
        chosen = (x.mean((1, 2, 3))[:, None] - brightness).abs().argmin(1)
        return 10 * nn.functional.one_hot(chosen, 7).float() + 0.01 * x[:, 0, 0, :1] * torch.arange(7.0)


def build(spec, images, parents):
    return Selection(adversarial.build(spec, images, parents))
""",
    "dwf_cluster/defences/registry.py",
    "METHODS: Mapping[str, Method] = {",
    '"masked": Method("dwf_cluster.defences.toy_masked:build", "dwf_cluster.defences.toy_masked:losses", '
    "lambda spec: 3.0),",
)
ADDITIONS = (BACKBONE, METHOD, MASKED, CONTINUED, DEFENCE, ATTACK, SUITE, CHECK, DATASET, FIGURE)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The experiment's folder, and what a whole run and its report printed, with all additions."""
    folder = tmp_path_factory.mktemp("adding")
    for package in ("dwf_cluster", "analysis"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    for addition in ADDITIONS:
        (folder / addition.file).write_text(addition.content)
        if not addition.registry:
            continue
        registry = folder / addition.registry
        text = registry.read_text()
        assert text.count(addition.declaration) == 1
        registry.write_text(text.replace(addition.declaration, f"{addition.declaration}\n    {addition.entry}"))
    settings = ["data.source=stripes", "data.train_examples=null", "data.test_examples=null", "model.backbone=toy"]
    settings += ["baselines=smooth,masked,pair,controls", "evaluation.beyond=dark", "evaluation.check_examples=40"]
    printed = ""
    for command in (
        ["dwf_cluster.launch", "--local", "--cpus", "2", "--gpus", "0", "--set", *TINY, *settings],
        ["analysis.figures", "runs"],
        ["analysis.report", "runs"],
    ):
        result = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        printed += result.stdout
    (experiment,) = (folder / "runs").glob("digits-seed0-*")
    return experiment, printed


def _table(experiment: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(experiment / "results" / name)


def test_a_backbone_is_trained_and_attacked(run: tuple[Path, str]) -> None:
    experiment, _ = run
    assert set(_table(experiment, "metrics").model) == {
        "benign",
        "fgsm-1",
        "pgd-1",
        "smooth",
        "masked",
        "parent",
        "child",
        "mixture",
    }
    header = (experiment / "checkpoints/benign/epoch-00003/tensors.safetensors").read_bytes()[:1000]
    assert b"model.2.weight" in header  # the one linear layer


def test_a_method_trains_a_model_of_its_name(run: tuple[Path, str]) -> None:
    experiment, printed = run
    assert "expert smooth: done" in printed
    assert set(_table(experiment, "evaluations").query("model == 'smooth'").attack) >= {"clean", "fgsm", "pgd", "dark"}


def test_a_defence_trains_its_models_in_their_order(run: tuple[Path, str]) -> None:
    experiment, printed = run
    lines = printed.splitlines()
    ends = [
        next(i for i, line in enumerate(lines) if line.startswith(f"{job}: done"))
        for job in ("expert parent", "joint child")
    ]
    assert ends == sorted(ends)
    metrics = _table(experiment, "metrics")
    last = metrics[metrics.model == "parent"].loss.iloc[-1]
    assert metrics[metrics.model == "child"].loss.iloc[0] < last  # it starts from its parent's weights


def test_a_suite_fills_its_column_with_its_attack(run: tuple[Path, str]) -> None:
    experiment, printed = run
    evaluations = _table(experiment, "evaluations")
    assert len(evaluations[evaluations.attack == "dark"]) == evaluations.model.nunique()
    assert "dark" in printed


def test_a_check_is_counted_and_reported(run: tuple[Path, str]) -> None:
    experiment, printed = run
    assert _table(experiment, "checks").query("check == 'large'").fired.all()
    assert "warning: mixture, large: outputs are larger than nothing" in printed


def test_a_masked_defence_is_found_in_a_whole_run(run: tuple[Path, str]) -> None:
    experiment, printed = run
    checks = _table(experiment, "checks").query("model == 'masked'").set_index("check")
    fired = set(checks.index[checks.fired])
    assert {"black_box", "huge_epsilon", "stronger"} <= fired, checks.meaning.tolist()
    assert checks.could_fire[checks.fired].all()
    assert "made on 5 other models" in checks.meaning["transfer"]
    assert "the strongest beside it is dark" in checks.meaning["stronger"]
    assert "warning: masked, black_box: a black-box attack" in printed


def test_a_data_set_is_read_with_its_number_of_classes(run: tuple[Path, str]) -> None:
    experiment, _ = run
    assert set(_table(experiment, "predictions").label) == set(range(7))
    assert set(_table(experiment, "jobs").dataset) == {"stripes"}


def test_a_figure_is_drawn_beside_the_others_and_in_the_report(run: tuple[Path, str]) -> None:
    experiment, printed = run
    assert "counts.pdf" in printed
    assert "One bar for each model." in (experiment.parents[1] / "report.html").read_text()


def test_controls_have_rows_and_are_reported_without_being_trained(run: tuple[Path, str]) -> None:
    experiment, printed = run
    controls = {"uniform", "joint-benign", "joint-fgsm-1", "joint-pgd-1", "joint-uniform"}
    evaluations, jobs = _table(experiment, "evaluations"), _table(experiment, "jobs")
    assert controls < set(evaluations.model)
    assert not controls & set(_table(experiment, "metrics").model)
    assert set(jobs[jobs.model.isin(controls)].stage) == {"evaluate"}
    predictions = _table(experiment, "predictions")
    weights = [gate for model in ("uniform", "joint-uniform") for gate in predictions[predictions.model == model].gate]
    assert all(gate.tolist() == pytest.approx([1 / 3] * 3) for gate in weights)
    assert predictions[predictions.model == "joint-pgd-1"].gate.isna().all()
    attacks = {model: set(rows.attack) for model, rows in evaluations.groupby("model")}
    assert attacks["joint-uniform"] == attacks["mixture"]
    report = (experiment.parents[1] / "report.html").read_text()
    assert all(name in report and name in printed for name in controls)
