"""Checkpoints: tensors and readable JSON, no pickle, and a manifest that is written last.

A checkpoint is the folder `checkpoints/<model, or joint>/epoch-00003/` with `tensors.safetensors`, `state.json` and
`manifest.json` (bytes and SHA-256 of the other two). The manifest is written last; a folder without a manifest that
matches is not a checkpoint. `epoch-00003-step-000017` was saved 17 steps into the fourth epoch. If experiments share a
model, one has the tensors, and the others' manifests refer to it:
`"in": "<experiment>/checkpoints/<model>/epoch-00003"`.
torch is imported only by functions that use tensors, so that a driver can find out what is done without it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dwf_cluster.store.files import Store

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?$")

_TENSORS, _STATE = "tensors.safetensors", "state.json"

_ELSEWHERE = re.compile(r"([A-Za-z0-9][\w.-]*)/(checkpoints/[A-Za-z0-9][\w.-]*/epoch-\d+(?:-step-\d+)?)", re.ASCII)
"""A manifest's reference to another experiment's checkpoint: the experiment's folder, the checkpoint's folder."""

_HEADER_BYTES = 1 << 20
"""Bytes at the start of a tensors file that contain its header: twice the size of a mixture of nine's."""

_STORED_NAMES = {"mixture": "joint"}
"""Models whose checkpoint folder has another name, which users' scripts rely on."""

KEPT = 2
"""Number of checkpoints of a model: the newest, and one to fall back on if that is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was saved after an epoch or in the middle of one.

    Attributes:
        path: path or URL of its folder.
        epoch: number of finished epochs.
        tensors: by name, on the CPU.
        state: content of `state.json`.
    """

    path: str
    epoch: int
    tensors: dict[str, torch.Tensor]
    state: dict[str, Any]

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The model's tensors, for `load_state_dict`."""
        named = self.tensors.items()
        return {name.removeprefix("model."): tensor for name, tensor in named if name.startswith("model.")}


