"""Sections that measure speed: limits of the device, training steps, iterations of an attack, the parts around them."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.measure import (
    PRECISIONS,
    Row,
    Setup,
    attacked,
    float32_as,
    kernels,
    random_batch,
    waits,
)
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.graph import Iteration
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.defences.registry import METHODS, ModelSpec
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Experts, Mixture
from dwf_cluster.plan.jobs import EVALUATE, EXPERTS, JOINT, STAGES, forward_flops
from dwf_cluster.plan.speeds import kernel_count, recorded
from dwf_cluster.store import Store, checkpoints
from dwf_cluster.training.loop import Task, train
from dwf_cluster.training.probe import Probe, run_probe

BALL, STEP_SIZE = Ball("linf", 8 / 255), 2 / 255


def ceilings(setup: Setup) -> Iterator[Row]:
    """What the device can do at most: products of large matrices, and copies."""
    n = 256 if setup.quick else 8192
    for name, dtype, precision, predicted in (
        ("bfloat16", torch.bfloat16, "bf16", 800.0),
        ("float32 with TF32", torch.float32, "tf32", None),
    ):
        a, b = (torch.randn(n, n, device=setup.device, dtype=dtype) for _ in range(2))
        with float32_as(precision, products=True):
            milliseconds = setup.milliseconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        yield Row(f"product of {n}x{n} matrices, {name}", 2e-9 * n**3 / milliseconds, "TFLOP/s", predicted)
    source = torch.empty(2**20 if setup.quick else 2**30, dtype=torch.uint8, device=setup.device)
    target = torch.empty_like(source)
    milliseconds = setup.milliseconds(lambda: target.copy_(source))
    yield Row("copy, bytes read and written", 2e-9 * len(source) / milliseconds, "TB/s", 3.0)


def _train(setup: Setup, experiment: Experiment, name: str, steps: int) -> list[float]:
    """Train a model on random images with TF32, in epochs of `steps` steps; seconds of each epoch."""
    spec, seconds = experiment.spec(name), list[float]()
    images = DeviceImages(setup.random_images(steps), experiment.data, setup.device)
    with tempfile.TemporaryDirectory() as folder, float32_as("tf32"):
        store = Store(folder, "benchmark", labels=experiment.labels)
        probe = Probe(experiment.threat, 1, 2)
        stage = JOINT if spec.parents else EXPERTS
        train(
            Task(spec, stage, 0, probe, 60.0, store, lambda row: seconds.append(row["seconds"])),
            setup.model(experiment, spec),
            images,
        )
    return seconds


def training(setup: Setup, precision: str) -> Iterator[Row]:
    """A step of the product's training loop.

    Args:
        setup: device and sizes.
        precision: of experts and joint stage.
    """
    in_precision = (f"experts.precision={precision}", f"joint.precision={precision}")
    long, short = (2, 1) if setup.quick else (20, 10)
    for name, epochs in (("benign", 3), ("fgsm-1", 3), ("pgd-1", 3), ("mixture", 2)):
        settings = [f"{stage}.epochs={1 if setup.quick else epochs}" for stage in ("experts", "joint")]
        experiment = setup.experiment(*settings, *in_precision)
        steps = short if name == "mixture" else long
        *_, seconds = _train(setup, experiment, name, steps)  # the first epochs warm up
        title = step_title(setup, name, precision)
        yield Row(title, 1000 * seconds / steps, "ms", _planned_milliseconds(name, precision))
        once = setup.experiment("experts.epochs=1", "joint.epochs=1", *in_precision)
        one, two = (functools.partial(_train, setup, once, name, n) for n in (1, 2))
        yield Row(f"{title}: kernels", kernels(two, setup.device) - kernels(one, setup.device))
        if setup.is_cuda:
            yield Row(f"{title}: waits of the host", waits(two) - waits(one), "", 6)
    if not setup.is_cuda:
        yield Row("waits of the host", "nothing: the host of a CPU never waits")


def step_title(setup: Setup, name: str, precision: str) -> str:
    """What the row of a training step measures."""
    return f"step of {name}, batch {setup.batch}, {precision}"


def step_flop(setup: Setup, name: str) -> float:
    """Planned floating-point operations of a training step."""
    experiment = setup.experiment()
    spec = experiment.spec(name)
    return METHODS[spec.method].passes(spec) * forward_flops(spec, setup.shape) * spec.training.batch_size


def _planned_milliseconds(name: str, precision: str) -> float:
    """What the plan's recorded speeds of a GPU say of a step at full size."""
    setup = Setup(torch.device("cpu"), quick=False)
    spec = setup.experiment().spec(name)
    speed = recorded("gpu")[JOINT if spec.parents else EXPERTS, precision]
    launched = METHODS[spec.method].passes(spec) / (2 * spec.networks) * kernel_count(spec.networks)
    return float(f"{1000 * max(step_flop(setup, name) / speed.flops, launched * speed.launch):.3g}")


