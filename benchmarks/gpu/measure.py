"""How the sections measure: sizes, medians, kernels, precisions, a captured iteration of PGD, rows of the report."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dwf_cluster.attacks.graph import GraphCapture
from dwf_cluster.data.registry import Shape
from dwf_cluster.data.sources import Images
from dwf_cluster.defences.build import untrained
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.refresh import FrozenModel

WARM_UPS = 3
PRECISIONS = ("ieee", "tf32", "bf16")
"""Of an attack: float32 convolutions without and with TF32, and bfloat16 convolutions in a float32 network."""

FEW_ITERATIONS = ("evaluation.restarts=1", "evaluation.restart_steps=1", "evaluation.adaptive_steps=1")
QUICK = (
    *("model.width=4", "experts.fgsm=1", "experts.pgd=1", "gate.hidden=8", "pgd.steps=2"),
    *("evaluation.pgd_steps=1,2", "evaluation.fgsm_epsilons=0.01,0.02", *FEW_ITERATIONS),
)
"""Assignments that make an experiment small."""


@dataclass(frozen=True)
class Row:
    """One line of the report.

    Attributes:
        what: was measured.
        value: of it; text where there is nothing to measure, which says why.
        unit: of the value.
        predicted: for an H100 at full size, before anything was measured; None: no prediction was made.
    """

    what: str
    value: float | bool | str
    unit: str = ""
    predicted: float | bool | None = None

    def __str__(self) -> str:
        value = f"{self.value:.4g}" if type(self.value) in (int, float) else str(self.value)
        predicted = "" if self.predicted is None else f"   (predicted for an H100: {self.predicted})"
        return f"  {self.what:<44} {value} {self.unit}".rstrip() + predicted


@dataclass(frozen=True)
class Setup:
    """What is measured on.

    Attributes:
        device: a GPU or the CPU.
        quick: small sizes, which show that a section works and say nothing about speed.
    """

    device: torch.device
    quick: bool

    @property
    def is_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def batch(self) -> int:
        """Images of a training step."""
        return 8 if self.quick else 128

    @property
    def shape(self) -> Shape:
        """(channels, height, width) of a random image."""
        return (3, 8, 8) if self.quick else (3, 32, 32)

    @property
    def repeats(self) -> int:
        """Measurements that a median is taken of."""
        return 1 if self.quick else 10

    def experiment(self, *settings: str) -> Experiment:
        """The product's settings for CIFAR-10: width 64, nine experts, PGD of ten iterations; of `--quick`, smaller."""
        from dwf_cluster.presets import build

        sizes = QUICK if self.quick else ("pgd.steps=10",)
        batch = (f"experts.batch_size={self.batch}", f"joint.batch_size={self.batch}")
        return build("cifar10", 0, ["evaluation.probe_examples=512", *sizes, *batch, *settings])

    def random_images(self, batches: int) -> Images:
        """Batches of random images: the time of a step does not depend on them."""
        random = np.random.default_rng(0)
        x = random.integers(0, 256, (batches * self.batch, *self.shape)).astype(np.uint8)
        y = np.arange(len(x)) % 10
        return Images(x, y, x[:1], y[:1], 10, (0.5,) * 3, (0.25,) * 3)

    def model(self, experiment: Experiment, spec: ModelSpec) -> nn.Module:
        """An untrained model on the device, with untrained parents."""
        images = self.random_images(1).format
        parents = {name: untrained(experiment.spec(name), images, 0, {}) for name in spec.parents}
        model = untrained(spec, images, experiment.seed, parents)
        return model.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]

    def milliseconds(self, work: Callable[[], object], calls: int = 1) -> float:
        """Median time of a call.

        Args:
            work: to call.
            calls: at once, of which the mean is taken: where the device waits for the host between single calls.
        """
        for _ in range(1 if self.quick else WARM_UPS):
            work()
        return statistics.median(self._once(work, calls) for _ in range(self.repeats)) / calls

    def _once(self, work: Callable[[], object], calls: int) -> float:
        if not self.is_cuda:
            clock = time.perf_counter()
            for _ in range(calls):
                work()
            return 1000 * (time.perf_counter() - clock)
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end))

    def captured(self, work: Callable[[], None]) -> Callable[[], None]:
        """The kernels that `work` launches as one CUDA graph; on a CPU, which has none, `work` itself.

        Args:
            work: computes on the same tensors at each call, and never waits for the device.
        """
        return GraphCapture()(work) if self.is_cuda else work


def random_batch(setup: Setup, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [0, 1], shape (count, channels, height, width), channels last, and their labels, on the device."""
    generator = torch.Generator().manual_seed(count)
    x = torch.rand((count, *setup.shape), generator=generator).to(setup.device)
    return x.contiguous(memory_format=torch.channels_last), torch.arange(count, device=setup.device) % 10


@contextmanager
def float32_as(precision: str, *, products: bool = False) -> Iterator[None]:
    """Compute a GPU's float32 convolutions with TF32 (`tf32`), or without (`ieee`, `bf16`).

    Args:
        precision: one of `PRECISIONS`.
        products: matrix products too; else without TF32, as the product's.
    """
    # torch's newer `fp32_precision` must not be mixed with these, which other code reads.
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = products and precision == "tf32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def attacked(model: nn.Module, precision: str) -> nn.Module:
    """The model as attacks of a training in this precision see it, one of `PRECISIONS`."""
    return FrozenModel(model, dtype=torch.bfloat16 if precision == "bf16" else None)()


class _Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that compute: on a GPU each is a kernel, and the bias of a convolution one of its own."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.count += 2 if func.name() == "aten::convolution" else 1
        return func(*args, **(kwargs or {}))


def kernels(work: Callable[[], object], device: torch.device) -> int:
    """How many kernels `work` launches on a GPU; on a CPU, how many it would launch there, roughly."""
    if device.type != "cuda":
        with _Operations() as operations:
            work()
        return int(operations.count)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        work()
        torch.cuda.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events() or ())


def waits(work: Callable[[], object]) -> int:
    """How often the host waits for the GPU during `work`."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
