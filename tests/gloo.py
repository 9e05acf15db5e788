"""Processes that form a process group, of gloo or of NCCL with a GPU each, as Ray Train's workers do."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_workers(count: int, work: Callable[..., None], folder: Path, *arguments: Any, backend: str = "gloo") -> None:
    """Run `work(folder, *arguments)` on each of `count` workers; all of them must succeed."""
    context = multiprocessing.get_context("spawn")
    workers = [
        context.Process(target=_enter, args=(rank, count, backend, work, folder, arguments)) for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * count


def _enter(
    rank: int, count: int, backend: str, work: Callable[..., None], folder: Path, arguments: tuple[Any, ...]
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=count)
    work(folder, *arguments)
    if dist.is_initialized():  # `work` may have ended it
        dist.destroy_process_group()
    # DDP keeps gloo's threads alive. A thread that releases a tensor while the interpreter is finalized aborts the
    # process. So the process exits without finalization, as Ray's workers do.
    os._exit(0)
