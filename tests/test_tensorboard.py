"""TensorBoard event files, read back with TensorBoard itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dwf_cluster.tensorboard import SCALARS, EventFiles


def _row(epoch: int) -> dict[str, object]:
    return {"model": "pgd-1", "epoch": epoch, **dict.fromkeys(SCALARS, epoch / 4)}


def _curve(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_each_column_is_a_curve_over_epochs(tmp_path: Path) -> None:
    files = EventFiles(tmp_path / "tensorboard")
    for epoch in (1, 2, 3):
        files.add("digits-seed0-0123456789", _row(epoch))
    for name in SCALARS:
        curve = _curve(tmp_path / "tensorboard" / "digits-seed0-0123456789" / "pgd-1", name)
        assert curve == [(1, 0.25), (2, 0.5), (3, 0.75)]


@pytest.mark.parametrize("epochs", [(1,), (1, 2, 3)])
def test_a_run_that_goes_on_tells_of_all_epochs_once(tmp_path: Path, epochs: tuple[int, ...]) -> None:
    before = EventFiles(tmp_path)
    for epoch in (1, 2):
        before.add("digits-seed0-0123456789", _row(epoch))
    again = EventFiles(tmp_path)
    for epoch in epochs:
        again.add("digits-seed0-0123456789", _row(epoch))
    assert [step for step, _ in _curve(tmp_path / "digits-seed0-0123456789" / "pgd-1", "loss")] == list(epochs)
