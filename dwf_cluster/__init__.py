"""Train, attack and analyse the Divided We Fall defence, and measure any other classifier by the same attacks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dwf_cluster.api import evaluate, load

__all__ = ["__version__", "evaluate", "load"]

__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    """Import the Python API, and with it torch, when it is first used."""
    if name not in ("evaluate", "load"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from dwf_cluster import api

    return getattr(api, name)
