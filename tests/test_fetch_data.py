"""`--fetch-data` on a login node, and the warning of a SLURM job whose data set is missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from dwf_cluster.launch import main

from .conftest import write_npz

MISSING = (
    "warning: svhn is not in elsewhere; if compute nodes have no network, run this on the login node first: "
    "python -m dwf_cluster.launch --fetch-data --preset svhn --data-folder elsewhere\n"
)
SVHN = ["--preset", "svhn", "--data-folder", "elsewhere"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in, without a network."""
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("where", [[], ["--slurm", "--nodes", "2"], ["--local"]], ids=["alone", "slurm", "local"])
def test_fetch_data_verifies_the_data_set_and_runs_nothing(
    where: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--fetch-data", *where]) == 0
    assert capsys.readouterr() == ("digits: verified; data folder: data\n", "")
    assert list(folder.iterdir()) == []


def test_fetch_data_verifies_own_images_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = write_npz(folder / "images.npz")
    assert main(["--fetch-data", "--preset", "images.npz"]) == 0
    images.write_bytes(images.read_bytes()[:-200])
    assert main(["--fetch-data", "--preset", "images.npz"]) == 2
    assert capsys.readouterr().err.startswith("error: images.npz: not an .npz file of plain arrays")


def test_fetch_data_without_a_network_fails_in_one_line_and_names_the_command_to_repeat(
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--preset", "cifar10", "--set", "data.source=svhn", "--data-folder", "elsewhere"]
    assert main(["--fetch-data", *options]) == 1
    failure, resume = capsys.readouterr().err.splitlines()
    assert failure.startswith("failed: SVHN is not in elsewhere and cannot be downloaded")
    assert resume == f"resume: python -m dwf_cluster.launch --fetch-data {' '.join(options)}"


def test_slurm_warns_of_a_missing_data_set_and_continues(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--slurm", "--dry-run", *SVHN]) == 0
    script, warning = capsys.readouterr()
    assert warning == MISSING
    assert "#SBATCH" in script


def test_the_warning_names_a_command_that_fetches_the_data_set_of_the_same_experiment(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--slurm", "--dry-run", "--set", "data.source=svhn", "experts.epochs=3"]) == 0
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert warning.endswith("--fetch-data --preset digits --data-folder data --set data.source=svhn\n")


def test_slurm_does_not_warn_of_a_data_set_that_exists(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_npz(folder / "images.npz")
    for preset in ("digits", "images.npz"):
        assert main(["--slurm", "--dry-run", "--preset", preset]) == 0
        assert capsys.readouterr().err == ""


def test_a_run_in_a_slurm_job_warns_of_a_missing_data_set_and_tries_the_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert main(["--local", "--gpus", "0", *SVHN]) == 1
    warning, failure, _ = capsys.readouterr().err.splitlines(keepends=True)
    assert warning == MISSING
    assert failure.startswith("failed: SVHN is not in elsewhere and cannot be downloaded")
