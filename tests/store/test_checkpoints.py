"""Checkpoints: complete or absent, verified, without pickle."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dwf_cluster.store import Store, checkpoints


def _save(store: Store, epoch: int, model: str = "pgd-1") -> None:
    tensors = {"model.weight": torch.full((3, 2), float(epoch)), "model.count": torch.tensor(epoch)}
    checkpoints.save(store, model, epoch, 0, tensors, {"loss": 0.5})


def _folder(store: Store, epoch: int, model: str = "pgd-1") -> Path:
    return Path(store.path(f"checkpoints/{model}/epoch-{epoch:05d}"))


def test_loading_returns_what_was_saved(store: Store) -> None:
    assert checkpoints.load_latest(store, "pgd-1") is None
    _save(store, 1)
    checkpoint = checkpoints.load_latest(store, "pgd-1")
    assert checkpoint is not None
    assert checkpoint.epoch == 1
    experiment = store.folder.rpartition("-")[2]
    assert checkpoint.state == {"experiment": experiment, "model": "pgd-1", "epoch": 1, "steps": 0, "loss": 0.5}
    assert torch.equal(checkpoint.tensors["model.weight"], torch.ones(3, 2))
    assert checkpoint.tensors["model.count"].dtype == torch.int64


def test_a_checkpoint_within_an_epoch_is_ordered_between_whole_epochs(store: Store) -> None:
    for epoch, steps in ((3, 0), (3, 17), (3, 105)):
        checkpoints.save(store, "pgd-1", epoch, steps, {"x": torch.tensor(steps)}, {})
    assert store.names("checkpoints/pgd-1") == ["epoch-00003-step-000017", "epoch-00003-step-000105"]
    assert checkpoints.latest_epoch(store, "pgd-1") == 3
    _save(store, 4)
    assert store.names("checkpoints/pgd-1") == ["epoch-00003-step-000105", "epoch-00004"]
    (_folder(store, 4) / "manifest.json").unlink()
    latest = checkpoints.load_latest(store, "pgd-1")
    assert latest is not None
    assert (latest.epoch, latest.state["steps"]) == (3, 105)


def test_the_mixtures_checkpoints_are_in_the_folder_joint(store: Store) -> None:
    _save(store, 1, "mixture")
    assert _folder(store, 1, "joint").is_dir()
    assert checkpoints.latest_epoch(store, "mixture") == 1


def test_state_and_manifest_are_readable_json(store: Store) -> None:
    _save(store, 1)
    assert json.loads((_folder(store, 1) / "state.json").read_text())["loss"] == 0.5
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
def test_a_folder_without_one_of_the_files_is_not_a_checkpoint(store: Store, file: str) -> None:
    _save(store, 1)
    _save(store, 2)
    (_folder(store, 2) / file).unlink()
    checkpoint = checkpoints.load_latest(store, "pgd-1")
    assert checkpoint is not None
    assert checkpoint.epoch == 1
    assert checkpoints.latest_epoch(store, "pgd-1") == 1


def _flip_a_bit(folder: Path) -> None:
    content = bytearray((folder / "tensors.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "tensors.safetensors").write_bytes(content)


def _truncate(folder: Path) -> None:
    content = (folder / "tensors.safetensors").read_bytes()
    (folder / "tensors.safetensors").write_bytes(content[:-1])


def _remove_state(folder: Path) -> None:
    (folder / "state.json").unlink()


def _swap_a_file(folder: Path) -> None:
    shutil.copy(folder.parent / "epoch-00001" / "tensors.safetensors", folder)


def _swap_with_another_epoch(folder: Path) -> None:
    shutil.copytree(folder.parent / "epoch-00001", folder, dirs_exist_ok=True)


def _swap_with_another_model(folder: Path) -> None:
    shutil.copytree(folder.parent.parent / "pgd-2" / folder.name, folder, dirs_exist_ok=True)


def _swap_with_another_experiment(folder: Path) -> None:
    other = Store(str(folder.parents[3]), "digits-seed1-0123456789")
    _save(other, 2)
    shutil.copytree(_folder(other, 2), folder, dirs_exist_ok=True)


def _write_with_manifest(folder: Path, name: str, content: bytes) -> None:
    """Write a file, and a manifest that matches it."""
    (folder / name).write_bytes(content)
    manifest = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


class _Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("pwned"),))


def _pickle_instead_of_tensors(folder: Path) -> None:
    _write_with_manifest(folder, "tensors.safetensors", pickle.dumps(_Malicious()))


def _torch_pickle_instead_of_tensors(folder: Path) -> None:
    buffer = io.BytesIO()
    torch.save({"model.weight": _Malicious()}, buffer)
    _write_with_manifest(folder, "tensors.safetensors", buffer.getvalue())


def _state_without_identity(folder: Path) -> None:
    _write_with_manifest(folder, "state.json", b"{}")


def _state_that_is_a_list(folder: Path) -> None:
    _write_with_manifest(folder, "state.json", b"[1, 2]")


def _deeply_nested_state(folder: Path) -> None:
    _write_with_manifest(folder, "state.json", b"[" * 200_000)


def _deeply_nested_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"[" * 200_000)


def _manifest_with_wrong_types(folder: Path) -> None:
    (folder / "manifest.json").write_text('{"tensors.safetensors": 1, "state.json": null}')


def _manifest_that_is_no_text(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    "damage",
    [
        _flip_a_bit,
        _truncate,
        _remove_state,
        _swap_a_file,
        _swap_with_another_epoch,
        _swap_with_another_model,
        _swap_with_another_experiment,
        _pickle_instead_of_tensors,
        _torch_pickle_instead_of_tensors,
        _state_without_identity,
        _state_that_is_a_list,
        _deeply_nested_state,
        _deeply_nested_manifest,
        _manifest_with_wrong_types,
        _manifest_that_is_no_text,
    ],
    ids=lambda damage: damage.__name__.strip("_"),
)
def test_a_damaged_checkpoint_is_removed_and_the_older_one_is_used(
    store: Store, damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for epoch in (1, 2):
        _save(store, epoch)
        _save(store, epoch, "pgd-2")
    damage(_folder(store, 2))
    checkpoint = checkpoints.load_latest(store, "pgd-1")
    assert checkpoint is not None
    assert (checkpoint.epoch, checkpoint.tensors["model.count"]) == (1, 1)
    message = checkpoints.discard_damaged(store, "pgd-1")
    assert message == f"damaged checkpoint {_folder(store, 2)} removed; resuming from {_folder(store, 1)}"
    assert store.names("checkpoints/pgd-1") == ["epoch-00001"]
    assert not Path("pwned").exists()


def test_intact_checkpoints_are_kept_and_without_any_training_starts_over(store: Store) -> None:
    _save(store, 1)
    _save(store, 2)
    assert checkpoints.discard_damaged(store, "pgd-1") is None
    _flip_a_bit(_folder(store, 1))
    assert checkpoints.discard_damaged(store, "pgd-1") is None  # the newer one is intact
    _flip_a_bit(_folder(store, 2))
    message = checkpoints.discard_damaged(store, "pgd-1")
    assert message is not None
    assert message.endswith("removed; starting over")
    assert checkpoints.load_latest(store, "pgd-1") is None


def test_loading_a_trained_model_fails_if_its_last_checkpoint_is_damaged(store: Store) -> None:
    _save(store, 2)
    _save(store, 3)
    assert checkpoints.load_trained(store, "pgd-1", 3).epoch == 3
    _flip_a_bit(_folder(store, 3))
    with pytest.raises(checkpoints.CheckpointLost) as lost:
        checkpoints.load_trained(store, "pgd-1", 3)
    assert str(lost.value) == (
        f"pgd-1 is not trained to the end: no checkpoint of epoch 3 (damaged checkpoint {_folder(store, 3)} removed; "
        f"resuming from {_folder(store, 2)}); run the same command again to train it"
    )
    assert checkpoints.latest_epoch(store, "pgd-1") == 2  # so it is trained again
    with pytest.raises(
        checkpoints.CheckpointLost, match="no checkpoint of epoch 3; run the same command again to train it"
    ):
        checkpoints.load_trained(store, "pgd-1", 3)


def test_an_outdated_listing_costs_an_epoch_and_nothing_else(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _save(store, 1)
    _save(store, 2)
    _save(store, 3)
    monkeypatch.setattr(Store, "names", lambda store, folder: ["epoch-00001", "epoch-00002"])
    checkpoint = checkpoints.load_latest(store, "pgd-1")
    assert checkpoint is not None
    assert checkpoint.epoch == 2  # the first one's folder, which was removed, is not a checkpoint
    assert checkpoints.latest_epoch(store, "pgd-1") == 2


def _others(store: Store) -> tuple[Store, Store]:
    return Store(store.url, "digits-seed0-0123456789"), Store(store.url, "digits-seed0-abcdef0123")


def test_a_shared_model_is_stored_once_and_names_its_source(store: Store) -> None:
    _save(store, 3)
    second, third = _others(store)
    checkpoints.refer(store, second, "pgd-1")
    checkpoints.refer(second, third, "pgd-1")
    original = checkpoints.load_trained(store, "pgd-1", 3)
    for other, source in ((second, store), (third, second)):
        shared = checkpoints.load_trained(other, "pgd-1", 3)
        assert checkpoints.latest_epoch(other, "pgd-1") == 3
        assert all(torch.equal(tensor, original.tensors[name]) for name, tensor in shared.tensors.items())
        assert shared.state["experiment"] == other.folder.rpartition("-")[2]
        assert shared.state["copied_from"] == source.folder
        assert other.names("checkpoints/pgd-1/epoch-00003") == ["manifest.json", "state.json"]
        assert checkpoints.tensors_elsewhere(other, "checkpoints/pgd-1/epoch-00003") == (
            f"{store.folder}/checkpoints/pgd-1/epoch-00003"
        )


def test_a_damaged_model_is_removed_instead_of_shared(store: Store) -> None:
    _save(store, 3)
    _flip_a_bit(_folder(store, 3))
    with pytest.raises(checkpoints.CheckpointLost, match=f"{store.folder} has no trained pgd-1 \\(damaged checkpoint "):
        checkpoints.refer(store, _others(store)[0], "pgd-1")
    assert checkpoints.latest_epoch(store, "pgd-1") == 0


@pytest.mark.parametrize("damage", [shutil.rmtree, _flip_a_bit], ids=["missing", "other tensors"])
def test_a_reference_to_missing_or_damaged_tensors_is_a_damaged_checkpoint(
    store: Store, damage: Callable[[Path], None]
) -> None:
    _save(store, 3)
    other, _ = _others(store)
    checkpoints.refer(store, other, "pgd-1")
    damage(_folder(store, 3))
    assert checkpoints.load_latest(other, "pgd-1") is None
    assert checkpoints.discard_damaged(other, "pgd-1") == (
        f"damaged checkpoint {_folder(other, 3)} (its tensors are those of "
        f"{store.folder}/checkpoints/pgd-1/epoch-00003) removed; starting over"
    )
    assert checkpoints.latest_epoch(other, "pgd-1") == 0


@pytest.mark.parametrize(
    "reference", ["../x/checkpoints/pgd-1/epoch-00003", "/etc/passwd", "a/b", 7, None, "x/../epoch-1"]
)
def test_a_manifest_can_refer_only_to_checkpoints(store: Store, reference: object) -> None:
    _save(store, 3)
    manifest = json.loads((_folder(store, 3) / "manifest.json").read_text())
    manifest["tensors.safetensors"]["in"] = reference
    (_folder(store, 3) / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoints.load_latest(store, "pgd-1") is None
    assert checkpoints.latest_epoch(store, "pgd-1") == 0
