"""Training in bfloat16: what is rounded to it, and what stays float32.

Convolutions, and what lies between them, are computed in bfloat16. Pixels, their normalisation, linear layers (gate and
classifier), logits, losses, statistics of BatchNorm, weights and momentum are float32: near 1, neighbouring numbers of
bfloat16 are 1/256 apart, half a step of 2/255.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode


class InBfloat16(nn.Module):
    """A model whose training pass is computed in bfloat16; its outputs are float32.

    Args:
        model: that is trained, or DDP's wrapper of it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @property
    def module(self) -> nn.Module:
        """The model itself, under the name that DDP has for it."""
        module: nn.Module = getattr(self.model, "module", self.model)
        return module

    def forward(self, x: torch.Tensor, **options: Any) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16), _LinearInFloat32():
            outputs: torch.Tensor = self.model(x, **options)
        return outputs.float()


class _LinearInFloat32(TorchFunctionMode):
    """Linear layers as without autocast."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not F.linear:
            return func(*args, **(kwargs or {}))
        x, *weights = args
        with torch.autocast(x.device.type, enabled=False):
            return func(x.float(), *weights, **(kwargs or {}))


def cast_inputs(module: nn.Module) -> None:
    """Make a module convert its inputs to the type of its own parameters. Hooks of its original stay as they are."""
    module._forward_pre_hooks = OrderedDict(module._forward_pre_hooks)
    module.register_forward_pre_hook(_to_own_type)


def _to_own_type(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    dtypes = [parameter.dtype for parameter in module._parameters.values() if parameter is not None]
    return tuple(
        value.to(dtypes[0]) if dtypes and isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for value in inputs
    )
