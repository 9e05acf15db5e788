"""ADVMoE's training: losses against a slow implementation, alternating updates, resuming, workers, dead experts."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import analysis
from analysis.report import Section
from dwf_cluster.console.tables import results
from dwf_cluster.data.device import DeviceImages, to_float
from dwf_cluster.data.sources import Images, load
from dwf_cluster.defences import advmoe
from dwf_cluster.defences.build import to_train, untrained
from dwf_cluster.defences.registry import METHODS
from dwf_cluster.determinism import Draws
from dwf_cluster.evaluation.registry import PAPER, ROUTE
from dwf_cluster.evaluation.run import evaluate
from dwf_cluster.evaluation.subject import Subject, with_route
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.advmoe import AdvMoE, Router
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.registry import BACKBONES
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import Store, tables
from dwf_cluster.training.loop import NonFiniteLoss, Stopped, train
from dwf_cluster.training.probe import run_probe
from dwf_cluster.training.step import Batch, attacked_model, train_batch

from ..conftest import TINY, task_for
from ..gloo import run_workers

CPU = torch.device("cpu")
ROW = [*TINY, "baselines=advmoe", "experts.epochs=2"]
VARIANTS = pytest.mark.parametrize("objective", ["label-modulo", "trades"])
ROUTERS = pytest.mark.parametrize("router", ["shared", "per-layer"])


def _experiment(*assignments: str) -> Experiment:
    return build("digits", 0, [*ROW, *assignments])


def _untrained(experiment: Experiment, images: Images) -> AdvMoE:
    model = to_train(experiment.models, "advmoe", images.format, 0, Store("unused", "unused"))
    assert isinstance(model, AdvMoE)
    return model


def _train(folder: Path, name: str, *assignments: str, stopping: Callable[[], bool] = lambda: False) -> nn.Module:
    """Two epochs of three batches of 32 images."""
    experiment = _experiment(*assignments)
    images = load(experiment.data, folder)
    store = Store(str(folder), name, labels=experiment.labels)
    task = task_for(experiment, store, "advmoe", stopping=stopping)
    return train(task, _untrained(experiment, images), DeviceImages(images, experiment.data, CPU))


def _slow_attack(model: AdvMoE, x: torch.Tensor, draws: Draws, purpose: str, epsilon: float) -> torch.Tensor:
    """Two steps of 5/8 epsilon from Gaussian noise, on the sum of both divergences."""
    model = copy.deepcopy(model).eval()

    def outputs(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return model(x).log_softmax(1), model.gate.scores(x).log_softmax(2)

    clean, clean_scores = (output.detach() for output in outputs(x))
    noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in draws.generators(purpose, len(x))])
    point = (x + 0.001 * noise.to(x.dtype)).clamp(0, 1)
    for _ in range(2):
        point = point.detach().requires_grad_()
        moved, moved_scores = outputs(point)
        loss = F.kl_div(moved, clean, log_target=True, reduction="sum")
        loss = loss + F.kl_div(moved_scores, clean_scores, log_target=True, reduction="sum") / clean_scores.shape[1]
        (gradient,) = torch.autograd.grad(loss, point)
        point = point.detach() + 5 / 8 * epsilon * gradient.sign()
        point = point.clamp(x - epsilon, x + epsilon).clamp(0, 1)
    return point


@ROUTERS
@VARIANTS
def test_both_losses_and_their_gradients_are_those_of_a_slow_implementation(
    images: Images, objective: str, router: str
) -> None:
    experiment = _experiment(f"advmoe.router_objective={objective}", f"advmoe.router={router}", "advmoe.experts=3")
    spec, epsilon = experiment.spec("advmoe"), experiment.pgd.epsilon
    model = _untrained(experiment, images).double()
    x, y = DeviceImages(images, experiment.data, CPU).train_batch(torch.arange(16), Draws((0, "crop")))
    x, draws = x.double(), Draws((0, "advmoe", 0, 0))
    slow = copy.deepcopy(model)
    generator = advmoe.losses(spec, model, lambda: frozen(model), x, y, draws)

    for purpose in ("start", "router start"):
        loss = next(generator)
        loss.total.backward()  # type: ignore[no-untyped-call]
        assert loss.name == {"start": "the loss", "router start": "the router's loss"}[purpose]
        assert loss.rows == 16
        moved = _slow_attack(slow, x, draws, purpose, epsilon)
        both = torch.cat([x, moved])
        if purpose == "start" or objective == "trades":
            logits = slow(both)
            expected = F.cross_entropy(logits[:16], y, reduction="sum") + 6 * F.kl_div(
                logits[16:].log_softmax(1), logits[:16].softmax(1), reduction="sum"
            )
        else:
            scores = slow.gate.scores(both)
            expected = torch.zeros(())
            for vector in scores.unbind(1):
                own = F.cross_entropy(vector[:16], y % 3, reduction="sum") + F.kl_div(
                    vector[16:].log_softmax(1), vector[:16].softmax(1), reduction="sum"
                )
                expected = expected + 6 * own / scores.shape[1]
        torch.testing.assert_close(loss.total, expected)
        expected.backward()  # type: ignore[no-untyped-call]
        is_router = purpose == "router start"
        for (name, one), other in zip(model.named_parameters(), slow.named_parameters(), strict=True):
            if name.startswith("gate.") == is_router:
                torch.testing.assert_close(one.grad, other[1].grad, msg=name)
            else:
                assert one.grad is None, name
        model.zero_grad()
        slow.zero_grad()
        assert all(parameter.requires_grad for parameter in model.parameters())
    assert next(generator, None) is None


@VARIANTS
def test_the_first_step_leaves_the_router_and_the_second_one_changes_only_the_router(
    images: Images, objective: str
) -> None:
    experiment = _experiment(f"advmoe.router_objective={objective}")
    spec, model = experiment.spec("advmoe"), _untrained(experiment, images)
    data = DeviceImages(images, experiment.data, CPU)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    states = [{name: p.detach().clone() for name, p in model.named_parameters()}]
    step = optimizer.step

    def recorded() -> None:
        step()
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})

    with mock.patch.object(optimizer, "step", recorded):
        for batch in range(2):  # the second one with momentum
            drawn = Batch(torch.arange(32), Draws((0, batch)))
            train_batch(spec, model, attacked_model(spec, model), optimizer, data, drawn, is_stopping=False)
    assert len(states) == 5
    for number, (before, after) in enumerate(itertools.pairwise(states)):
        changed = {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}
        assert {name.startswith("gate.") for name in changed} == {number % 2 == 1}


def test_a_resumed_training_ends_with_the_bits_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = _train(tmp_path, "whole").state_dict()
    calls = itertools.count(1)
    with pytest.raises(Stopped):
        _train(tmp_path, "stopped", stopping=lambda: next(calls) == 2)
    resumed = _train(tmp_path, "stopped").state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    one, other = (tables.read(Store(str(tmp_path), name), "metrics") for name in ("whole", "stopped"))
    timings = ["seconds", "images_per_second"]
    assert one.drop_columns(timings) == other.drop_columns(timings)
    for row in one.to_pylist():
        assert sum(row["expert_shares"]) == pytest.approx(1)
        assert len(row["expert_shares"]) == 2


BY_BATCH = ("advmoe.router_objective=trades", "experts.attack_batchnorm=train")


def _two_workers(folder: Path) -> None:
    """Train both objectives, one of them with an interruption; save what each worker holds."""
    calls = itertools.count(1)
    with pytest.raises(Stopped):
        _train(folder, "released", "experts.epochs=1", stopping=lambda: next(calls) == 2 and dist.get_rank() == 1)
    dist.barrier()  # the first worker has saved
    for name, assignments in (("released", ()), ("trades", BY_BATCH)):
        model = _train(folder, name, *assignments, "experts.epochs=1")
        torch.save(model.state_dict(), folder / f"{name}-{dist.get_rank()}.pt")


def test_two_workers_hold_equal_models_that_follow_one_worker_on_two_halves(tmp_path: Path) -> None:
    """BatchNorm normalises each half by its own statistics, so one worker accumulates two halves.

    Its running statistics then are not those of two workers; so attacks in this comparison use none.
    """
    run_workers(2, _two_workers, tmp_path)
    for name in ("released", "trades"):
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt") for rank in range(2))
        assert all(torch.equal(second[key], tensor) for key, tensor in first.items())
        assert all(bool(tensor.isfinite().all()) for tensor in first.values())
    one = _train(tmp_path, "one", *BY_BATCH, "experts.epochs=1", "experts.accumulation=2").state_dict()
    for key, tensor in one.items():
        if "running" not in key and "tracked" not in key:
            torch.testing.assert_close(first[key], tensor, rtol=1e-3, atol=1e-4, msg=key)


def test_router_scores_that_are_not_finite_end_the_run_with_a_line_that_names_them(
    images: Images, store: Store
) -> None:
    experiment = _experiment()
    model = _untrained(experiment, images)
    nn.init.constant_(model.gate.classifier.bias, torch.nan)
    task = task_for(experiment, store, "advmoe")
    with pytest.raises(NonFiniteLoss) as error:
        train(task, model, DeviceImages(images, experiment.data, CPU))
    line = "the router's scores contain NaN or infinity in epoch 1, step 1 of advmoe; last good checkpoint: none"
    assert str(error.value) == line


class NanInTraining(Router):
    """A router whose scores are NaN in training mode, as after an overflow that evaluation mode does not see."""

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        scores = super().scores(x)
        return scores * torch.nan if self.training else scores


def test_a_router_loss_that_is_not_finite_ends_the_run_with_a_line_that_names_it(images: Images, store: Store) -> None:
    experiment = _experiment()
    model = _untrained(experiment, images)
    model.gate = NanInTraining(images.format, experiment.model.width, 2, 1)
    task = task_for(experiment, store, "advmoe")
    with pytest.raises(NonFiniteLoss) as error:
        train(task, model, DeviceImages(images, experiment.data, CPU))
    assert str(error.value) == ("the router's loss became nan in epoch 1, step 1 of advmoe; last good checkpoint: none")


def test_an_expert_without_images_is_a_warning_in_the_result(
    tmp_path: Path, images: Images, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = _experiment("experts.epochs=1", "advmoe.experts=3", "advmoe.router_learning_rate=1e-9")
    store = experiment.store(str(tmp_path))
    model = _untrained(experiment, images)
    model.gate.classifier.bias.data = torch.tensor([0.0, 1000.0, 0.0])
    train(task_for(experiment, store, "advmoe"), model, DeviceImages(images, experiment.data, CPU))
    (row,) = tables.read(store, "metrics").to_pylist()
    assert row["expert_shares"] == [0, 1, 0]
    benign = replace(task_for(experiment, store, "benign"), store=store)
    train(
        benign,
        to_train(experiment.models, "benign", images.format, 0, store),
        DeviceImages(images, experiment.data, CPU),
    )
    rows = tables.read(store, "metrics").to_pylist()
    assert {row["model"]: row["expert_shares"] for row in rows}["benign"] is None
    tables.write(store, "evaluations", "all", [{"model": "advmoe", "attack": "clean", "examples": 40, "accuracy": 0.5}])
    results(Console(file=io.StringIO()), experiment, store)
    warnings = [line for line in capsys.readouterr().out.splitlines() if "no image" in line]
    sentences = [f"advmoe: its gate gives expert {number} of 3 no image of the probe in epoch 1" for number in (1, 3)]
    assert warnings == [f"warning: {sentence}" for sentence in sentences]
    store.write("experiment.json", experiment.to_json().encode())
    (group,) = analysis.load(str(tmp_path)).groups
    section = Section(group, *[mock.Mock()] * 5)  # the sentences need nothing else
    assert section.dead_experts == [f"Warning: seed 0, {sentence}." for sentence in sentences]


def test_the_probe_measures_the_shares_of_every_model_with_a_gate(images: Images) -> None:
    experiment = _experiment("baselines=advmoe,soe")
    data = DeviceImages(images, experiment.data, CPU)
    untrained_parents = {
        name: untrained(experiment.spec(name), images.format, 0, {}) for name in experiment.defended.parents
    }
    for name in ("advmoe", "soe", "mixture"):
        spec = experiment.spec(name)
        model = untrained(spec, images.format, 0, {parent: untrained_parents[parent] for parent in spec.parents})
        shares = run_probe(model, data, task_for(experiment, Store("unused", "unused"), name).probe).expert_shares
        x, _, _ = data.probed(experiment.evaluation.probe_examples)
        expected = model.eval().get_submodule("gate")(x).mean(0)
        torch.testing.assert_close(torch.tensor(shares), expected.detach())


@ROUTERS
def test_every_suite_of_a_mixture_measures_it(images: Images, router: str) -> None:
    experiment = _experiment(f"advmoe.router={router}", "advmoe.experts=3")
    model = _untrained(experiment, images).double()
    x = images.x_test[:12]
    y = model.eval()(to_float(torch.tensor(x)).double()).argmax(1).numpy()
    suites = experiment.suites(experiment.spec("advmoe"))
    assert with_route(Subject(model, x, y, CPU, 10), (PAPER,))[0] == (PAPER, ROUTE)
    assert {PAPER, "pgd_gate", "pgd_expert", "pgd_route", "experts"} <= set(suites)
    for suite in suites[:-1]:  # the last one is `checks`
        rows, predictions = evaluate(
            {"advmoe": model}, "advmoe", suite, x, y, experiment.evaluation, experiment.threats, seed=0, device=CPU
        )
        assert rows
        assert {len(row["gate"]) for row in predictions if row["gate"] is not None} == {3}


def test_planned_passes_are_within_ten_percent_of_the_known_cost() -> None:
    """Twice a clean training of a ResNet-18, with 2 experts of half the width."""
    spec = build("cifar10", 0, ["baselines=advmoe"]).spec("advmoe")
    method, plain = METHODS["advmoe"], build("cifar10", 0, []).spec("benign")
    shape = (3, 32, 32)
    cost = method.passes(spec) * method.flops(spec, shape) / spec.networks
    standard = METHODS["standard"]
    assert cost / (standard.passes(plain) * standard.flops(plain, shape)) == pytest.approx(2.0, rel=0.1)


def test_the_row_is_a_recipe_with_a_rate_for_its_router_and_moves_no_signature() -> None:
    spec = _experiment("advmoe.router_learning_rate=0.02", "pgd.epsilon=0.08").spec("advmoe")
    assert spec.own_rates == (("gate", 0.02, 5e-4),)
    assert spec.option("step_size") == pytest.approx(0.05)
    assert build("digits", 0, []).folder == "digits-seed0-ce2d226613"
    assert build("digits", 0, ["advmoe.experts=3"]).signature != build("digits", 0, []).signature


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1])
def test_the_wide_row_is_advmoe_with_pathways_of_the_width_of_resnet_18_whatever_the_ratio_is(ratio: float) -> None:
    experiment = build("cifar10", 0, ["baselines=advmoe,advmoe-wide", f"advmoe.ratio={ratio}", "advmoe.experts=3"])
    narrow, wide = experiment.spec("advmoe"), experiment.spec("advmoe-wide")
    assert (narrow.option("ratio"), wide.option("ratio")) == (ratio, 1)
    assert replace(wide, name="advmoe", options=narrow.options) == narrow
    assert {**dict(wide.options), "ratio": ratio} == dict(narrow.options)
    plain = BACKBONES["resnet18"].flops(64, (3, 32, 32))
    router = METHODS["advmoe"].flops(wide, (3, 32, 32)) - plain
    assert 0 < router < 0.1 * plain  # a pathway costs what ResNet-18 costs


def test_another_backbone_is_refused_in_one_line() -> None:
    with mock.patch.dict(BACKBONES, other=BACKBONES["resnet18"]), pytest.raises(InvalidInput) as error:
        _experiment("model.backbone=other")
    assert str(error.value).endswith("model.backbone: 'other' cannot be used with advmoe: allowed is resnet18")
