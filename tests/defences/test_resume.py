"""Every method and every backbone: a training that is interrupted twice ends with the bits of an uninterrupted one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import load
from dwf_cluster.defences.build import untrained
from dwf_cluster.defences.registry import METHODS, ModelSpec
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.registry import BACKBONES
from dwf_cluster.presets import build
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.training.loop import Stopped, train

from ..conftest import TINY, task_for
from ..gloo import run_workers

FEW = [*TINY, "data.test_examples=4", "evaluation.probe_examples=4", "evaluation.probe_steps=1", "trades.steps=2"]
TRAINED = sorted(name for name, method in METHODS.items() if method.losses is not None and method.group != "user")
FORMS = {
    "dwf": (["gate.kind=soft"], ["gate.kind=hard"]),
    "soe": (["soe.attack=together"], ["soe.attack=one_by_one"]),
    "advmoe": ([], ["advmoe.router_objective=trades"], ["advmoe.router=per-layer"]),
    "pgd": (["pgd.random_start=true"],),
}
"""Settings of methods that can be trained in several ways; every other method has one."""
METHOD_FORMS = [
    pytest.param(name, form, id=" ".join([name, *form])) for name in TRAINED for form in FORMS.get(name, [[]])
]


class Interrupted(Exception):
    pass


def _of_a_method(name: str, form: list[str]) -> tuple[Experiment, ModelSpec]:
    """The first model that a method trains, in an experiment with two batches of eight images."""
    rows = [] if METHODS[name].needs_parents else [f"baselines={name}"]
    sizes = ["data.train_examples=16", "experts.batch_size=8", "joint.batch_size=8", "soe.steps=2", "free.replays=2"]
    experiment = build("digits", 0, [*FEW, *sizes, *rows, *form])
    return experiment, next(spec for spec in experiment.models if spec.method == name)


def _of_a_backbone(name: str) -> tuple[Experiment, ModelSpec]:
    """A network of the smallest width from 4 on, on two batches of two images as small as it and the digits allow."""
    backbone = BACKBONES[name]
    width = next(width for width in range(4, 65) if backbone.has_width(width))
    padding = math.ceil(max(0, backbone.smallest - 8) / 2)
    sizes = [f"model.width={width}", f"data.padding={padding}", "data.train_examples=4", "experts.batch_size=2"]
    sizes += ["experts.learning_rate=0.001"]  # a larger one diverges, because BatchNorm sees only two images
    experiment = build("digits", 0, [*FEW, *sizes, f"baselines={name}"])
    return experiment, experiment.spec(name)


def _train(
    experiment: Experiment, spec: ModelSpec, store: Store, first: float, **options: Callable[..., Any]
) -> dict[str, Any]:
    """Train for two epochs from weights that are all `first` or, if it is NaN, from the model's own.

    Returns:
        The final tensors of the model, and of the momentum by the number of the parameter.
    """
    images = load(experiment.data, Path())
    parents = {name: untrained(experiment.spec(name), images.format, 0, {}) for name in spec.parents}
    model = untrained(spec, images.format, experiment.seed, parents)
    for tensor in () if math.isnan(first) else model.state_dict().values():
        tensor.fill_(first)
    task = task_for(experiment, store, spec.name, **options)
    task = replace(task, spec=replace(spec, training=spec.training.model_copy(update={"epochs": 2})))
    optimizers: list[Optimizer] = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: optimizers.append(optimizer))
    try:
        train(task, model, DeviceImages(images, experiment.data, torch.device("cpu")))
    finally:
        hook.remove()
    states = optimizers[-1].state_dict()["state"].items()  # without momentum: of an expert that had no images yet
    momentum = {f"momentum of {n}": state["momentum_buffer"] for n, state in states if "momentum_buffer" in state}
    return model.state_dict() | momentum


def _metrics(store: Store) -> list[dict[str, Any]]:
    """The rows of `metrics` without their timings."""
    return tables.read(store, "metrics").drop_columns(["seconds", "images_per_second"]).to_pylist()


def _assert_resumed_equals_uninterrupted(folder: Path, experiment: Experiment, spec: ModelSpec) -> None:
    """Stop in the middle of an epoch; resume and stop after it; then resume to the end, each time in a new loop."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    stores = [Store(str(folder), f"{spec.name}-{name}", labels=experiment.labels) for name in ("whole", "interrupted")]
    whole = _train(experiment, spec, stores[0], math.nan)

    steps = itertools.count(1)
    last_rank = dist.get_world_size() - 1 if dist.is_initialized() else 0
    with pytest.raises(Stopped):
        _train(experiment, spec, stores[1], math.nan, stopping=lambda: next(steps) == 1 and rank == last_rank)
    _wait_for_the_first_worker()
    saved = checkpoints.load_latest(stores[1], spec.name)
    assert saved is not None
    assert (saved.epoch, saved.state["steps"]) == (0, 1)

    def interrupt(row: dict[str, Any]) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        _train(experiment, spec, stores[1], 3, on_epoch=interrupt)
    _wait_for_the_first_worker()
    assert checkpoints.latest_epoch(stores[1], spec.name) == 1
    resumed = _train(experiment, spec, stores[1], 5)

    assert resumed.keys() == whole.keys()
    assert not [name for name, tensor in whole.items() if not torch.equal(resumed[name], tensor)]
    _wait_for_the_first_worker()
    assert _metrics(stores[1]) == _metrics(stores[0])
    assert len(_metrics(stores[0])) == 2


def _wait_for_the_first_worker() -> None:
    """It writes checkpoints and metrics."""
    if dist.is_initialized():
        dist.barrier()


@pytest.mark.parametrize(("name", "form"), METHOD_FORMS)
def test_a_training_by_every_method_resumes_bit_for_bit(tmp_path: Path, name: str, form: list[str]) -> None:
    _assert_resumed_equals_uninterrupted(tmp_path, *_of_a_method(name, form))


@pytest.mark.parametrize("name", BACKBONES)
def test_a_training_of_every_backbone_resumes_bit_for_bit(tmp_path: Path, name: str) -> None:
    _assert_resumed_equals_uninterrupted(tmp_path, *_of_a_backbone(name))


WITH_STATE = {"free": [], "advmoe": ["advmoe.router=per-layer"]}
"""Methods whose training has more than the weights of one network and its momentum."""


def _two_workers(folder: Path) -> None:
    for name, form in WITH_STATE.items():
        _assert_resumed_equals_uninterrupted(folder, *_of_a_method(name, form))
    _assert_resumed_equals_uninterrupted(folder / "trades", *_of_a_method("advmoe", ["advmoe.router_objective=trades"]))


def test_trainings_with_two_workers_resume_bit_for_bit(tmp_path: Path) -> None:
    run_workers(2, _two_workers, tmp_path)