_PREDICTED_ITERATION = {
    ("ieee", "eager", 128): 7.3,
    ("tf32", "eager", 128): 2.9,
    ("bf16", "eager", 128): 2.1,
    ("bf16", "graph", 128): 1.4,
}
"""Milliseconds of one iteration on one expert."""


def begun_iteration(view: nn.Module, x: torch.Tensor, y: torch.Tensor) -> Iteration:
    """The iteration that a training captures, of an attack that begins at the images."""
    begun = Iteration(view, x, y)
    begun.begin(x, x, y, BALL, STEP_SIZE)
    return begun


def _iteration_rows(
    setup: Setup, model: nn.Module, networks: int, batches: tuple[int, ...], predicted: dict[Any, float]
) -> Iterator[Row]:
    """One iteration in every precision, eager and as a graph, and whether both give the same images."""
    flop = 2 * networks * forward_flops(setup.experiment().spec("benign"), setup.shape)
    for precision in PRECISIONS:
        with float32_as(precision):
            view = attacked(model, precision)
            for count in batches:
                x, y = random_batch(setup, count)
                eager, in_graph = (begun_iteration(view, x, y) for _ in range(2))
                replay = setup.captured(in_graph)
                for mode, work in (("eager", eager), ("graph", replay)):
                    milliseconds, title = setup.milliseconds(work, 2 if setup.quick else 10), f"{precision}, {mode}"
                    key = (precision, mode, count)
                    yield Row(f"{title}, batch {count}", milliseconds, "ms", predicted.get(key))
                    yield Row(f"{title}, batch {count}: speed", 1e-9 * flop * count / milliseconds, "TFLOP/s")
                for begun in (eager, in_graph):
                    begun.begin(x, x, y, BALL, STEP_SIZE)
                for _ in range(3):
                    eager()
                    replay()
                is_equal = torch.equal(eager.iterate, in_graph.iterate)
                yield Row(f"{precision}, batch {count}: graph equals eager", is_equal, "", True)


def iteration(setup: Setup) -> Iterator[Row]:
    """One iteration of PGD on one expert."""
    experiment = setup.experiment()
    model = setup.model(experiment, experiment.spec("benign"))
    batches = (4,) if setup.quick else (16, 64, 127, 128, 256, 512, 1024)
    yield from _iteration_rows(setup, model, 1, batches, _PREDICTED_ITERATION)


def mixture(setup: Setup) -> Iterator[Row]:
    """One iteration of PGD on the mixture, its experts one after the other or each on a stream of its own."""
    experiment = setup.experiment()
    model = setup.model(experiment, experiment.defended)
    batches = (2,) if setup.quick else (2, 16, 128)
    predicted = {("tf32", "eager", count): 18.0 for count in (2, 16)} | {("tf32", "eager", 128): 26.0}
    yield from _iteration_rows(setup, model, len(experiment.defended.parents), batches, predicted)
    if not setup.is_cuda:
        yield Row("streams", "nothing: a CPU has none")
        return
    view = attacked(model, "bf16")
    assert isinstance(view, Mixture)
    view.experts = _OnStreams(view.experts)
    for count in batches:
        work = begun_iteration(view, *random_batch(setup, count))
        try:
            milliseconds: float | str = setup.milliseconds(setup.captured(work), 10)
        except RuntimeError as error:
            milliseconds = f"not captured: {str(error).splitlines()[0]}"
        yield Row(f"bf16, graph with streams, batch {count}", milliseconds, "ms")


