"""A finished experiment whose files somebody has damaged, replaced or made hostile: launched again, and listed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from dwf_cluster import status
from dwf_cluster.experiment import build
from dwf_cluster.launch import main
from dwf_cluster.store.lock import Owner

from .conftest import ARGUMENTS, LONG_EPOCHS, TINY


@pytest.fixture
def done(reference_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> Path:
    """A copy of a finished experiment, in a storage of its own."""
    return Path(shutil.copytree(reference_run[0], tmp_path / "runs" / reference_run[0].name))


def _launch(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, list[str], list[str]]:
    """Exit status, and the lines of stdout and stderr, of the command that made the experiment."""
    code = main([*ARGUMENTS, "--storage", str(folder.parent), *options])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err.splitlines()


def _folder(name: str) -> Callable[[Path], Path]:
    """Put a folder, as Spark and Dask write their Parquet, where a file of that name is."""

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


def test_a_finished_experiment_is_skipped(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _launch(done, capsys)
    assert (code, err) == (0, [])
    assert out[-1] == str(done)


FOLDER, PIPE = "cannot be read: Is a directory", "cannot be read: not a regular file"
TABLE_FOLDER = "not the Parquet file that was written (it is a folder); remove it, and it is made anew"


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
def test_what_is_no_file_is_named(
    done: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], Path], reason: str
) -> None:
    path = damage(done)
    code, _, err = _launch(done, capsys)
    assert code == 1
    first, second = err
    assert first == f"failed: {path}: {reason}"
    assert second.startswith("resume: python -m dwf_cluster.launch ")


def test_a_folder_among_the_jobs_is_named_by_the_plan(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = _folder("results/jobs/expert-pgd-1.parquet")(done)
    code, _, err = _launch(done, capsys, "--dry-run")
    assert code == 1
    assert err[0] == f"failed: {path}: {TABLE_FOLDER}"


def test_a_file_that_is_no_table_is_left_alone(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (done / "results" / "evaluations" / "README").write_text("hello")
    assert _launch(done, capsys)[0] == 0


def test_the_owner_in_a_lock_reaches_no_terminal_unescaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "runs" / build("digits", None, [*TINY, *LONG_EPOCHS]).folder
    owner = json.loads(Owner.me().model_dump_json())
    owner |= {"host": "\x1b]0;owned\x07\x1b[2J\u202e", "machine": "another", "job": "\n7"}
    (folder / "lease").mkdir(parents=True)
    (folder / "lease" / "00001.json").write_text(json.dumps(owner))
    code, _, err = _launch(folder, capsys)
    assert code == 1
    assert err[0].startswith(f"failed: {folder.name} is being run by \\x1b]0;owned\\x07\\x1b[2J\\u202e (process ")
    assert all(line.isprintable() for line in err)


def test_the_meaning_of_a_check_reaches_no_terminal_unescaped(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = next((done / "results" / "checks").glob("*mixture*"))
    rows = pq.read_table(path)
    for name, value in (("meaning", "\x1b]0;owned\x07\u202e"), ("fired", True)):
        position = rows.schema.get_field_index(name)
        rows = rows.set_column(position, rows.schema.field(name), pa.array([value] * len(rows)))
    pq.write_table(rows, path)
    code, out, _ = _launch(done, capsys)
    assert code == 0
    assert any("\\x1b]0;owned\\x07\\u202e" in line for line in out)
    assert not any("\x1b" in line or "\x07" in line or "\u202e" in line for line in out)


def test_a_finished_run_is_listed(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(done.parent)]) == 0
    assert f"{done.name}  done " in capsys.readouterr().out
