"""Checkpoints: tensors and readable JSON, no pickle, and a manifest that is written last.

A checkpoint is the folder `checkpoints/<expert or joint>/epoch-00003/` with `tensors.safetensors`, `state.json` and
`manifest.json` (bytes and SHA-256 of the other two). Without a manifest that fits, it does not exist. One that was
saved 17 steps into the fourth epoch lies in `epoch-00003-step-000017`. Where experiments share a model, one has the
tensors and the manifests of the others say where they are: `"in": "<experiment>/checkpoints/<expert>/epoch-00003"`.
torch is imported only where tensors are touched, so that a driver can ask what is done without it.
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
"""A checkpoint of another experiment, as a manifest names it: the experiment's folder, the checkpoint's."""

_HEADER = 1 << 20
"""Bytes at the start of a tensors file that hold its header: twice those of a mixture of nine."""

_STORED_NAMES = {"mixture": "joint"}
"""Models whose checkpoints lie in a folder of another name, which other people's scripts know."""

KEPT = 2
"""The newest checkpoint, and one to fall back on."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after an epoch, or in the middle of one.

    Attributes:
        path: where it lies.
        epoch: epochs done, from 0.
        tensors: by name, on the CPU.
        state: readable JSON: what the tensors belong to.
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

    `state.json` says which experiment, model, epoch and step it belongs to, and what `state` has.
    """
    from safetensors.torch import save as serialize

    name = f"epoch-{epoch:05d}" + (f"-step-{steps:06d}" if steps else "")
    folder = f"{_model_folder(model)}/{name}"
    _write(store, model, folder, serialize({n: t.detach().cpu().contiguous() for n, t in tensors.items()}), state)
    for old in folders(store, model)[:-KEPT]:
        store.remove(old)


