"""TensorBoard event files, read back with TensorBoard itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dwf_cluster.console.tensorboard import SCALARS, EventFiles
from dwf_cluster.settings import InvalidInput

EXPERIMENT = "digits-seed0-0123456789"


def _row(epoch: int, model: str | None = "pgd-1") -> dict[str, object]:
    return {"model": model, "epoch": epoch, **dict.fromkeys(SCALARS, epoch / 4)}


def _files(folder: Path, warnings: list[str] | None = None) -> EventFiles:
    told = [] if warnings is None else warnings
    return EventFiles(folder, {EXPERIMENT: ("pgd-1", "mixture")}, lambda channel, reason: told.append(reason))


def _curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_each_column_is_a_curve_over_epochs(tmp_path: Path) -> None:
    files = _files(tmp_path / "tensorboard")
    for epoch in (1, 2, 3):
        files.add(EXPERIMENT, _row(epoch))
    for name in SCALARS:
        curve = _curve(tmp_path / "tensorboard" / EXPERIMENT / "pgd-1", name)
        assert curve == [(1, 0.25), (2, 0.5), (3, 0.75)]


@pytest.mark.parametrize("epochs", [(1,), (1, 2, 3)])
def test_a_run_that_goes_on_tells_of_all_epochs_once(tmp_path: Path, epochs: tuple[int, ...]) -> None:
    before = _files(tmp_path)
    for epoch in (1, 2):
        before.add(EXPERIMENT, _row(epoch))
    again = _files(tmp_path)
    for epoch in epochs:
        again.add(EXPERIMENT, _row(epoch))
    assert [step for step, _ in _curve(tmp_path / EXPERIMENT / "pgd-1", "loss")] == list(epochs)


def test_a_disk_that_is_full_is_a_warning(small_disk: Path) -> None:
    warnings: list[str] = []
    files = _files(small_disk / "tensorboard", warnings)
    files.add(EXPERIMENT, _row(1))
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "rest").write_bytes(bytes(2 << 20))
    for epoch in range(2, 100):
        files.add(EXPERIMENT, _row(epoch))
    (warning,) = warnings
    assert "No space left on device; no more event files" in warning


def test_a_file_where_a_folder_is_needed_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    files = _files(tmp_path, warnings)
    (tmp_path / EXPERIMENT).write_text("not a folder")
    for epoch in (1, 2):
        files.add(EXPERIMENT, _row(epoch))
    (warning,) = warnings
    assert warning.startswith(f"{tmp_path / EXPERIMENT}")


@pytest.mark.parametrize("model", ["../../victim", "/victim", "..", "", "other", None])
def test_only_models_of_the_experiment_become_paths(tmp_path: Path, model: str | None) -> None:
    model = model and model.replace("/victim", f"{tmp_path}/victim")
    warnings: list[str] = []
    files = _files(tmp_path / "a" / "b" / "tensorboard", warnings)
    files.add(EXPERIMENT, _row(1, model))
    (warning,) = warnings
    assert repr(model) in warning
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "tensorboard"]


@pytest.mark.parametrize("folder", ["file/below", "s3://bucket/tensorboard", "full"])
def test_what_cannot_be_used_from_the_start_is_bad_input(
    folder: str, tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "full").symlink_to(small_disk)
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "rest").write_bytes(bytes(2 << 20))
    with pytest.raises(InvalidInput, match=r"--tensorboard: '.*' cannot be used: "):
        _files(Path(folder))


def test_values_that_are_missing_are_left_out(tmp_path: Path) -> None:
    files = _files(tmp_path)
    files.add(EXPERIMENT, _row(1) | {"learning_rate": None})
    files.add(EXPERIMENT, _row(2))
    assert _curve(tmp_path / EXPERIMENT / "pgd-1", "learning_rate") == [(2, 0.5)]
