"""State dicts of other sources: the names that they give to the weights of our backbones, and what fits them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import nn

from dwf_cluster.models.resnet import Normalize

_WRAPPERS = ("module.", "_orig_mod.", "model.")
"""Prefixes of every name that DataParallel, torch.compile and a module around the network add."""


class Misfit(ValueError):
    """Weights that are not those of a backbone. Its text is one line: the first that does not fit, what is allowed."""


@dataclass(frozen=True)
class Form:
    """How a source names the weights of a backbone.

    Attributes:
        source: of checkpoints with these names.
        rename: from the names of our weights, in their order, without those of the normalisation, to the source's.
        reorder: from tensors by our names, with the source's order of channels, to ours.
    """

    source: str
    rename: Callable[[Sequence[str]], Sequence[str]]
    reorder: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict


def matched(state: Mapping[str, torch.Tensor], model: nn.Module, backbone: str) -> dict[str, torch.Tensor]:
    """The weights of a state dict by the names of our backbone, complete and of the right shapes.

    The form is the one that most names agree with. The names of our own state dicts, and of torchvision's where the
    backbone is built from torchvision's network, need no rules. What a state dict may lack: mean and std of the
    normalisation, and the counters of BatchNorm, which nothing reads here.

    Args:
        state: tensors by name, as saved.
        model: the backbone, untrained.
        backbone: its name in `models.registry.BACKBONES`.

    Returns:
        A part of the model's state dict, for `load_state_dict`.

    Raises:
        Misfit: if a name is unknown or missing, or a shape or type differs.
    """
    state, ours = _unwrapped(state), model.state_dict()
    normalisation = [key for key in ours if _is_normalisation(model, key)]
    weights = [key for key in ours if key not in normalisation]
    known = {form.source: form for form in (*FORMS.get(backbone, ()), _OWN, _BARE)}
    forms = {source: _names(form, weights) for source, form in known.items()}
    source = max(forms, key=lambda name: len(forms[name].keys() & state.keys()))
    names = forms[source] | {key: key for key in normalisation}
    if unknown := [key for key in state if key not in names]:
        raise Misfit(_unknown(unknown, backbone, source, forms, state))
    for key, name in names.items():
        is_optional = name in normalisation or name.endswith("num_batches_tracked")
        if key not in state and not is_optional:
            raise Misfit(f"{key} is missing: allowed are all weights of {backbone}, as {source} names them")
    convolutions, linear = ([key for key, name in names.items() if ours[name].dim() == n] for n in (4, 2))
    counted = dict.fromkeys(linear[-1:], "classes") | dict.fromkeys(convolutions[:1], "channels")
    for key in (*counted, *state):  # these two first: their messages say what the user has mixed up
        _check(key, state[key], ours[names[key]], counted.get(key))
    return known[source].reorder({names[key]: tensor for key, tensor in state.items()})


def _unwrapped(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """The state dict without prefixes that all of its names have."""
    while prefix := next((p for p in _WRAPPERS if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def _is_normalisation(model: nn.Module, key: str) -> bool:
    return isinstance(model.get_submodule(key.rpartition(".")[0]), Normalize)


def _names(form: Form, weights: Sequence[str]) -> dict[str, str]:
    """Our names of weights by the source's; empty if the form does not have as many weights."""
    renamed = form.rename(weights)
    return dict(zip(renamed, weights, strict=True)) if len(renamed) == len(weights) else {}


def _unknown(
    unknown: Sequence[str],
    backbone: str,
    source: str,
    forms: Mapping[str, Mapping[str, str]],
    state: Mapping[str, torch.Tensor],
) -> str:
    """Why the first of the unknown names is refused: a structure that is not ours, or the nearest known name."""
    key = unknown[0]
    for pattern, reason in DIFFERENT.get(backbone, ()):
        if any(re.search(pattern, name) for name in unknown):
            return f"{key} is no weight of our {backbone}: {reason}"
    agrees = forms[source].keys() & state.keys()
    # If nothing agrees with any form, the nearest name may be of any.
    near = dict.fromkeys(forms[source], source) if agrees else {n: s for s, names in forms.items() for n in names}
    missing = [name for name in near if name not in state]
    close = difflib.get_close_matches(key, missing, n=1, cutoff=0.0)
    nearest = f"; the nearest known name is {close[0]} ({near[close[0]]})" if close else ""
    return f"{key} is no weight of {backbone}{nearest}"


