"""What a store holds that no run needs any more: older checkpoints of trained models, and their momentum.

A run never takes either of them up again: a trained model is only loaded, from its newest checkpoint. What another
experiment refers to (`checkpoints.refer`) stays, and so does everything of an experiment that is being run.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import checkpoints, lock
from dwf_cluster.store.files import Store

_EXPERIMENT = re.compile(r"[A-Za-z0-9][\w.-]*-seed\d+-[0-9a-f]{10}", re.ASCII)
_MODEL = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Waste:
    """Something that can be removed.

    Attributes:
        store: of the experiment.
        model: that it belongs to.
        checkpoint: folder of the checkpoint.
        momentum: whether it is the momentum of the newest checkpoint; else a whole older checkpoint.
        bytes: that it takes.
    """

    store: Store
    model: str
    checkpoint: str
    momentum: bool
    bytes: int

    def __str__(self) -> str:
        what = "momentum of a trained model" if self.momentum else "older checkpoint of a trained model"
        return f"{self.store.path(self.checkpoint)}  {size(self.bytes)}  {what}"

    def remove(self) -> None:
        """Remove it."""
        if self.momentum:
            checkpoints.drop_momentum(self.store, self.model)
        else:
            self.store.remove(self.checkpoint)


def command(storage: str, yes: bool) -> int:
    """List what can be removed, ask on a terminal, remove it; returns the exit status.

    Args:
        storage: path or URL.
        yes: do not ask. Without a terminal to ask on, nothing is removed.

    Raises:
        InvalidInput: if there is no such storage.
        StorageFailed: if it cannot be read or written.
    """
    root = Store(storage, "")
    stores = [Store(storage, name) for name in root.names("") if _EXPERIMENT.fullmatch(name)]
    if not stores:
        raise InvalidInput(f"storage: {storage!r} cannot be used: no experiments there")
    waste: list[Waste] = []
    referred = {place for store in stores for place in _referred(store)}
    for store in stores:
        if lock.is_locked(store):
            print(f"{store.root}  is being run: left as it is")
        else:
            waste += _waste(store, referred)
    for item in waste:
        print(item)
    total = size(sum(item.bytes for item in waste))
    if not waste:
        print("nothing to remove")
    elif not yes and not sys.stdin.isatty():
        print(f"nothing was removed: --yes removes these {total} without asking")
    elif yes or input(f"remove these {total}? [y/N] ").strip().lower() in ("y", "yes"):
        # Momentum first: while the newest checkpoint is written anew, the one before is there to fall back on.
        for item in sorted(waste, key=lambda item: not item.momentum):
            item.remove()
        print(f"removed: {total}")
    else:
        print("nothing was removed")
    return 0


def size(count: float) -> str:
    """A number of bytes, for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _models(store: Store) -> list[str]:
    names = (name for name in store.names("checkpoints") if _MODEL.fullmatch(name))
    return [checkpoints.model_name(name) for name in names]


def _referred(store: Store) -> Iterator[str]:
    """Checkpoints of other experiments that this one refers to."""
    for model in _models(store):
        for folder in checkpoints.folders(store, model):
            if place := checkpoints.origin(store, folder):
                yield place


def _waste(store: Store, referred: set[str]) -> Iterator[Waste]:
    for model in _models(store):
        path = checkpoints.latest_path(store, model)
        state = checkpoints.latest_state(store, model) if path else None
        if path is None or not state or state.get("epochs") != state.get("epoch"):
            continue  # its training goes on from here
        for folder in checkpoints.folders(store, model):
            if f"{store.folder}/{folder}" in referred:
                continue
            if store.path(folder) != path:
                sizes = (store.size(f"{folder}/{name}") for name in store.names(folder))
                yield Waste(store, model, folder, False, sum(size or 0 for size in sizes))
            elif momentum := checkpoints.momentum_bytes(store, folder):
                yield Waste(store, model, folder, True, momentum)
