"""Checkpoints that do not hold training up: their tensors are copied, and a thread writes the copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch


class BackgroundWriter:
    """Writes in a thread, one write at a time. As a context manager, it ends when the last write has ended.

    The error of a write is raised, as it is, by the next `start` or `join`, or at the end of the context.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        # An error of the write came before the one that ends the context, which becomes its `__context__`.
        with self._thread:
            self.join()

    def start(self, write: Callable[[], None]) -> None:
        """Call `write` in the thread, after the write before has ended."""
        self.join()
        self._writing = self._thread.submit(write)

    def join(self) -> None:
        """Wait for the running write, if there is one."""
        writing, self._writing = self._writing, None
        if writing:
            writing.result()


def copy_to_host(tensors: Mapping[str, torch.Tensor]) -> Callable[[], dict[str, torch.Tensor]]:
    """Copy tensors to the CPU's memory, as they are now; later changes of the tensors do not change the copies.

    Copies from CUDA go to pinned memory, on the current stream: before whatever this thread computes next there.

    Args:
        tensors: by name, on any devices.

    Returns:
        A function that waits for the copies and returns them, which another thread may call.
    """
    copies, copied = dict[str, torch.Tensor](), list[torch.cuda.Event]()
    for name, tensor in tensors.items():
        source = tensor.detach()
        if source.is_cuda:
            pinned = torch.empty_like(source, device="cpu", pin_memory=True)
            copies[name] = pinned.copy_(source, non_blocking=True)
        else:
            copies[name] = source.clone()
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        # The waiting thread sleeps, so it takes no time from training.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        copied.append(event)

    def wait() -> dict[str, torch.Tensor]:
        for event in copied:
            event.synchronize()
        return copies

    return wait
