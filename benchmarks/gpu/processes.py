"""The section of several processes that share a GPU, with and without NVIDIA's Multi-Process Service (MPS)."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.gpu.measure import Row, Setup, attacked, float32_as, random_batch
from benchmarks.gpu.speed import begun_iteration
from dwf_cluster.determinism import make_deterministic

_CONTROL = "nvidia-cuda-mps-control"


def processes(setup: Setup) -> Iterator[Row]:
    """Images that processes attack in all, each on an expert of its own: what a share of a GPU is good for."""
    counts = (2,) if setup.quick else (1, 2, 3, 4)
    for count in counts:
        yield Row(f"{count} processes", _images_per_second(setup, count), "images/s")
    if not setup.is_cuda or shutil.which(_CONTROL) is None:
        yield Row("with MPS", f"nothing: there is no {_CONTROL}" if setup.is_cuda else "nothing: MPS is for GPUs")
        return
    with _mps():
        for count in counts[1:]:
            yield Row(f"{count} processes with MPS", _images_per_second(setup, count), "images/s")


@contextmanager
def _mps() -> Iterator[None]:
    """A server of our own while the body runs; processes that start meanwhile use it."""
    with tempfile.TemporaryDirectory() as folder:
        names = ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY")
        os.environ.update(dict.fromkeys(names, folder))
        try:
            subprocess.run([_CONTROL, "-d"], check=True)
            try:
                yield
            finally:
                subprocess.run([_CONTROL], input="quit\n", text=True, check=True)
        finally:
            for name in names:
                del os.environ[name]


def _images_per_second(setup: Setup, count: int) -> float:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(count), context.SimpleQueue()
    workers = [context.Process(target=_attack, args=(setup, barrier, results)) for _ in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if failed := [worker.exitcode for worker in workers if worker.exitcode]:
        raise RuntimeError(f"{len(failed)} of {count} processes failed")
    measured = [results.get() for _ in workers]
    slowest = max(seconds for _, seconds in measured)
    return float(sum(images for images, _ in measured) / slowest)


def _attack(setup: Setup, barrier: Any, results: Any) -> None:
    """Run in each process: iterations of PGD that begin when all processes are ready."""
    make_deterministic(1)
    experiment = setup.experiment()
    view = attacked(setup.model(experiment, experiment.spec("benign")), "tf32")
    work = begun_iteration(view, *random_batch(setup, setup.batch))
    iterations = 3 if setup.quick else 500
    with float32_as("tf32"):
        setup.milliseconds(work)
        barrier.wait(timeout=300)
        clock = time.perf_counter()
        for _ in range(iterations):
            work()
        if setup.is_cuda:
            torch.cuda.synchronize()
        results.put((iterations * setup.batch, time.perf_counter() - clock))
