"""Checkpoints: tensors and readable JSON, no pickle, and a manifest that is written last.

A checkpoint is the folder `checkpoints/<expert or joint>/epoch-00003/` with `tensors.safetensors`, `state.json` and
`manifest.json` (bytes and SHA-256 of the other two). Without a manifest that fits, it does not exist. One that was
saved 17 steps into the fourth epoch lies in `epoch-00003-step-000017`.
torch is imported only where tensors are touched, so that a driver can ask what is done without it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dwf_cluster.experiment import MIXTURE
from dwf_cluster.store.files import Store

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

_NAME = re.compile(r"epoch-(\d+)(?:-step-(\d+))?$")

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


def save(
    store: Store, model: str, epoch: int, steps: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """Save a checkpoint after `epoch` epochs and `steps` steps, then remove all but the newest `KEPT`."""
    from safetensors.torch import save as serialize

    name = f"epoch-{epoch:05d}" + (f"-step-{steps:06d}" if steps else "")
    folder = f"{_model_folder(model)}/{name}"
    contents = {
        "tensors.safetensors": serialize({n: t.detach().cpu().contiguous() for n, t in tensors.items()}),
        "state.json": (json.dumps(state, indent=2) + "\n").encode(),
    }
    for file, content in contents.items():
        store.write(f"{folder}/{file}", content)
    manifest = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    store.write(f"{folder}/manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())
    for old in _folders(store, model)[:-KEPT]:
        store.remove(old)


def latest_path(store: Store, model: str) -> str | None:
    """Path of the newest checkpoint whose files have the size that its manifest says; None without one."""
    folder = _latest(store, model)
    return store.path(folder) if folder else None


def latest_epoch(store: Store, model: str) -> int:
    """Whole epochs of the newest checkpoint whose files have the size that its manifest says; 0 without one."""
    folder = _latest(store, model)
    return _done(folder)[0] if folder else 0


def _latest(store: Store, model: str) -> str | None:
    for folder in reversed(_folders(store, model)):
        manifest = _manifest(store, folder)
        if manifest and all(store.size(f"{folder}/{n}") == entry["bytes"] for n, entry in manifest.items()):
            return folder
    return None


def load_latest(store: Store, model: str) -> Checkpoint | None:
    """The newest checkpoint whose content has the SHA-256 of its manifest; None without one.

    One that does not is passed over with a warning that names it and the one that is used instead.
    """
    from safetensors.torch import load as deserialize

    damaged: list[str] = []
    for folder in reversed(_folders(store, model)):
        contents = _verified(store, folder)
        if contents is None:
            damaged.append(store.path(folder))
            continue
        if damaged:
            logger.warning("damaged checkpoint %s: using %s", ", ".join(damaged), store.path(folder))
        return Checkpoint(
            path=store.path(folder),
            epoch=_done(folder)[0],
            tensors=deserialize(contents["tensors.safetensors"]),
            state=json.loads(contents["state.json"]),
        )
    if damaged:
        logger.warning("damaged checkpoint %s: starting over", ", ".join(damaged))
    return None


def _model_folder(model: str) -> str:
    return f"checkpoints/{'joint' if model == MIXTURE else model}"


def _folders(store: Store, model: str) -> list[str]:
    """A model's checkpoints, oldest first."""
    names = [name for name in store.names(_model_folder(model)) if _NAME.fullmatch(name)]
    return sorted((f"{_model_folder(model)}/{name}" for name in names), key=_done)


def _done(folder: str) -> tuple[int, int]:
    """Whole epochs and steps that a checkpoint's name tells of."""
    found = _NAME.search(folder)
    assert found is not None
    return int(found[1]), int(found[2] or 0)


def _manifest(store: Store, folder: str) -> dict[str, dict[str, Any]] | None:
    content = store.read(f"{folder}/manifest.json")
    try:
        manifest = json.loads(content) if content else None
    except ValueError:
        return None
    whole = isinstance(manifest, dict) and set(manifest) == {"tensors.safetensors", "state.json"}
    return manifest if whole else None


def _verified(store: Store, folder: str) -> dict[str, bytes] | None:
    contents = {}
    for name, entry in (_manifest(store, folder) or {}).items():
        content = store.read(f"{folder}/{name}")
        if content is None or hashlib.sha256(content).hexdigest() != entry["sha256"]:
            return None
        contents[name] = content
    return contents or None
