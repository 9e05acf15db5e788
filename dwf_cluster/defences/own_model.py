"""A user's own network, the method `own-model`: `dwf evaluate` measures it, and nothing here trains it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from torch import nn

from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.defences.loss import Loss
from dwf_cluster.defences.registry import OWN_MODEL, ModelSpec
from dwf_cluster.settings import InvalidInput


def build(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> NoReturn:
    """Refuse: only the user can build the model.

    Raises:
        InvalidInput: always.
    """
    raise InvalidInput(f"defence: {OWN_MODEL!r} cannot be trained: `dwf evaluate` measures a model of your own")


def losses(spec: ModelSpec, *arguments: Any) -> Iterator[Loss]:
    """No losses: the model is not trained."""
    return iter(())
