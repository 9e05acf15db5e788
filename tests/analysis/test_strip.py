"""The strip shows the attack, predictions and gate weights of the evaluation. Needs torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from analysis import load, strip
from dwf_cluster.experiment import Experiment
from dwf_cluster.presets import build
from tests.analysis.conftest import Call

torch = pytest.importorskip("torch")


@pytest.fixture
def experiment() -> Experiment:
    small = ["data.train_examples=64", "data.test_examples=8", "model.width=4", "experts.fgsm=1", "experts.pgd=0"]
    return build("digits", 0, [*small, "evaluation.pgd_steps=1,3", "evaluation.beyond=", "evaluation.restart_steps=3"])


@pytest.fixture
def folder(tmp_path: Path, experiment: Experiment) -> Path:
    """An experiment's folder with a checkpoint of the mixture; its weights are those before training."""
    from dwf_cluster.store import checkpoints

    store = experiment.store(str(tmp_path / "runs"))
    store.write("experiment.json", experiment.to_json().encode())
    tensors = {f"model.{name}": tensor for name, tensor in _mixture(experiment, tmp_path).state_dict().items()}
    checkpoints.save(store, "mixture", experiment.joint.epochs, 0, tensors, {})
    return Path(store.root)


def _mixture(experiment: Experiment, data_folder: Path) -> torch.nn.Module:
    from dwf_cluster.data import sources
    from dwf_cluster.defences.build import untrained

    images = sources.load(experiment.data, data_folder).format
    *experts, mixture = experiment.models
    parents = {spec.name: untrained(spec, images, experiment.seed, {}) for spec in experts}
    return untrained(mixture, images, experiment.seed, parents)


def test_the_strip_shows_what_the_evaluation_measures(folder: Path, experiment: Experiment, tmp_path: Path) -> None:
    from dwf_cluster.data import sources
    from dwf_cluster.evaluation.run import evaluate

    images = sources.load(experiment.data, tmp_path)
    _, rows = evaluate(
        {"mixture": _mixture(experiment, tmp_path)},
        "mixture",
        "paper",
        images.x_test,
        images.y_test,
        experiment.evaluation,
        experiment.threats,
        seed=experiment.seed,
        device=torch.device("cpu"),
    )
    shown = strip.attack(load(str(folder)).groups[0].runs[0], tmp_path)
    assert shown.steps == 3
    for i, (name, steps) in enumerate((("clean", None), ("pgd", 3))):
        measured = [row for row in rows if row["attack"] == name and row["steps"] == steps][: strip.IMAGES]
        assert shown.prediction[i].tolist() == [row["prediction"] for row in measured]
        assert shown.gate[i] == pytest.approx(np.array([row["gate"] for row in measured]), abs=1e-5)
    assert np.abs(shown.x[1] - shown.x[0]).max() == pytest.approx(3 * experiment.pgd.step_size, abs=1e-6)


def test_the_command_draws_the_strip(folder: Path, tmp_path: Path, call: Call) -> None:
    out = tmp_path / "strip.png"
    assert call(strip.main, folder, "--out", out) == (0, f"{out}\n", "")
    assert imread(out).std() > 0.1


def test_a_missing_checkpoint_and_an_unknown_file_format_are_one_line(folder: Path, call: Call) -> None:
    for checkpoint in folder.glob("checkpoints/*/*/manifest.json"):
        checkpoint.unlink()
    for arguments, expected in ([folder], "no checkpoint"), ([folder, "--out", "strip.gif"], "strip.gif"):
        status, _, err = call(strip.main, *arguments)
        assert status == 2
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert expected in line
