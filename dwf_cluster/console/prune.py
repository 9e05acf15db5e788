"""`status --prune`: list what can be removed from a storage, ask, and remove it."""

from __future__ import annotations

import sys

from dwf_cluster.store import prune


def command(storage: str, yes: bool) -> int:
    """List what can be removed, ask on a terminal, remove it; return the exit status.

    Args:
        storage: path or URL.
        yes: remove without asking. Without it nothing is removed if stdin is not a terminal.

    Raises:
        InvalidInput: if the storage has no experiments.
    """
    removable, running = prune.find(storage)
    for store in running:
        print(f"{store.root}  is being run: nothing of it is removed")
    for item in removable:
        kind = "momentum" if item.is_momentum else "older checkpoint"
        print(f"{item.store.path(item.checkpoint)}  {format_bytes(item.bytes)}  {kind} of a trained model")
    total = format_bytes(sum(item.bytes for item in removable))
    if not removable:
        print("nothing to remove")
    elif not yes and not sys.stdin.isatty():
        print(f"nothing was removed: --yes removes these {total} without asking")
    elif yes or input(f"remove these {total}? [y/N] ").strip().lower() in ("y", "yes"):
        prune.remove(removable)
        print(f"removed: {total}")
    else:
        print("nothing was removed")
    return 0


def format_bytes(count: float) -> str:
    """A number of bytes with a unit: `1.23 MB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
