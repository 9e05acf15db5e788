"""Networks of one structure whose weights are stacked, so that one pass computes all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

_SMALL = 2**15
"""Values of a first feature map, over a batch, up to which a CPU is faster with all networks in one pass. Measured
at widths 8 and 16, on images of 8x8 to 32x32: 1.2 to 2.7 times below it, 0.7 to 1 times above."""

MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))
"""Attributes that every module has."""


class Stack:
    """Frozen networks that differ in their weights alone (`are_stackable`)."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self._networks = networks
        self._width = len(next(tensor for tensor in _state(networks[0]).values() if tensor.dim() == 4))
        self._weights: dict[str, torch.Tensor] = {}
        self._is_current = False

    def expire(self) -> None:
        """Let the next pass stack the weights again, in place."""
        self._is_current = False

    def is_faster(self, x: torch.Tensor) -> bool:
        """Whether one pass is faster for these images than one network after the other."""
        return x.device.type == "cpu" and x[:, 0].numel() * self._width <= _SMALL

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (n, networks, classes), of the same images, shape (n, channels, height, width)."""
        return self._pass(x, in_dims=(0, None), out_dims=1)

    def classify_own(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (networks, n, classes), of images of each, shape (networks, n, channels, height, width)."""
        return self._pass(x, in_dims=(0, 0), out_dims=0)

    def _pass(self, x: torch.Tensor, in_dims: tuple[int, int | None], out_dims: int) -> torch.Tensor:
        if not self._is_current:
            states = [_state(network) for network in self._networks]
            for name in states[0]:
                out = self._weights.get(name)
                self._weights[name] = torch.stack([state[name] for state in states], out=out)
            self._is_current = True
        first = self._networks[0]
        call = torch.vmap(lambda weights, images: functional_call(first, weights, (images,)), in_dims, out_dims)
        logits: torch.Tensor = call(self._weights, x)
        return logits


def are_stackable(networks: Sequence[nn.Module]) -> bool:
    """Whether frozen networks differ in their weights alone, have convolutions, and can run in one pass."""
    first = networks[0]
    kernels = [tensor for tensor in _state(first).values() if tensor.dim() == 4]
    # Under vmap, BatchNorm takes no input in bfloat16.
    return bool(kernels) and kernels[0].dtype != torch.bfloat16 and all(_are_alike(first, n) for n in networks[1:])


def _are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks have the same structure, and tensors of the same shapes."""
    # Different networks may have weights of the same names and shapes.
    return _shapes(one) == _shapes(other) and _structure(one) == _structure(other)


def _state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in _state(module).items()}


def _structure(module: nn.Module) -> list[tuple[type[nn.Module], list[str], dict[str, Any]]]:
    """Of each of a module's parts the class, the names of its own parts, and its settings, such as strides."""
    return [
        (
            type(part),
            list(part._modules),
            {name: value for name, value in vars(part).items() if name not in MODULE_ATTRIBUTES and _is_setting(value)},
        )
        for part in module.modules()
    ]


def _is_setting(value: Any) -> bool:
    plain = (bool, int, float, str, tuple, type(None))
    return isinstance(value, plain) or (isinstance(value, list) and all(isinstance(item, plain) for item in value))
