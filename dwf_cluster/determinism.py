"""Counter-based randomness, and the settings that make equal runs equal bit for bit.

Every draw comes from a generator that is seeded from the draw's purpose. So no generator's state needs saving, and a
resumed run draws the same values as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Draws:
    """The random draws of one step of one model.

    Attributes:
        key: seed, model, epoch, step. Different keys give unrelated draws.
        first: position in the batch of the first image of the part that is computed here; only `generators` depend
            on it.
    """

    key: tuple[int | str, ...]
    first: int = 0

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator for one purpose (`order`, `crop`, `epsilon`, `start`, ...)."""
        digest = hashlib.sha256(repr((*self.key, purpose)).encode()).digest()
        generator = torch.Generator(device=device)
        return generator.manual_seed(int.from_bytes(digest[:8], "big") >> 1)

    def choice(self, purpose: str, values: Sequence[T]) -> T:
        """One of `values`, each equally likely."""
        return values[int(torch.randint(len(values), (), generator=self.generator(purpose)))]

    def uniform(self, purpose: str, low: float, high: float) -> float:
        """A number of [low, high), each equally likely; `low` if both are equal."""
        share = torch.rand((), generator=self.generator(purpose), dtype=torch.float64)
        return low + (high - low) * float(share)

    def generators(self, purpose: str, images: int) -> list[torch.Generator]:
        """A generator for each of the first n images of the part: no draw depends on how the batch is cut."""
        return [self.generator(f"{purpose} of image {self.first + number}") for number in range(images)]


def make_deterministic(threads: int, *, tf32: bool = False) -> None:
    """Choose deterministic kernels and a fixed number of CPU threads in this process.

    Call it before the first use of CUDA and before the first collective operation, which read the environment.

    Args:
        threads: of the CPU.
        tf32: whether a GPU's convolutions round their float32 inputs to TF32, 10 bits instead of 23. Products of
            matrices never do.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Sums computed by NVLink switches (NVLS, on HGX nodes) differ from call to call.
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    torch.use_deterministic_algorithms(True)
    # A debugging aid that costs 3 %.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # torch's newer setting, `fp32_precision`, changes what its kernels do but not what these report: reading them, as
    # `torch.backends.cudnn.flags` does, would then be an error. These change both.
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_num_threads(threads)