class _OnStreams(Experts):
    """Experts that run at the same time, each on a CUDA stream of its own."""

    def __init__(self, experts: Experts) -> None:
        super().__init__(experts)
        self._streams = [torch.cuda.Stream() for _ in experts]  # type: ignore[no-untyped-call]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As `models.mixture.Experts`."""
        main, logits = torch.cuda.current_stream(), []
        for expert, stream in zip(self, self._streams, strict=True):
            stream.wait_stream(main)
            with torch.cuda.stream(stream):
                logits.append(expert(x))
        for stream in self._streams:
            main.wait_stream(stream)
        return torch.stack(logits, dim=1)


def parts(setup: Setup) -> Iterator[Row]:
    """What surrounds the attack: folding BatchNorm, the optimiser, a checkpoint, the probe."""
    experiment = setup.experiment()
    spec = experiment.spec("pgd-1")
    model = setup.model(experiment, spec)
    yield Row("frozen model of one expert", setup.milliseconds(lambda: frozen(model)), "ms")
    for name, options in (("foreach", {"foreach": True}), ("fused", {"fused": True})):
        yield Row(f"SGD, {name}", setup.milliseconds(_sgd(model, **options)), "ms")
    yield Row("SGD, foreach, momentum with other strides", setup.milliseconds(_sgd(model, True, foreach=True)), "ms")
    with tempfile.TemporaryDirectory() as folder:
        store, tensors = Store(folder, "benchmark", labels=experiment.labels), model.state_dict()
        save = lambda: checkpoints.save(store, "pgd-1", 1, 0, tensors, {})  # noqa: E731
        milliseconds = [_wall_milliseconds(save) for _ in range(1 if setup.quick else 5)]
        yield Row("checkpoint, written while the device waits", sorted(milliseconds)[len(milliseconds) // 2], "ms")
    examples, steps = (8, 2) if setup.quick else (512, experiment.evaluation.probe_steps)
    images = DeviceImages(setup.random_images(-(-examples // setup.batch)), experiment.data, setup.device)
    probe = Probe(experiment.threat, steps, examples)
    milliseconds_probe = _wall_milliseconds(lambda: run_probe(model, images, probe))
    yield Row(f"probe, {examples} images, {steps} iterations", milliseconds_probe, "ms")


def _sgd(model: nn.Module, has_other_strides: bool = False, **options: bool) -> Callable[[], object]:
    """A step of the product's optimiser, with gradients that are there."""
    parameters = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.9, weight_decay=5e-4, **options)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
        if has_other_strides:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros(parameter.shape, device=parameter.device)
    return optimizer.step


def _wall_milliseconds(work: Callable[[], object]) -> float:
    """Of work that waits for the device itself."""
    clock = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - clock)


def launch_microseconds(setup: Setup) -> dict[str, float]:
    """Time that a kernel takes at least, by stage: of an iteration on so few images that nothing else counts.

    Trainings replay a CUDA graph of it, evaluations launch its kernels one by one.
    """
    if not setup.is_cuda:
        return dict.fromkeys(STAGES, 0.0)
    # A GPU computes two images in less time than their kernels take to launch, in any precision.
    experiment = setup.experiment()

    def of(spec: ModelSpec, captured: Callable[[Callable[[], None]], Callable[[], None]]) -> float:
        work = captured(begun_iteration(frozen(setup.model(experiment, spec)), *random_batch(setup, 2)))
        return 1000 * setup.milliseconds(work, 10) / kernel_count(spec.networks)

    expert, mixture = experiment.spec("benign"), experiment.defended
    return {
        EXPERTS: of(expert, setup.captured),
        JOINT: of(mixture, setup.captured),
        EVALUATE: of(expert, lambda work: work),
    }
