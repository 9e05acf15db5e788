"""A network with the weights of a checkpoint that the user has: read, verified, renamed, and loaded strictly."""

from __future__ import annotations

import hashlib
import io
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.models.registry import BACKBONES
from dwf_cluster.models.state_dicts import Misfit, matched
from dwf_cluster.settings import InvalidInput, one_line, printable
from dwf_cluster.store import outside

_KEYS = ("net", "state_dict", "model", "model_state_dict")
"""Keys below which training scripts store the state dict, beside the accuracy and the epoch."""


def build(spec: ModelSpec, images: ImageFormat, parents: Mapping[str, nn.Module]) -> nn.Module:
    """The backbone without its weights; it has no parents.

    Options: `mean` and `std` of its own normalisation; None: those of the images.

    Raises:
        InvalidInput: if they are not of as many channels as the images.
    """
    mean, std = spec.option("mean") or images.mean, spec.option("std") or images.std
    if len(mean) != len(images.mean):
        raise InvalidInput(
            f"given: {spec.name}: mean and std of {len(mean)} channel(s) cannot be used: the images have "
            f"{len(images.mean)} channel(s)"
        )
    normalised = replace(images, mean=tuple(mean), std=tuple(std))
    network: nn.Module = pkgutil.resolve_name(BACKBONES[spec.backbone].build)(normalised, spec.width)
    return network


def load(spec: ModelSpec, model: nn.Module) -> None:
    """Load the weights of the file into the model.

    Options: `file`, path or URL; `sha256` of its content; `mean`, which must be None if the file has the model's.

    Raises:
        InvalidInput: if the file is missing or has changed, is no checkpoint, or holds other weights than the model's.
        StorageFailed: if a URL does not answer.
    """
    field, file = f"given: {spec.name}", spec.option("file")
    content = outside.read(file, field)
    digest = hashlib.sha256(content).hexdigest()
    if spec.option("sha256") not in (None, digest):
        raise InvalidInput(f"{field}: {file!r} cannot be used: it has changed since the experiment was planned")
    try:
        weights = matched(_state_dict(_deserialized(content)), model, spec.backbone)
    except Misfit as error:
        raise InvalidInput(f"{field}: {file!r} cannot be used: {printable(error, 300)}") from None
    trained = set(dict(model.named_parameters()))
    means = [name for name in weights if name.endswith(".mean") and name not in trained]
    if means and spec.option("mean") is not None:
        raise InvalidInput(f"{field}: mean and std cannot be used: the file has its own ({means[0]}); allowed is null")
    model.load_state_dict({**model.state_dict(), **weights})


def _deserialized(content: bytes) -> Any:
    """The content of a file that safetensors or `torch.save` has written; no code of it is run.

    Raises:
        Misfit: if it is of another kind, damaged, or holds more than tensors and plain values.
    """
    try:
        if content[8:9] == b"{":  # behind the size of safetensors' header
            from safetensors.torch import load as deserialize

            return deserialize(content)
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    # What unpickling and deserializing raise on a file of another kind is written down nowhere.
    except Exception as error:
        text = str(error)
        # torch names the class that it refuses: `GLOBAL builtins.eval was not an allowed global`, or in other words.
        if refused := re.search(r"GLOBAL ([\w.]+)|Unsupported (?:global|class)[:\s]+([\w.]+)", text):
            raise Misfit(
                f"it holds pickled code ({refused[1] or refused[2]}), which is not run; allowed is a state dict, as "
                "torch.save(model.state_dict(), FILE) writes it"
            ) from None
        raise Misfit(
            f"it is no checkpoint of torch or safetensors ({type(error).__name__}: {one_line(error, 100)})"
        ) from None


def _state_dict(saved: Any) -> dict[str, torch.Tensor]:
    """The state dict of a checkpoint: itself, or below one of `_KEYS`."""
    allowed = f"allowed is a state dict, itself or below one of {', '.join(_KEYS)}"
    if isinstance(saved, Mapping):
        saved = next((saved[key] for key in _KEYS if isinstance(saved.get(key), Mapping)), saved)
    if not isinstance(saved, Mapping):
        raise Misfit(f"it holds a {type(saved).__name__}: {allowed}")
    if not saved:
        raise Misfit(f"it holds no weights: {allowed}")
    other = next((key for key, value in saved.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise Misfit(f"it holds {other!r}, which is no tensor: {allowed}")
    return {str(key): tensor for key, tensor in saved.items()}
