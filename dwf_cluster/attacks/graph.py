"""PGD of the training as a CUDA graph: the kernels of one iteration are captured once and replayed without the host.

The kernels are those of `attacks.pgd` on the same values, so the results are equal bit for bit, and whether a graph is
used is a setting of the machine. The capture itself has not run on a GPU yet.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import check_logits, differentiate
from dwf_cluster.attacks.pgd import Iterate
from dwf_cluster.models.exchange import ExchangedExperts

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes a function that reads and writes tensors which stay; returns one that repeats its kernels on them."""

_ITERATIONS = "_captured_iterations"
"""Attribute of a frozen model: its capture, and its iterations by shape and type of the images."""

_WARM_UPS = 3
"""Calls before a capture, as torch advises: libraries choose kernels and allocate at their first calls."""


def is_used(model: nn.Module, x: torch.Tensor) -> bool:
    """Whether training attacks these images by graphs: on CUDA, unless the environment has `DWF_CUDA_GRAPHS=0`.

    A model whose experts are on several processes is attacked without: their exchange has not been captured yet.
    """
    is_exchanged = any(isinstance(module, ExchangedExperts) for module in model.children())
    return x.is_cuda and not is_exchanged and os.environ.get("DWF_CUDA_GRAPHS") != "0"


class GraphCapture:
    """Captures the kernels of functions as CUDA graphs, which share their memory.

    The functions run one after the other, and none leaves a result in that memory.
    """

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Returns the function that replays the kernels of `run`."""
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run()
        current.wait_stream(stream)
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's, may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            run()
        return graph.replay


class Iteration:
    """One iteration of L-infinity PGD on cross-entropy, with tensors of its own, which stay: a call runs it.

    Attributes:
        iterate: the adversarial images, which each call moves.
        gradient, logits: at the iterate before the last call.

    Args:
        model: frozen model, whose tensors stay too.
        x, y: images and labels of the shapes that it is for.
    """

    def __init__(self, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        self._model = model
        self.iterate, self._lower, self._upper, self._y = x.clone(), x.clone(), x.clone(), y.clone()
        self._step_size = torch.zeros((), dtype=x.dtype, device=x.device)
        self.gradient, self.logits = torch.empty_like(x), torch.empty_like(model(x))

    def begin(self, start: torch.Tensor, x: torch.Tensor, y: torch.Tensor, ball: Ball, step_size: float) -> None:
        """Let the next call be the first iteration of an attack on x, from `start`."""
        for tensor, value in zip((self._lower, self._upper), ball.bounds(x), strict=True):
            tensor.copy_(value)
        self.iterate.copy_(start)
        self._y.copy_(y)
        self._step_size.fill_(step_size)

    def __call__(self) -> None:
        gradient, _, logits = differentiate(self._model, self.iterate, self._y, check=False)
        self.gradient.copy_(gradient)
        self.logits.copy_(logits)
        self.iterate.copy_((self.iterate + self._step_size * gradient.sign()).clamp(self._lower, self._upper))


def pgd(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    ball: Ball,
    *,
    step_size: float,
    steps: int,
    start: torch.Tensor | None = None,
    capture: Callable[[], Capture] = GraphCapture,
) -> Iterator[Iterate]:
    """The first and the last iterate of `attacks.pgd`, in L-infinity on cross-entropy.

    It has eight parameters: those of `attacks.pgd`, and the capture.

    Args:
        model: frozen model. It keeps the captured iterations, one for each shape of images, so as long as it is the
            same module its tensors must be the same too; their values may change (`models.refresh.FrozenModel`).
        x, y, ball, step_size, steps, start: as of `attacks.pgd`; the ball is of L-infinity.
        capture: makes the model's capture, at the first attack on it.

    Yields:
        x_0, with logits and gradient unless `steps` is 0, and x_steps.

    Raises:
        NotLogits: if the model returns NaN or probabilities.
    """
    assert ball.norm == "linf"
    x = x.contiguous(memory_format=torch.channels_last)
    first, index = (x if start is None else start), torch.arange(len(x), device=x.device)
    if steps == 0:
        yield Iterate(0, index, first)
        return
    if _ITERATIONS not in vars(model):
        setattr(model, _ITERATIONS, (capture(), {}))
    capture_of_model, iterations = getattr(model, _ITERATIONS)
    key = (id(model), x.shape, x.dtype, x.device)  # a copy of the model has the same dictionary
    if key not in iterations:
        iteration = Iteration(model, x, y)
        iterations[key] = iteration, capture_of_model(iteration)
    iteration, replay = iterations[key]
    iteration.begin(first, x, y, ball, step_size)  # after the capture, whose calls have moved the images
    replay()
    gradient, logits = iteration.gradient.clone(), iteration.logits.clone()
    for _ in range(steps - 1):
        replay()
    # Both at the end: another attack on the same model may begin before this one is asked for more.
    last = iteration.iterate.clone()
    check_logits(model, logits)
    yield Iterate(0, index, first, logits, gradient, len(index))
    yield Iterate(steps, index, last)
