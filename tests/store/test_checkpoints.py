"""Checkpoints: whole or not there, verified, without pickle."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from dwf_cluster.store import Store, checkpoints


def _save(store: Store, epoch: int, model: str = "pgd-1") -> None:
    tensors = {"model.weight": torch.full((3, 2), float(epoch)), "model.count": torch.tensor(epoch)}
    checkpoints.save(store, model, epoch, 0, tensors, {"epoch": epoch})


def _folder(store: Store, epoch: int, model: str = "pgd-1") -> Path:
    return Path(store.path(f"checkpoints/{model}/epoch-{epoch:05d}"))


def test_what_was_saved_comes_back(store: Store) -> None:
    assert checkpoints.load_latest(store, "pgd-1") is None
    _save(store, 1)
    checkpoint = checkpoints.load_latest(store, "pgd-1")
    assert checkpoint is not None
    assert (checkpoint.epoch, checkpoint.state) == (1, {"epoch": 1})
    assert torch.equal(checkpoint.tensors["model.weight"], torch.ones(3, 2))
    assert checkpoint.tensors["model.count"].dtype == torch.int64


def test_one_from_the_middle_of_an_epoch_lies_between_its_neighbours(store: Store) -> None:
    for epoch, steps in ((3, 0), (3, 17), (3, 105)):
        checkpoints.save(store, "pgd-1", epoch, steps, {"x": torch.tensor(steps)}, {"steps": steps})
    assert store.names("checkpoints/pgd-1") == ["epoch-00003-step-000017", "epoch-00003-step-000105"]
    assert checkpoints.latest_epoch(store, "pgd-1") == 3
    _save(store, 4)
    assert store.names("checkpoints/pgd-1") == ["epoch-00003-step-000105", "epoch-00004"]
    (_folder(store, 4) / "manifest.json").unlink()
    latest = checkpoints.load_latest(store, "pgd-1")
    assert latest is not None
    assert (latest.epoch, latest.state) == (3, {"steps": 105})


def test_the_mixture_lies_in_the_folder_joint(store: Store) -> None:
    _save(store, 1, "mixture")
    assert _folder(store, 1, "joint").is_dir()
    assert checkpoints.latest_epoch(store, "mixture") == 1


def test_state_and_manifest_are_readable_json(store: Store) -> None:
    _save(store, 1)
    assert json.loads((_folder(store, 1) / "state.json").read_text()) == {"epoch": 1}
    manifest = json.loads((_folder(store, 1) / "manifest.json").read_text())
    assert {name: len(entry["sha256"]) for name, entry in manifest.items()} == {
        "tensors.safetensors": 64,
        "state.json": 64,
    }


def test_the_newest_two_are_kept(store: Store) -> None:
    for epoch in range(1, 5):
        _save(store, epoch)
    assert store.names("checkpoints/pgd-1") == ["epoch-00003", "epoch-00004"]


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
def test_a_checkpoint_that_lacks_a_file_does_not_exist(store: Store, file: str) -> None:
    _save(store, 1)
    _save(store, 2)
    (_folder(store, 2) / file).unlink()
    checkpoint = checkpoints.load_latest(store, "pgd-1")
    assert checkpoint is not None
    assert checkpoint.epoch == 1
    assert checkpoints.latest_epoch(store, "pgd-1") == 1


def test_a_damaged_checkpoint_is_passed_over_with_both_named(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    _save(store, 1)
    _save(store, 2)
    path = _folder(store, 2) / "tensors.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        checkpoint = checkpoints.load_latest(store, "pgd-1")
    assert checkpoint is not None
    assert checkpoint.epoch == 1
    assert str(_folder(store, 2)) in caplog.text
    assert str(_folder(store, 1)) in caplog.text
