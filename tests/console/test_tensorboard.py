"""TensorBoard event files, read back with TensorBoard itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dwf_cluster.cluster.events import Ended, Epoch
from dwf_cluster.console.tensorboard import SCALARS, EventFiles
from dwf_cluster.data.registry import Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import EXPERTS, Job, jobs
from dwf_cluster.settings import InvalidInput


@pytest.fixture
def job(tiny: Experiment) -> Job:
    """The training of pgd-1."""
    return jobs(tiny, EXPERTS, Sizes(96, 40, (1, 8, 8)))[0]


def _epoch(job: Job, epoch: int, **changed: object) -> Epoch:
    return Epoch(job, {"model": "pgd-1", "epoch": epoch, **dict.fromkeys(SCALARS, epoch / 4)} | changed)


def _curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_each_column_is_a_curve_over_epochs(tmp_path: Path, job: Job) -> None:
    files = EventFiles(tmp_path / "tensorboard")
    for epoch in (1, 2, 3):
        files(_epoch(job, epoch))
    files(Ended(job, "done"))
    for name in SCALARS:
        curve = _curve(tmp_path / "tensorboard" / job.folder / "pgd-1", name)
        assert curve == [(1, 0.25), (2, 0.5), (3, 0.75)]


@pytest.mark.parametrize("epochs", [(1,), (1, 2, 3)])
def test_a_resumed_run_has_each_epoch_once(tmp_path: Path, job: Job, epochs: tuple[int, ...]) -> None:
    first = EventFiles(tmp_path)
    for epoch in (1, 2):
        first(_epoch(job, epoch))
    resumed = EventFiles(tmp_path)
    for epoch in epochs:
        resumed(_epoch(job, epoch))
    assert [step for step, _ in _curve(tmp_path / job.folder / "pgd-1", "loss")] == list(epochs)


def test_a_full_disk_is_one_error(small_disk: Path, job: Job) -> None:
    files = EventFiles(small_disk / "tensorboard")
    files(_epoch(job, 1))
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "rest").write_bytes(bytes(2 << 20))

    def write() -> None:
        for epoch in range(2, 100):
            files(_epoch(job, epoch))

    with pytest.raises(OSError, match="No space left on device; no more event files"):
        write()
    write()  # later epochs are ignored


def test_a_file_in_place_of_a_folder_is_one_error(tmp_path: Path, job: Job) -> None:
    files = EventFiles(tmp_path)
    (tmp_path / job.folder).write_text("not a folder")
    with pytest.raises(OSError, match=f"^{re.escape(str(tmp_path / job.folder))}"):
        files(_epoch(job, 1))
    files(_epoch(job, 2))  # later epochs are ignored


@pytest.mark.parametrize("model", ["../../victim", "/victim", "..", "", "other", None])
def test_a_model_that_a_row_names_never_becomes_a_path(tmp_path: Path, job: Job, model: str | None) -> None:
    model = model and model.replace("/victim", f"{tmp_path}/victim")
    files = EventFiles(tmp_path / "a" / "b" / "tensorboard")
    with pytest.raises(ValueError, match=re.escape(repr(model))):
        files(_epoch(job, 1, model=model))
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "tensorboard"]


@pytest.mark.parametrize("folder", ["file/below", "s3://bucket/tensorboard", "full"])
def test_a_folder_that_cannot_be_used_is_bad_input(
    folder: str, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "full").symlink_to(small_disk)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "rest").write_bytes(bytes(2 << 20))
    with pytest.raises(InvalidInput, match=r"--tensorboard: '.*' cannot be used: "):
        EventFiles(Path(folder))


def test_missing_values_are_left_out(tmp_path: Path, job: Job) -> None:
    files = EventFiles(tmp_path)
    files(_epoch(job, 1, learning_rate=None))
    files(_epoch(job, 2))
    assert _curve(tmp_path / job.folder / "pgd-1", "learning_rate") == [(2, 0.5)]
