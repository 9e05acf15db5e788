"""The frozen model of a model that is trained: built once, refreshed in place."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from dwf_cluster.models.frozen import FAULTS, FrozenTree, build_frozen, norms_by_batch

_PLAIN = frozenset({bool, int, float, str, type(None)})


class FrozenModel:
    """The frozen model of a model that is trained: built when it is first asked for, later refreshed in place.

    A call returns the frozen model (`frozen`) of the model as it was at the first call after `expire`. It is the same
    module with the same tensors each time, unless the model has other modules, attributes or storage than before.

    Attributes:
        faults: what attacks since the last `expire` have found wrong with the model's outputs: message, and a tensor of
            shape () that is above zero if it is so. They are left on the device; whoever calls `expire` reads them.

    Args:
        model: that is trained.
        batch_statistics: as of `frozen`.
        dtype: of the convolutions (`models.precision`); None: their own.
    """

    def __init__(self, model: nn.Module, *, batch_statistics: bool = False, dtype: torch.dtype | None = None) -> None:
        self._model, self._batch_statistics, self._dtype = model, batch_statistics, dtype
        self._tree: FrozenTree | None = None
        self._contents: _Contents | None = None
        self._is_current = False
        self.faults: dict[str, torch.Tensor] = {}

    def __call__(self) -> nn.Module:
        if self._tree is None or not self._is_current:
            self._tree = self._refreshed()
            setattr(self._tree.frozen, FAULTS, self.faults)
            self._is_current = True
        return self._tree.frozen

    def expire(self) -> None:
        """Let the next call refresh the frozen model: the model has changed."""
        self._is_current = False
        self.faults.clear()

    def _refreshed(self) -> FrozenTree:
        contents = _Contents.of(self._model)
        if self._batch_statistics:  # these depend on modes
            contents.objects.extend(norms_by_batch(self._model))
        old, self._contents = self._contents, contents
        if self._tree is None or old is None or self._tree.is_copied or not contents.is_same(old):
            return build_frozen(self._model, self._batch_statistics, self._dtype)
        with torch.no_grad():
            for update in self._tree.updates:
                update()
        return self._tree


@dataclass
class _Contents:
    """All that a frozen model is made from, except for the values of tensors.

    Attributes:
        objects: modules, tensors and attributes, which are compared by identity. They are referred to here, so no
            other object can get the identity of one of them.
        places: storage and shape of the tensors.
    """

    objects: list[object]
    places: list[tuple[object, ...]]

    @staticmethod
    def of(model: nn.Module) -> _Contents:
        contents, pending, seen = _Contents([], []), list[Any]([model]), set[int]()
        while pending:
            value = pending.pop()
            contents.objects.append(value)
            if type(value) in _PLAIN:
                continue
            if isinstance(value, torch.Tensor):
                contents.places.append((value.data_ptr(), value.dtype, value.shape, value.stride()))
            elif isinstance(value, nn.Module):
                if id(value) not in seen:
                    seen.add(id(value))
                    pending.extend(item for name, item in vars(value).items() if name != "training")
            elif isinstance(value, MethodType):
                pending.append(value.__self__)
            elif type(value) in (list, tuple):
                pending.extend(value)
            elif isinstance(value, dict):
                pending.extend(value)
                pending.extend(value.values())
        return contents

    def is_same(self, other: _Contents) -> bool:
        """Whether a frozen model of one is that of the other after an update."""
        return (
            self.places == other.places
            and len(self.objects) == len(other.objects)
            and all(map(operator.is_, self.objects, other.objects))
        )
