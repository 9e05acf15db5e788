"""Which layers are known to be deterministic, and to treat each image by itself."""

from __future__ import annotations

from torch import nn

from dwf_cluster.models.frozen import WHOLE_BATCH

_PLAIN = (
    nn.AdaptiveAvgPool2d,
    nn.AvgPool2d,
    nn.BatchNorm2d,
    nn.Conv2d,
    nn.Dropout,
    nn.Flatten,
    nn.Identity,
    nn.Linear,
    nn.MaxPool2d,
    nn.ModuleList,
    nn.ReLU,
    nn.Sequential,
)
"""Layers of torch that are deterministic in evaluation mode, and treat each image by itself."""

_OWN_MODELS = "dwf_cluster.models."
"""Where the package's own modules are defined: they return logits, and draw nothing at random."""


def is_plain(model: nn.Module) -> bool:
    """Whether each layer is the package's own or one of torch's that is deterministic in evaluation mode.

    Such a model returns logits, draws nothing at random, treats each image by itself and leaves it as it is.
    """
    return all(_is_plain(module) for module in model.modules())


def _is_plain(module: nn.Module) -> bool:
    if "forward" in vars(module) or module.training or module._forward_hooks or module._forward_pre_hooks:
        return False
    depends_on_batch = isinstance(module, nn.BatchNorm2d) and module.running_mean is None
    if depends_on_batch or getattr(module, WHOLE_BATCH, False):
        return False
    own = type(module).__module__.startswith(_OWN_MODELS)
    # A gate ends in a softmax, whose outputs are weights and not the model's.
    return own or type(module) in _PLAIN or type(module) is nn.Softmax
