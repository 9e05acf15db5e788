"""A finished experiment with damaged, replaced or malicious files: launched again, and listed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dwf_cluster import status
from dwf_cluster.launch import main
from dwf_cluster.presets import build
from dwf_cluster.store.lock import Owner

from .conftest import ARGUMENTS, LONG_EPOCHS, TINY


@pytest.fixture
def finished(reference_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> Path:
    """A copy of a finished experiment in its own storage."""
    return Path(shutil.copytree(reference_run[0], tmp_path / "runs" / reference_run[0].name))


def _launch(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str], list[str]]:
    """Run the command of the experiment again; return its exit status and the lines of stdout and stderr."""
    code = main([*ARGUMENTS, "--storage", str(folder.parent), *options])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def _folder(name: str) -> Callable[[Path], Path]:
    """Replace a file of that name by a folder, such as Spark and Dask write for Parquet."""

    def make(experiment: Path) -> Path:
        (path,) = list(experiment.glob(name)) or [experiment / name]
        path.unlink(missing_ok=True)
        path.mkdir()
        (path / "part-00000.parquet").write_bytes(b"PAR1")
        return path

    return make


def _pipe(name: str) -> Callable[[Path], Path]:
    def make(experiment: Path) -> Path:
        (path,) = list(experiment.glob(name)) or [experiment / name]
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        return path

    return make


def test_a_finished_experiment_is_skipped(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _launch(finished, capsys)
    assert (code, err) == (0, [])
    assert out[-1] == str(finished)


FOLDER, PIPE = "cannot be read: Is a directory", "cannot be read: not a regular file"
TABLE_FOLDER = (
    "not the Parquet file that was written (it is a folder); remove it, and the same command computes it again"
)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_folder("lease/00001.json"), FOLDER),
        (_pipe("lease/00001.json"), PIPE),
        (_folder("results/evaluations/x.parquet"), TABLE_FOLDER),
        (_pipe("results/evaluations/x.parquet"), PIPE),
        (_folder("results/checks/x.parquet"), TABLE_FOLDER),
        (_folder("checkpoints/pgd-1/epoch-00003/manifest.json"), FOLDER),
        (_pipe("checkpoints/pgd-1/epoch-00003/manifest.json"), PIPE),
    ],
    ids=["lease", "lease-pipe", "evaluations", "evaluations-pipe", "checks", "manifest", "manifest-pipe"],
)
def test_a_launch_names_a_folder_or_pipe_in_place_of_a_file(
    finished: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], Path], reason: str
) -> None:
    path = damage(finished)
    code, _, err = _launch(finished, capsys)
    assert code == 1
    first, second = err
    assert first == f"failed: {path}: {reason}"
    assert second.startswith("resume: python -m dwf_cluster.launch ")


def test_a_dry_run_names_a_folder_among_the_jobs(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _folder("results/jobs/expert-pgd-1.parquet")(finished)
    code, _, err = _launch(finished, capsys, "--dry-run")
    assert code == 1
    assert err[0] == f"failed: {path}: {TABLE_FOLDER}"


def test_a_launch_ignores_other_files_in_a_table(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished / "results" / "evaluations" / "README").write_text("hello")
    assert _launch(finished, capsys)[0] == 0


def test_a_launch_escapes_the_owner_in_a_lock(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / build("digits", None, [*TINY, *LONG_EPOCHS]).folder
    owner = json.loads(Owner.current().model_dump_json())
    owner |= {"host": "\x1b]0;owned\x07\x1b[2J\u202e", "machine": "another", "job": "\n7"}
    (folder / "lease").mkdir(parents=True)
    (folder / "lease" / "00001.json").write_text(json.dumps(owner))
    code, _, err = _launch(folder, capsys)
    assert code == 1
    assert err[0].startswith(f"failed: {folder.name} is being run by \\x1b]0;owned\\x07\\x1b[2J\\u202e (process ")
    assert all(line.isprintable() for line in err)


def test_a_launch_escapes_the_meaning_of_a_check(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = next((finished / "results" / "checks").glob("*mixture*"))
    rows = pq.read_table(path)
    for name, value in (("meaning", "\x1b]0;owned\x07\u202e"), ("fired", True)):
        position = rows.schema.get_field_index(name)
        rows = rows.set_column(position, rows.schema.field(name), pa.array([value] * len(rows)))
    pq.write_table(rows, path)
    code, out, _ = _launch(finished, capsys)
    assert code == 0
    assert any("\\x1b]0;owned\\x07\\u202e" in line for line in out)
    assert not any("\x1b" in line or "\x07" in line or "\u202e" in line for line in out)


def test_status_lists_a_finished_experiment(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(finished.parent)]) == 0
    assert f"{finished.name}  done " in capsys.readouterr().out