def save(
    store: Store, model: str, epoch: int, steps: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """Save a checkpoint after `epoch` epochs and `steps` steps, then remove all but the newest `KEPT`.

    `state.json` has the experiment, model, epoch and step of the checkpoint, and the items of `state`.
    """
    from safetensors.torch import save as serialize

    name = f"epoch-{epoch:05d}" + (f"-step-{steps:06d}" if steps else "")
    folder = f"{_model_folder(model)}/{name}"
    _write(store, model, folder, serialize({n: t.detach().cpu().contiguous() for n, t in tensors.items()}), state)
    for old in folders(store, model)[:-KEPT]:
        store.remove(old)


def _write(store: Store, model: str, folder: str, tensors: bytes | Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a checkpoint's files, the manifest last; `tensors`: serialized, or a manifest entry that refers to them."""
    epoch, steps = _epochs_and_steps(folder)
    identity = {"experiment": store.folder.rpartition("-")[2], "model": model, "epoch": epoch, "steps": steps}
    contents = {_STATE: (json.dumps({**state, **identity}, indent=2) + "\n").encode()}
    if isinstance(tensors, bytes):
        contents[_TENSORS] = tensors
    for file, content in contents.items():
        store.write(f"{folder}/{file}", content)
    manifest = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    if not isinstance(tensors, bytes):
        manifest[_TENSORS] = dict(tensors)
    store.write(f"{folder}/manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def refer(source: Store, store: Store, model: str) -> None:
    """Write a checkpoint that refers to another experiment's trained model; its tensors are not copied.

    `manifest.json` refers to the tensors, and `state.json` has `copied_from`.

    Raises:
        CheckpointLost: if the source's newest checkpoint is damaged. It has been removed, so the next run trains the
            model again.
    """
    folder = _latest(source, model)
    verified = _verified(source, model, folder) if folder else None
    if not folder or not verified:
        damage = discard_damaged(Store(source.url, source.folder), model)
        raise CheckpointLost(
            f"{source.folder} has no trained {model}{f' ({damage})' if damage else ''}; "
            "run the same command again to train it"
        )
    # If the source itself refers to another experiment's tensors, `in` of its entry replaces this one.
    entry = {"in": f"{source.folder}/{folder}", **(_manifest(source, folder) or {})[_TENSORS]}
    _write(store, model, folder, entry, verified[1] | {"copied_from": source.folder})


def latest_path(store: Store, model: str) -> str | None:
    """Path of the newest checkpoint whose files have the sizes in its manifest; None if there is none."""
    folder = _latest(store, model)
    return store.path(folder) if folder else None


def latest_epoch(store: Store, model: str) -> int:
    """Finished epochs of the newest checkpoint whose files have the sizes in its manifest; 0 if there is none."""
    folder = _latest(store, model)
    return _epochs_and_steps(folder)[0] if folder else 0


def _latest(store: Store, model: str) -> str | None:
    for folder in reversed(folders(store, model)):
        manifest = _manifest(store, folder)
        if manifest and all(_size(store, folder, name, entry) == entry["bytes"] for name, entry in manifest.items()):
            return folder
    return None


def load_latest(store: Store, model: str) -> Checkpoint | None:
    """The newest checkpoint that is not damaged; None if there is none."""
    from safetensors.torch import load as deserialize

    for folder in reversed(folders(store, model)):
        verified = _verified(store, model, folder)
        if verified:
            tensors, state = verified
            return Checkpoint(store.path(folder), _epochs_and_steps(folder)[0], deserialize(tensors), state)
    return None


class CheckpointLost(RuntimeError):
    """The last checkpoint of a trained model is damaged or missing. The text is one line."""


def load_trained(store: Store, model: str, epochs: int) -> Checkpoint:
    """Load the checkpoint at the end of a training of `epochs` epochs.

    Raises:
        CheckpointLost: if there is none. Damaged checkpoints have been removed, so the next run trains the model
            again, from an older checkpoint if there is one.
    """
    checkpoint = load_latest(store, model)
    if checkpoint and checkpoint.epoch == epochs:
        return checkpoint
    damage = discard_damaged(store, model)
    raise CheckpointLost(
        f"{model} is not trained to the end: no checkpoint of epoch {epochs}{f' ({damage})' if damage else ''}; "
        "run the same command again to train it"
    )


def discard_damaged(store: Store, model: str) -> str | None:
    """Remove damaged checkpoints that are newer than the newest intact one. Needs no torch.

    Returns:
        A line that names them and the checkpoint that training resumes from; None if none was damaged.
    """
    damaged: list[str] = []
    consequence = "starting over"
    for folder in reversed(folders(store, model)):
        if _verified(store, model, folder):
            consequence = f"resuming from {store.path(folder)}"
            break
        damaged.append(folder)
    named = [store.path(folder) + _elsewhere_in_words(store, folder) for folder in damaged]
    for folder in damaged:
        store.remove(folder)
    return f"damaged checkpoint {', '.join(named)} removed; {consequence}" if damaged else None


def latest_state(store: Store, model: str) -> dict[str, Any] | None:
    """`state.json` of the newest checkpoint; None if there is none. Call `discard_damaged` before."""
    folder = _latest(store, model)
    return json.loads(store.read(f"{folder}/state.json") or b"{}") if folder else None


def remove_latest(store: Store, model: str) -> str:
    """Remove the newest checkpoint; return its path."""
    folder = _latest(store, model)
    assert folder is not None
    store.remove(folder)
    return store.path(folder)


def momentum_bytes(store: Store, folder: str) -> int:
    """Bytes of the optimizer's momentum in a checkpoint's own tensors, by the header of their file."""
    header = store.read_start(f"{folder}/{_TENSORS}", _HEADER_BYTES) or b""
    try:
        entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        spans = [entry["data_offsets"] for name, entry in entries.items() if name.startswith("momentum.")]
        return sum(int(stop) - int(start) for start, stop in spans)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 0  # no tensors of its own, or a damaged file


def drop_momentum(store: Store, model: str) -> None:
    """Rewrite a trained model's newest checkpoint without the optimizer's momentum. Needs torch."""
    checkpoint = load_latest(store, model)
    if checkpoint:
        weights = {n: tensor for n, tensor in checkpoint.tensors.items() if not n.startswith("momentum.")}
        save(store, model, checkpoint.epoch, checkpoint.state["steps"], weights, checkpoint.state)


def stored_name(model: str) -> str:
    """Name of the folder of a model's checkpoints."""
    return _STORED_NAMES.get(model, model)


def model_name(stored: str) -> str:
    """Name of the model whose checkpoints are in a folder of this name."""
    return next((model for model, name in _STORED_NAMES.items() if name == stored), stored)


def _model_folder(model: str) -> str:
    return f"checkpoints/{stored_name(model)}"


def folders(store: Store, model: str) -> list[str]:
    """The folders of a model's checkpoints, oldest first."""
    names = [name for name in store.names(_model_folder(model)) if _NAME.fullmatch(name)]
    return sorted((f"{_model_folder(model)}/{name}" for name in names), key=_epochs_and_steps)


def _epochs_and_steps(folder: str) -> tuple[int, int]:
    """Finished epochs, and steps of the next one, of the checkpoint in a folder of this name."""
    match = _NAME.search(folder)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def _manifest(store: Store, folder: str) -> dict[str, dict[str, Any]] | None:
    try:
        manifest = json.loads(store.read(f"{folder}/manifest.json") or b"")
    except (ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or set(manifest) != {_TENSORS, _STATE}:
        return None
    complete = all(isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in manifest.values())
    if not complete or ("in" in manifest[_TENSORS] and not _ELSEWHERE.fullmatch(str(manifest[_TENSORS]["in"]))):
        return None
    return manifest


def tensors_elsewhere(store: Store, folder: str) -> str | None:
    """The other experiment's checkpoint that has this one's tensors, `<experiment>/<checkpoint>`; None: its own."""
    manifest = _manifest(store, folder)
    return manifest[_TENSORS].get("in") if manifest else None


def _elsewhere_in_words(store: Store, folder: str) -> str:
    path = tensors_elsewhere(store, folder)
    return f" (its tensors are those of {path})" if path else ""


def _locate(store: Store, folder: str, name: str, entry: Mapping[str, Any]) -> tuple[Store, str]:
    """Store and path of a checkpoint's file, which may be another experiment's."""
    if "in" not in entry:
        return store, f"{folder}/{name}"
    experiment, _, checkpoint = entry["in"].partition("/")
    return replace(store, folder=experiment), f"{checkpoint}/{name}"


def _size(store: Store, folder: str, name: str, entry: Mapping[str, Any]) -> int | None:
    owner, path = _locate(store, folder, name, entry)
    return owner.size(path)


def _verified(store: Store, model: str, folder: str) -> tuple[bytes, dict[str, Any]] | None:
    """Serialized tensors and state of a checkpoint; None if it is damaged.

    Damaged: a file is not the manifest's, is not parsable, or belongs to another experiment, model, epoch or step.
    """
    from safetensors import SafetensorError, deserialize

    contents = {}
    for name, entry in (_manifest(store, folder) or {}).items():
        owner, path = _locate(store, folder, name, entry)
        content = owner.read(path)
        if content is None or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            return None
        contents[name] = content
    try:
        tensors, state = contents[_TENSORS], json.loads(contents[_STATE])
        deserialize(tensors)  # type: ignore[no-untyped-call]
        identity = state["experiment"], state["model"], (state["epoch"], state["steps"])
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError):
        return None
    return (tensors, state) if identity == (store.folder.rpartition("-")[2], model, _epochs_and_steps(folder)) else None
