"""Fixtures and helpers of many tests: a tiny experiment, small images, launches, and comparison of experiments."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dwf_cluster.data import sources
from dwf_cluster.defences.build import untrained
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import EXPERTS, JOINT
from dwf_cluster.presets import build
from dwf_cluster.store import Store, checkpoints, retry
from dwf_cluster.training.loop import Task
from dwf_cluster.training.probe import Probe

from .process import Launch

TINY = [
    "data.train_examples=96",
    "data.test_examples=40",
    "model.width=4",
    "gate.hidden=8",
    "experts.fgsm=1",
    "experts.pgd=1",
    "experts.epochs=3",
    "experts.batch_size=32",
    "joint.epochs=2",
    "joint.batch_size=32",
    "pgd.steps=1,2",
    "evaluation.pgd_steps=1,2",
    "evaluation.restarts=2",
    "evaluation.restart_steps=2",
    "evaluation.adaptive_steps=2",
    "evaluation.beyond=pgd_gate,pgd_expert,transfer,noise,experts",
    "evaluation.check_examples=8",
    "evaluation.batch_size=24",
    "evaluation.shard_examples=24",
    "evaluation.probe_examples=40",
    "evaluation.probe_steps=2",
    "save_adversarial=uint8",
]
"""Assignments with which the digits preset takes seconds: three experts, 96 images."""


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Skip tests that need more GPUs than there are: `cuda` needs one, `cuda(2)` two."""
    marked = [(item, marker) for item in items if (marker := item.get_closest_marker("cuda"))]
    gpus = torch.cuda.device_count() if marked else 0
    for item, marker in marked:
        needed = marker.args[0] if marker.args else 1
        if gpus < needed:
            item.add_marker(pytest.mark.skip(reason="needs a GPU" if needed == 1 else f"needs {needed} GPUs"))


@pytest.fixture(autouse=True, scope="session")
def _default_interrupt_handler() -> None:
    """A shell starts background jobs with SIGINT ignored, nohup with SIGHUP; child processes inherit that; undo it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Experiment:
    return build("digits", 0, TINY)


@pytest.fixture
def images(tiny: Experiment) -> sources.Images:
    return sources.load(tiny.data, Path())


@pytest.fixture
def store(tmp_path: Path, tiny: Experiment) -> Store:
    return tiny.store(str(tmp_path))


class RetryClock:
    """Replaces `time` in `store.retry`: only pauses take time, so the number of attempts depends on no machine."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """The sum of all pauses so far."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Advance the clock."""
        self.now += seconds


@pytest.fixture
def retry_clock(monkeypatch: pytest.MonkeyPatch) -> RetryClock:
    clock = RetryClock()
    monkeypatch.setattr(retry, "time", clock)
    return clock


def write_npz(path: Path, **changed: np.ndarray | None) -> Path:
    """Write an .npz data set of 64 + 16 colour images of 8x8 in three classes; None omits an array."""
    random = np.random.default_rng(0)
    y_train, y_test = np.arange(64) % 3, np.arange(16) % 3
    arrays = {
        "x_train": (random.integers(0, 120, (64, 8, 8, 3)) + y_train[:, None, None, None] * 60).astype(np.uint8),
        "y_train": y_train,
        "x_test": (random.integers(0, 120, (16, 8, 8, 3)) + y_test[:, None, None, None] * 60).astype(np.uint8),
        "y_test": y_test,
    } | changed
    present: dict[str, Any] = {name: array for name, array in arrays.items() if array is not None}
    np.savez(path, **present)
    return path


class InDouble(nn.Module):
    """A model in double precision that accepts images in single precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(x.double())
        return logits


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The mount point of a file system of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


MODELS = ["benign", "fgsm-1", "pgd-1", "mixture"]
LOCAL = ["--local", "--cpus", "2", "--gpus", "0"]
LONG_EPOCHS = ["data.train_examples=700", "experts.epochs=3", "joint.epochs=3", "joint.batch_size=96", "pgd.steps=6,8"]
ARGUMENTS = [*LOCAL, "--set", *TINY, *LONG_EPOCHS]
"""Arguments of a launch whose epochs take a second or two, long enough to be interrupted."""
NO_MIXTURE = shutil.ignore_patterns("joint*", "mixture*", "*evaluate-*", "lease", "status.json")
"""For `shutil.copytree`: copies of an experiment's folder as it is when the experts have been trained."""
TIMING_COLUMNS = {
    "metrics": ["seconds", "images_per_second"],
    "evaluations": ["seconds"],
    "predictions": [],
    "shards": ["seconds"],
    "checks": [],
}


@pytest.fixture(scope="session")
def reference_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The experiment's folder of a run that was not interrupted, and the finished process with its output."""
    launch = Launch(tmp_path_factory.mktemp("reference_run"))
    result = launch(*ARGUMENTS)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1]), result


def store_of(folder: Path | str) -> Store:
    """The store of an experiment's folder or URL."""
    url, _, name = str(folder).rpartition("/")
    return Store(url, name)


def rows_of(store: Store, table: str) -> pd.DataFrame:
    """A table's rows, except for timings, in an order that depends on no run."""
    frame = pd.read_parquet(store.path(f"results/{table}"))
    keys = ("epoch", "attack", "source", "epsilon", "steps", "first", "example", "check")
    columns = ["model", *(c for c in keys if c in frame)]
    return frame.sort_values(columns, ignore_index=True).drop(columns=TIMING_COLUMNS[table])


def assert_same(
    folder: Path | str, other: Path | str, models: Sequence[str] = MODELS, tables: Iterable[str] = TIMING_COLUMNS
) -> None:
    """Assert that two experiments' folders have the same weights and, except for timings, the same rows."""
    stores = [store_of(folder), store_of(other)]
    for model in models:
        first, second = (checkpoints.load_latest(store, model) for store in stores)
        assert first is not None
        assert second is not None
        assert first.epoch == second.epoch
        assert first.tensors.keys() == second.tensors.keys()
        for name, tensor in first.tensors.items():
            assert torch.equal(tensor, second.tensors[name]), (model, name)
    for table in tables:
        first_rows, second_rows = (
            frame[frame.model.isin(models)] for frame in (rows_of(store, table) for store in stores)
        )
        pd.testing.assert_frame_equal(first_rows.reset_index(drop=True), second_rows.reset_index(drop=True))


@pytest.fixture(scope="session")
def two_worker_run(
    reference_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The experiment's folder of a run with the same experts, whose joint stage had two workers."""
    launch = Launch(tmp_path_factory.mktemp("two_worker_run"))
    shutil.copytree(reference_run[0], launch.folder / "runs" / reference_run[0].name, ignore=NO_MIXTURE)
    result = launch("--stages", "joint,evaluate", "--joint-workers", "2", *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])


def untrained_model(experiment: Experiment, images: sources.Images, name: str) -> nn.Module:
    """A model of an experiment before its training, as are its parents."""
    spec = experiment.spec(name)
    parents = {parent: untrained_model(experiment, images, parent) for parent in spec.parents}
    return untrained(spec, images.format, experiment.seed, parents)


def task_for(experiment: Experiment, store: Store, model: str, **options: Any) -> Task:
    """The training of a model of an experiment, as the pipeline runs it; `options` are those of `Task`."""
    spec, evaluation = experiment.spec(model), experiment.evaluation
    probe = Probe(experiment.threat, evaluation.probe_steps, evaluation.probe_examples, evaluation.random_start)
    stage = JOINT if spec.parents else EXPERTS
    return Task(spec, stage, experiment.seed, probe, experiment.checkpoint_minutes, store, **options)
