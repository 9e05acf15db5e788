"""Stored data that no run needs any more: older checkpoints of trained models, and the momentum in their newest ones.

A trained model is only loaded, from its newest checkpoint. What another experiment refers to (`checkpoints.refer`)
stays, and so does everything of an experiment that is being run.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dwf_cluster.store import checkpoints, lock
from dwf_cluster.store.files import Store
from dwf_cluster.store.status import experiment_folders

_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Removable:
    """A checkpoint, or the momentum in one, that can be removed.

    Attributes:
        store: store of the experiment.
        model: name of the model.
        checkpoint: folder of the checkpoint.
        is_momentum: whether only the momentum of this checkpoint, the newest one, is removed; else the whole of it.
        bytes: size on the storage.
    """

    store: Store
    model: str
    checkpoint: str
    is_momentum: bool
    bytes: int


def find(storage: str) -> tuple[list[Removable], list[Store]]:
    """Find what can be removed.

    Returns:
        What can be removed, and the stores of the experiments that are being run, which were not searched.

    Raises:
        InvalidInput: if the storage has no experiments.
    """
    stores = [Store(storage, folder) for folder in experiment_folders(storage)]
    referenced = {path for store in stores for path in _references(store)}
    running = [store for store in stores if lock.is_locked(store)]
    return [item for store in stores if store not in running for item in _removable(store, referenced)], running


def remove(removable: Iterable[Removable]) -> None:
    """Remove what `find` has found. Needs torch if there is momentum."""
    # Momentum first: if writing the newest checkpoint again fails, the one before is still there.
    for item in sorted(removable, key=lambda item: not item.is_momentum):
        if item.is_momentum:
            checkpoints.drop_momentum(item.store, item.model)
        else:
            item.store.remove(item.checkpoint)


def _models(store: Store) -> list[str]:
    names = (name for name in store.names("checkpoints") if _MODEL.fullmatch(name))
    return [checkpoints.model_name(name) for name in names]


def _references(store: Store) -> Iterator[str]:
    """Checkpoints of other experiments that this one refers to."""
    for model in _models(store):
        for folder in checkpoints.folders(store, model):
            if path := checkpoints.tensors_elsewhere(store, folder):
                yield path


def _removable(store: Store, referenced: set[str]) -> Iterator[Removable]:
    for model in _models(store):
        path = checkpoints.latest_path(store, model)
        state = checkpoints.latest_state(store, model) if path else None
        if path is None or not state or state.get("epochs") != state.get("epoch"):
            continue  # its training resumes from here
        for folder in checkpoints.folders(store, model):
            if f"{store.folder}/{folder}" in referenced:
                continue
            if store.path(folder) != path:
                sizes = (store.size(f"{folder}/{name}") for name in store.names(folder))
                yield Removable(store, model, folder, False, sum(size or 0 for size in sizes))
            elif momentum := checkpoints.momentum_bytes(store, folder):
                yield Removable(store, model, folder, True, momentum)
