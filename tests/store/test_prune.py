"""`status --prune` lists and, after asking, removes what no run needs; what other experiments refer to stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dwf_cluster import status
from dwf_cluster.store import Store, checkpoints, lock

FIRST, SECOND = "digits-seed0-0123456789", "digits-seed1-0123456789"


def _train(store: Store, model: str, epochs: int, planned: int) -> None:
    """Save the checkpoints of the first epochs of a training, the newest with momentum, as earlier versions did."""
    for epoch in range(1, epochs + 1):
        tensors = {"model.x": torch.full((100,), float(epoch)), "momentum.x": torch.ones(100)}
        checkpoints.save(store, model, epoch, 0, tensors, {"epochs": planned})


def _prune(folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> list[str]:
    assert status.main([str(folder), "--prune", *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_prune_keeps_only_the_newest_weights_of_trained_models(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(str(tmp_path), FIRST)
    _train(store, "mixture", 3, planned=3)
    _train(store, "pgd-1", 2, planned=3)
    folder = store.path("checkpoints/joint/epoch-0000")
    listed = _prune(tmp_path, capsys)
    assert [line.split("  ")[::2] for line in listed[:2]] == [
        [f"{folder}2", "older checkpoint of a trained model"],
        [f"{folder}3", "momentum of a trained model"],
    ]
    assert listed[1].split("  ")[1] == "400 bytes"
    assert listed[2].startswith("nothing was removed: --yes removes these ")
    assert store.names("checkpoints/joint") == ["epoch-00002", "epoch-00003"]
    assert _prune(tmp_path, capsys, "--yes")[-1].startswith("removed: ")
    last = checkpoints.load_trained(store, "mixture", 3)
    assert list(last.tensors) == ["model.x"]
    assert torch.equal(last.tensors["model.x"], torch.full((100,), 3.0))
    assert store.names("checkpoints/joint") == ["epoch-00003"]
    assert store.names("checkpoints/pgd-1") == ["epoch-00001", "epoch-00002"]
    assert _prune(tmp_path, capsys, "--yes") == ["nothing to remove"]


def test_prune_keeps_checkpoints_that_another_experiment_refers_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = Store(str(tmp_path), FIRST), Store(str(tmp_path), SECOND)
    _train(first, "pgd-1", 3, planned=3)
    checkpoints.refer(first, second, "pgd-1")
    _prune(tmp_path, capsys, "--yes")
    assert first.names("checkpoints/pgd-1") == ["epoch-00003"]
    for store in (first, second):
        assert "momentum.x" in checkpoints.load_trained(store, "pgd-1", 3).tensors


def test_prune_removes_nothing_of_a_running_experiment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(str(tmp_path), FIRST)
    _train(store, "pgd-1", 3, planned=3)
    lock.acquire(store, pid=os.getpid())
    assert _prune(tmp_path, capsys, "--yes") == [
        f"{store.root}  is being run: nothing of it is removed",
        "nothing to remove",
    ]


def test_prune_asks_on_a_terminal_and_removes_after_yes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(str(tmp_path), FIRST)
    _train(store, "pgd-1", 3, planned=3)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    for answer, remaining in (("", 2), ("no", 2), ("y", 1)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
        _prune(tmp_path, capsys)
        assert len(store.names("checkpoints/pgd-1")) == remaining


def test_prune_refuses_a_storage_without_experiments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main([str(tmp_path / "none"), "--prune"]) == 2
    assert capsys.readouterr().err.startswith("error: storage: ")
