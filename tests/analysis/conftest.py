"""Synthetic results that agree between their tables, and groups read from them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import pytest

from analysis import Group, load
from analysis.figures import FigureData
from analysis.predictions import Predictions, read_predictions
from analysis.statistics import comparisons
from analysis.tables import accuracies
from benchmarks.analysis import make_up
from dwf_cluster.presets import build

from .. import PATIENCE

ROOT = Path(__file__).parents[2]
EXAMPLES = 400
CURVES = ["evaluation.curve_multiples=0.25,1,4", "evaluation.curve_steps=20", "evaluation.curve_restarts=3"]
FEW = ["experts.fgsm=1", "experts.pgd=2", "evaluation.beyond=pgd_gate,noise,transfer,experts,curves", *CURVES]

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10 with three seeds, and digits with one."""
    folder = tmp_path_factory.mktemp("analysis") / "runs"
    for seed in range(3):
        make_up(folder, build("cifar10", seed, FEW), EXAMPLES)
    make_up(folder, build("digits", 0, ["experts.fgsm=1", "experts.pgd=1", "evaluation.beyond="]), 100)
    return folder


@pytest.fixture(scope="session")
def cifar10(storage: Path) -> Group:
    return load(str(storage)).groups[0]


@pytest.fixture(scope="session")
def digits(storage: Path) -> Group:
    return load(str(storage)).groups[1]


@pytest.fixture(scope="session")
def predictions(cifar10: Group) -> Predictions:
    return read_predictions(cifar10)


@pytest.fixture(scope="session")
def measured(cifar10: Group) -> pd.DataFrame:
    return accuracies(cifar10)


@pytest.fixture(scope="session")
def tests(cifar10: Group, predictions: Predictions) -> pd.DataFrame:
    return comparisons(cifar10, predictions)


@pytest.fixture(scope="session")
def data(cifar10: Group, measured: pd.DataFrame, predictions: Predictions) -> FigureData:
    return FigureData(cifar10, measured, predictions)


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Call the `main` of a command line in this process; return exit status, stdout, stderr."""

    def call_main(main: Callable[[Sequence[str]], int], *arguments: str | Path) -> tuple[int, str, str]:
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return call_main


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run `python -m <module> ...` as a user does, in an empty folder."""

    def command(module: str, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", module, *map(str, arguments)],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", **variables},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    return command