def _check(key: str, tensor: torch.Tensor, ours: torch.Tensor, meaning: str | None) -> None:
    """Refuse a tensor of another shape or kind; `meaning`: what its first or second dimension counts."""
    shape, allowed = tuple(tensor.shape), tuple(ours.shape)
    if shape != allowed:
        dimension = {"classes": 0, "channels": 1}.get(meaning or "", -1)
        others = [(s, a) for i, (s, a) in enumerate(zip(shape, allowed, strict=False)) if i != dimension]
        if meaning and len(shape) == len(allowed) and all(s == a for s, a in others):
            raise Misfit(f"{key} is for {shape[dimension]} {meaning}: the images have {allowed[dimension]}")
        raise Misfit(f"{key} has shape {shape}: allowed is {allowed}; do backbone and width fit?")
    if tensor.is_floating_point() != ours.is_floating_point():
        raise Misfit(f"{key} is of type {tensor.dtype}: allowed are floating-point numbers, as {ours.dtype}")


# ---------------------------------------------------------------------------------------------------- forms


def _by_rules(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Callable[[Sequence[str]], Sequence[str]]:
    """Renaming by regular expressions, each applied to every name, in this order."""

    def rename(weights: Sequence[str]) -> list[str]:
        renamed = list(weights)
        for pattern, replacement in rules:
            renamed = [re.sub(pattern, replacement, name) for name in renamed]
        return renamed

    return rename


def _resnet(blocks: Sequence[int], shortcut: str, last: str) -> Callable[[Sequence[str]], Sequence[str]]:
    """Names of a ResNet: our `blocks.n.first` is `layerS.B` with `conv1` and `bn1`.

    Args:
        blocks: number of blocks in each of the four stages.
        shortcut, last: names of a block's shortcut and of the linear layer.
    """
    places = [f"layer{stage}.{block}" for stage, count in enumerate(blocks, 1) for block in range(count)]
    layers = [(rf"\.{name}\.0\.", f".conv{n}.") for n, name in enumerate(("first", "second", "third"), 1)]
    layers += [(rf"\.{name}\.1\.", f".bn{n}.") for n, name in enumerate(("first", "second", "third"), 1)]
    return _by_rules(
        (r"^stem\.0\.", "conv1."),
        (r"^stem\.1\.", "bn1."),
        (r"^blocks\.(\d+)(?=\.)", lambda match: places[int(match[1])]),
        *layers,
        (r"\.shortcut\.", f".{shortcut}."),
        (r"^classifier\.", f"{last}."),
    )


def _densenet(weights: Sequence[str]) -> Sequence[str]:
    """kuangliu's names of torchvision's DenseNet."""
    rename = _by_rules(
        (r"^features\.conv0\.", "conv1."),
        (r"^features\.norm5\.", "bn."),
        (r"^features\.transition(\d)\.norm\.", r"trans\1.bn."),
        (r"^features\.transition(\d)\.", r"trans\1."),
        (r"^features\.denseblock(\d)\.", r"dense\1."),
        (r"\.denselayer(\d+)\.", lambda match: f".{int(match[1]) - 1}."),
        (r"\.norm(\d)\.", r".bn\1."),
        (r"^classifier\.", "linear."),
    )
    return rename(_without_prefix(weights))


def _new_features_last(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a DenseNet that puts the newest features before all others, for one that appends them."""
    growth = next(len(t) for name, t in tensors.items() if name.endswith("denseblock1.denselayer1.conv2.weight"))
    blocks = [match for name in tensors if (match := re.search(r"denseblock(\d)\.denselayer(\d+)\.", name))]
    layers = {block: max(int(m[2]) for m in blocks if m[1] == block) for block in {m[1] for m in blocks}}

    def previous(name: str) -> int:
        """How many layers have added to the channels that a weight is for."""
        if match := re.search(r"denselayer(\d+)\.(norm1|conv1)\.", name):
            return int(match[1]) - 1
        if match := re.search(r"transition(\d)\.", name):
            return layers[match[1]]
        return layers[max(layers)] if re.search(r"norm5\.|classifier\.weight", name) else 0

    def in_our_order(name: str, tensor: torch.Tensor) -> torch.Tensor:
        added = previous(name) if tensor.dim() else 0
        if not added:
            return tensor
        dimension = min(1, tensor.dim() - 1)  # of a norm the only one, else the inputs'
        first = torch.arange(added * growth, tensor.shape[dimension])  # of the block's input, which is last there
        others = [torch.arange(growth) + growth * (added - layer) for layer in range(1, added + 1)]
        return tensor.index_select(dimension, torch.cat([first, *others]).to(tensor.device))

    return {name: in_our_order(name, tensor) for name, tensor in tensors.items()}


def _vgg19(weights: Sequence[str]) -> list[str]:
    """Names of VGG-19 with BatchNorm by position, as the layers of its `features` are numbered, then `classifier`."""
    names, layer = [], 0
    for convolutions in (2, 2, 4, 4, 4):
        for _ in range(convolutions):
            names += [f"features.{layer}.{kind}" for kind in ("weight", "bias")]
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            names += [f"features.{layer + 1}.{kind}" for kind in ("weight", "bias", *statistics)]
            layer += 3  # convolution, BatchNorm, ReLU
        layer += 1  # max-pooling
    return [*names, "classifier.weight", "classifier.bias"]


def _without_prefix(weights: Sequence[str]) -> list[str]:
    """Our names without the modules around the network that all of them have."""
    parts = [name.split(".") for name in weights]
    levels = zip(*(modules[:-1] for modules in parts), strict=False)
    common = len(list(takewhile(lambda names: len(set(names)) == 1, levels)))
    return [".".join(modules[common:]) for modules in parts]


_OWN = Form("this package", list)
_BARE = Form("torchvision", _without_prefix)
"""For backbones that are torchvision's network behind a normalisation."""


def _resnet_forms(*blocks: int) -> tuple[Form, ...]:
    return (
        Form("kuangliu", _resnet(blocks, "shortcut", "linear")),
        Form("torchvision or timm", _resnet(blocks, "downsample", "fc")),
    )


FORMS: Mapping[str, tuple[Form, ...]] = {
    "resnet18": _resnet_forms(2, 2, 2, 2),
    "resnet34": _resnet_forms(3, 4, 6, 3),
    "resnet50": _resnet_forms(3, 4, 6, 3),
    "vgg19": (Form("kuangliu", _vgg19),),
    "densenet121": (Form("kuangliu", _densenet, _new_features_last),),
    "densenet169": (Form("kuangliu", _densenet, _new_features_last),),
}
"""Forms whose names or order of channels differ from ours, by backbone."""

_DENSENET = (
    (r"^features\.norm0\.", "this one has a norm and a max-pooling behind its first convolution; allowed are none"),
)

DIFFERENT: Mapping[str, tuple[tuple[str, str], ...]] = {
    "vgg19": ((r"^classifier\.\d", "this one has hidden layers of 4096 units; allowed is kuangliu's, which has none"),),
    "densenet121": _DENSENET,
    "densenet169": _DENSENET,
    "googlenet": (
        (
            r"^(?!aux\d\.|network\.)",
            "kuangliu's, weiaicunzai's and the one for larger images have other stems; allowed is torchvision's with "
            "one 3x3 convolution as its stem",
        ),
    ),
    "inception-v3": (
        (
            r"^(?!AuxLogits\.|network\.)",
            "weiaicunzai's has another stem and other branches; allowed is torchvision's with a stem for 32x32",
        ),
    ),
    "mobilenet-v2": (
        (
            r"^(?!features\.|classifier\.|network\.)",
            "kuangliu's has more shortcuts and no ReLU6, weiaicunzai's has other strides; allowed is torchvision's "
            "with strides for 32x32",
        ),
    ),
    # Weiaicunzai's has our structure, but its weights are saved in another order, and which is which is not certain.
    "xception": (
        (
            r"^(?!\d|network\.)",
            "how the names of other sources, weiaicunzai's too, map to ours is not known; allowed are this package's",
        ),
    ),
}
"""By backbone, patterns of unknown names, and what is said of a checkpoint that has such a name: how the structures
that are known differ from ours. Where the names of these structures are not known with certainty, the pattern is that
of every name which is not ours or torchvision's, and the reason is true of any file."""
