"""What a training step makes the host wait for, and how many operations an attack starts: both limit a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images
from dwf_cluster.defences.build import untrained
from dwf_cluster.determinism import Draws
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.resnet import ResNet
from dwf_cluster.presets import build
from dwf_cluster.training.step import Batch, attacked_model, train_batch

from .conftest import TINY

READS = {
    *("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "cpu"),
    *("nonzero", "allclose", "equal", "unique", "masked_select"),
}
"""Functions that make the host wait for the device."""


class OnDevice(torch.Tensor):
    """Stands for a tensor on a GPU: so is all that is computed from it, and reading it is counted."""

    reads: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.__name__ in READS:
            cls.reads.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("benign", ()),
        ("fgsm-1", ()),
        ("pgd-1", ("experts.accumulation=2",)),
        ("mixture", ("pgd.random_start=true",)),
        ("trades", ("baselines=trades",)),
        ("soe", ("baselines=soe", "soe.attack=one_by_one")),
    ],
)
def test_the_host_waits_for_the_device_once_a_step(
    images: Images, monkeypatch: pytest.MonkeyPatch, name: str, settings: tuple[str, ...]
) -> None:
    monkeypatch.setattr("dwf_cluster.models.stack._SMALL", 0)  # as on a GPU, experts run one by one
    monkeypatch.setattr("dwf_cluster.attacks.gradient_cache._DEVICES", ())  # and no iterate is compared
    experiment = build("digits", 0, [*TINY, *settings])
    spec = experiment.spec(name)
    parents = {parent: untrained(experiment.spec(parent), images.format, 0, {}) for parent in spec.parents}
    model = untrained(spec, images.format, 0, parents).train()
    data = DeviceImages(images, experiment.data, torch.device("cpu"))
    data.x_train, data.y_train = data.x_train.as_subclass(OnDevice), data.y_train.as_subclass(OnDevice)
    optimizer, frozen_model = torch.optim.SGD(model.parameters(), 0.1), attacked_model(spec, model)
    monkeypatch.setattr(OnDevice, "reads", [])
    batch = Batch(torch.arange(16), Draws((0, name, 0, 0)))
    train_batch(spec, model, frozen_model, optimizer, data, batch)
    assert OnDevice.reads == ["tolist"]


class Operations(TorchDispatchMode):
    """Records the operations that start a kernel on a GPU, or several."""

    VIEWS = ("view", "expand", "detach", "t", "alias", "slice", "select", "squeeze", "unsqueeze", "split", "empty_like")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.strip("_")
        if name not in self.VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_an_iteration_of_pgd_starts_no_more_operations_than_the_network_has() -> None:
    model: nn.Module = frozen(ResNet(10, (0.5,), (0.25,), width=4))
    x, y, ball = torch.rand(4, 1, 8, 8), torch.arange(4), Ball("linf", 0.1)
    with Operations() as network:
        gradient, _, _ = differentiate(model, x, y, check=False)
    with Operations() as update:
        ball.project(x, x + 0.02 * ball.direction(gradient))
    convolutions, relus, additions, shortcuts = 20, 17, 8, 3
    two_ways = 2 * (convolutions + relus + additions) + 2 * shortcuts  # a shortcut's input is sliced twice
    assert len(network.names) == two_ways + 18  # normalisation, mean, classifier, loss, and the copies of the results
    assert len(update.names) == 8