def _write(store: Store, model: str, folder: str, tensors: bytes | Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Write a checkpoint's files, the manifest last; `tensors`: serialized, or a manifest's entry for others'."""
    epoch, steps = _done(folder)
    place = {"experiment": store.folder.rpartition("-")[2], "model": model, "epoch": epoch, "steps": steps}
    contents = {_STATE: (json.dumps({**state, **place}, indent=2) + "\n").encode()}
    if isinstance(tensors, bytes):
        contents[_TENSORS] = tensors
    for file, content in contents.items():
        store.write(f"{folder}/{file}", content)
    manifest = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    if not isinstance(tensors, bytes):
        manifest[_TENSORS] = dict(tensors)
    store.write(f"{folder}/manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def refer(source: Store, store: Store, model: str) -> None:
    """Make another experiment's trained model this one's too: tensors stay where they are, `manifest.json` says where.

    `state.json` says `copied_from`.

    Raises:
        CheckpointLost: if the newest checkpoint is not what its manifest and its place say. It has been removed, so
            the next run trains the model again.
    """
    folder = _latest(source, model)
    found = _verified(source, model, folder) if folder else None
    if not folder or not found:
        damage = discard_damaged(Store(source.url, source.folder), model)
        raise CheckpointLost(
            f"{source.folder} has no trained {model}{f' ({damage})' if damage else ''}; "
            "the same command again trains it"
        )
    # Where the source refers to others' tensors itself, its entry says where they are.
    entry = {"in": f"{source.folder}/{folder}", **(_manifest(source, folder) or {})[_TENSORS]}
    _write(store, model, folder, entry, found[1] | {"copied_from": source.folder})


def latest_path(store: Store, model: str) -> str | None:
    """Path of the newest checkpoint whose files have the size that its manifest says; None without one."""
    folder = _latest(store, model)
    return store.path(folder) if folder else None


def latest_epoch(store: Store, model: str) -> int:
    """Whole epochs of the newest checkpoint whose files have the size that its manifest says; 0 without one."""
    folder = _latest(store, model)
    return _done(folder)[0] if folder else 0


def _latest(store: Store, model: str) -> str | None:
    for folder in reversed(folders(store, model)):
        manifest = _manifest(store, folder)
        if manifest and all(_size(store, folder, name, entry) == entry["bytes"] for name, entry in manifest.items()):
            return folder
    return None


def load_latest(store: Store, model: str) -> Checkpoint | None:
    """The newest checkpoint that is what its manifest and its place say; None without one. Others are passed over."""
    from safetensors.torch import load as deserialize

    for folder in reversed(folders(store, model)):
        found = _verified(store, model, folder)
        if found:
            tensors, state = found
            return Checkpoint(store.path(folder), _done(folder)[0], deserialize(tensors), state)
    return None


class CheckpointLost(RuntimeError):
    """The last checkpoint of a trained model is damaged or gone. The text is one line."""


def load_trained(store: Store, model: str, epochs: int) -> Checkpoint:
    """Load the checkpoint that a training of so many epochs ended with.

    Raises:
        CheckpointLost: if there is none. Damaged ones have been removed, so the next run trains the model again,
            from the checkpoint before if there is one.
    """
    checkpoint = load_latest(store, model)
    if checkpoint and checkpoint.epoch == epochs:
        return checkpoint
    damage = discard_damaged(store, model)
    raise CheckpointLost(
        f"{model} is not trained to the end: no checkpoint of epoch {epochs}{f' ({damage})' if damage else ''}; "
        "the same command again trains it"
    )


def discard_damaged(store: Store, model: str) -> str | None:
    """Remove the newest checkpoints that are not what their manifests and places say. Needs no torch.

    Returns:
        A line that names them and the one that is used instead; None if there was nothing to do.
    """
    damaged: list[str] = []
    good = "none: it starts over"
    for folder in reversed(folders(store, model)):
        if _verified(store, model, folder):
            good = store.path(folder)
            break
        damaged.append(folder)
    named = [store.path(folder) + _elsewhere_in_words(store, folder) for folder in damaged]
    for folder in damaged:
        store.remove(folder)
    return f"damaged checkpoint {', '.join(named)} removed; used is {good}" if damaged else None


def latest_state(store: Store, model: str) -> dict[str, Any] | None:
    """`state.json` of the newest checkpoint; None without one. For checkpoints that `discard_damaged` has verified."""
    folder = _latest(store, model)
    return json.loads(store.read(f"{folder}/state.json") or b"{}") if folder else None


def remove_latest(store: Store, model: str) -> str:
    """Remove the newest checkpoint; return its path."""
    folder = _latest(store, model)
    assert folder is not None
    store.remove(folder)
    return store.path(folder)


def momentum_bytes(store: Store, folder: str) -> int:
    """Bytes of the optimizer's momentum in a checkpoint's own tensors, from their header."""
    header = store.read_start(f"{folder}/{_TENSORS}", _HEADER) or b""
    try:
        entries = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        spans = [entry["data_offsets"] for name, entry in entries.items() if name.startswith("momentum.")]
        return sum(int(stop) - int(start) for start, stop in spans)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return 0  # none, or not what was saved


def drop_momentum(store: Store, model: str) -> None:
    """Write a trained model's newest checkpoint again, without the optimizer's momentum. Needs torch."""
    checkpoint = load_latest(store, model)
    if checkpoint:
        weights = {n: tensor for n, tensor in checkpoint.tensors.items() if not n.startswith("momentum.")}
        save(store, model, checkpoint.epoch, checkpoint.state["steps"], weights, checkpoint.state)


def stored_name(model: str) -> str:
    """Name of the folder that holds a model's checkpoints."""
    return _STORED_NAMES.get(model, model)


def model_name(stored: str) -> str:
    """Name of the model whose checkpoints lie in a folder of this name."""
    return next((model for model, name in _STORED_NAMES.items() if name == stored), stored)


def _model_folder(model: str) -> str:
    return f"checkpoints/{stored_name(model)}"


def folders(store: Store, model: str) -> list[str]:
    """A model's checkpoints, oldest first."""
    names = [name for name in store.names(_model_folder(model)) if _NAME.fullmatch(name)]
    return sorted((f"{_model_folder(model)}/{name}" for name in names), key=_done)


def _done(folder: str) -> tuple[int, int]:
    """Whole epochs and steps that a checkpoint's name tells of."""
    found = _NAME.search(folder)
    assert found is not None
    return int(found[1]), int(found[2] or 0)


def _manifest(store: Store, folder: str) -> dict[str, dict[str, Any]] | None:
    try:
        manifest = json.loads(store.read(f"{folder}/manifest.json") or b"")
    except (ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or set(manifest) != {_TENSORS, _STATE}:
        return None
    whole = all(isinstance(entry, dict) and {"bytes", "sha256"} <= set(entry) for entry in manifest.values())
    if not whole or ("in" in manifest[_TENSORS] and not _ELSEWHERE.fullmatch(str(manifest[_TENSORS]["in"]))):
        return None
    return manifest


def origin(store: Store, folder: str) -> str | None:
    """Where the tensors of a checkpoint are, if another experiment has them: `<experiment>/<checkpoint>`."""
    manifest = _manifest(store, folder)
    return manifest[_TENSORS].get("in") if manifest else None


def _elsewhere_in_words(store: Store, folder: str) -> str:
    path = origin(store, folder)
    return f" (its tensors are those of {path})" if path else ""


def _place(store: Store, folder: str, name: str, entry: Mapping[str, Any]) -> tuple[Store, str]:
    """Where a file of a checkpoint is, its own or another experiment's."""
    if "in" not in entry:
        return store, f"{folder}/{name}"
    experiment, _, checkpoint = entry["in"].partition("/")
    return replace(store, folder=experiment), f"{checkpoint}/{name}"


def _size(store: Store, folder: str, name: str, entry: Mapping[str, Any]) -> int | None:
    where, path = _place(store, folder, name, entry)
    return where.size(path)


def _verified(store: Store, model: str, folder: str) -> tuple[bytes, dict[str, Any]] | None:
    """Tensors, serialized, and state of a checkpoint; None if it is damaged, or another than its place says."""
    from safetensors import SafetensorError, deserialize

    contents = {}
    for name, entry in (_manifest(store, folder) or {}).items():
        where, path = _place(store, folder, name, entry)
        content = where.read(path)
        if content is None or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            return None
        contents[name] = content
    try:
        tensors, state = contents[_TENSORS], json.loads(contents[_STATE])
        deserialize(tensors)  # type: ignore[no-untyped-call]
        told = state["experiment"], state["model"], (state["epoch"], state["steps"])
    except (KeyError, TypeError, ValueError, RecursionError, SafetensorError):
        return None
    return (tensors, state) if told == (store.folder.rpartition("-")[2], model, _done(folder)) else None
