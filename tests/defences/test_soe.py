"""Synergy of Experts: its losses against the slow, obvious way; trained, resumed, planned, evaluated, analysed."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from analysis import load as load_results
from analysis.figures import FigureData, draw, draw_all
from analysis.predictions import read_predictions
from analysis.tables import make_tables
from analysis.validation import validate
from benchmarks.analysis import make_up
from dwf_cluster import api
from dwf_cluster.attacks import gradient
from dwf_cluster.attacks.settings import Pgd
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.registry import Sizes
from dwf_cluster.data.sources import Images
from dwf_cluster.data.sources import load as load_images
from dwf_cluster.defences import soe
from dwf_cluster.defences.build import to_train, untrained
from dwf_cluster.defences.loss import Loss
from dwf_cluster.defences.registry import METHODS
from dwf_cluster.determinism import Draws
from dwf_cluster.evaluation import run
from dwf_cluster.evaluation.registry import CHECKS
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.soe import SynergyOfExperts
from dwf_cluster.plan.disk_space import stored_bytes
from dwf_cluster.plan.jobs import EVALUATE, EXPERTS, JOINT, jobs
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import Store, tables
from dwf_cluster.training.loop import Stopped, train

from ..conftest import TINY, task_for

SETTINGS = [*TINY, "defence=soe", "baselines=standard", "soe.steps=2", "experts.epochs=2"]
CPU = torch.device("cpu")
SIZES = Sizes(96, 40, (1, 8, 8))


def _experiment(*assignments: str) -> Experiment:
    return build("digits", 0, [*SETTINGS, *assignments])


def _model(experiment: Experiment, images: Images) -> SynergyOfExperts:
    """In double precision, with statistics of random images."""
    model = untrained(experiment.defended, images.format, 0, {}).double().train()
    assert isinstance(model, SynergyOfExperts)
    model(torch.rand(32, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    return model


def _batch(images: Images, count: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(images.x_test[:count]).double() / 255, torch.tensor(images.y_test[:count])


def _slow_loss(outputs: torch.Tensor, y: torch.Tensor, temperature: float, weight: float) -> torch.Tensor:
    """The mean over images, image by image and sub-model by sub-model."""
    total = torch.zeros((), dtype=outputs.dtype)
    for own, label in zip(outputs, y.tolist(), strict=True):
        confidences, losses, calibrations = [], [], []
        for network in own:
            logits, head = network[:-1], network[-1]
            largest = logits.softmax(0).max()
            if int(logits.argmax()) == label:
                largest = largest.detach()
            confidences.append(largest * head.sigmoid())
            losses.append(F.cross_entropy(logits[None], torch.tensor([label])))
            calibrations.append(F.binary_cross_entropy(confidences[-1], logits.softmax(0)[label].detach()))
        weights = (temperature * torch.stack(confidences).detach()).softmax(0)
        total = total + (weights * torch.stack(losses)).sum() + weight * torch.stack(calibrations).mean()
    return total / len(y)


def _slow_pgd(model: nn.Module, x: torch.Tensor, y: torch.Tensor, pgd: Pgd, steps: int) -> torch.Tensor:
    """From the images."""
    point = x.clone()
    for _ in range(steps):
        point.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(point), y), point)
        point = (point.detach() + pgd.step_size * gradient.sign()).clamp(x - pgd.epsilon, x + pgd.epsilon).clamp(0, 1)
    return point


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (8.0, 0.25)])
def test_the_loss_and_its_gradient_are_those_of_the_slow_way(temperature: float, weight: float) -> None:
    outputs = torch.randn((30, 3, 5), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(30) % 4
    right = outputs[..., :-1].argmax(2) == y[:, None]
    assert 0 < int(right.sum()) < right.numel()
    one, other = outputs.clone().requires_grad_(), outputs.clone().requires_grad_()
    fast, slow = soe.synergy(one, y, temperature, weight).mean(), _slow_loss(other, y, temperature, weight)
    torch.testing.assert_close(fast, slow)
    fast.backward()  # type: ignore[no-untyped-call]
    slow.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(one.grad, other.grad)


def test_the_loss_of_a_saturated_confidence_is_finite_and_that_of_nan_is_nan() -> None:
    logits = torch.tensor([200.0, 0.0, 0.0])
    for label, head in itertools.product((0, 1), (-300.0, 300.0)):
        outputs = torch.cat([logits, torch.tensor([head])])[None, None].requires_grad_()
        soe.synergy(outputs, torch.tensor([label]), 1.0, 1.0).sum().backward()  # type: ignore[no-untyped-call]
        assert outputs.grad is not None
        assert bool(outputs.grad.isfinite().all())
    assert bool(soe.synergy(torch.full((1, 1, 4), torch.nan), torch.tensor([0]), 1.0, 1.0).isnan())


class Parallel(nn.Module):
    """A model as DDP wraps it: what a loss trains is reached by a call of the wrapper."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *arguments: Any, **options: Any) -> Any:
        return self.module(*arguments, **options)


@pytest.mark.parametrize("attack", ["together", "one_by_one"])
def test_a_step_trains_on_clean_images_plus_those_of_pgd_on_the_model_or_on_each_sub_model(
    images: Images, attack: str
) -> None:
    experiment = _experiment(f"soe.attack={attack}", "soe.temperature=2", "soe.confidence_weight=0.5")
    model = _model(experiment, images)
    x, y = _batch(images)
    slow = copy.deepcopy(model).eval()
    attacked = [slow] if attack == "together" else list(slow.experts)
    sets = [_slow_pgd(target, x, y, experiment.pgd, steps=2) for target in attacked]
    outputs = [
        network(torch.cat([x, *sets])) for network in slow.train().networks
    ]  # BatchNorm sees all versions together
    clean, *adversarial = torch.stack(outputs, 1).split(len(y))  # type: ignore[no-untyped-call]
    expected = _slow_loss(clean, y, 2, 0.5) + sum(_slow_loss(part, y, 2, 0.5) for part in adversarial) / len(sets)

    (loss,) = soe.losses(experiment.defended, Parallel(model), lambda: frozen(model), x, y, Draws((0,)))
    assert isinstance(loss, Loss)
    torch.testing.assert_close(loss.total / loss.rows, expected)
    assert loss.rows == len(y)
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())  # of every sub-model


def test_pgd_on_one_sub_model_sees_the_statistics_of_the_whole_batch(
    images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient, "_CHUNK_ELEMENTS", 5 * 64)  # five images of a batch, where it may be cut
    experiment = _experiment("soe.attack=one_by_one", "soe.steps=1", "experts.attack_batchnorm=train")
    model, (x, y) = _model(experiment, images), _batch(images)
    trained_on: list[torch.Tensor] = []
    whole = frozen(model, batch_statistics=True)
    model.register_forward_pre_hook(lambda _, arguments: trained_on.append(arguments[0]))
    (_,) = soe.losses(experiment.defended, model, lambda: whole, x, y, Draws((0,)))
    for classifier, moved in zip(model.experts, trained_on[-1][len(y) :].split(len(y)), strict=True):  # type: ignore[no-untyped-call]
        torch.testing.assert_close(moved, _slow_pgd(classifier, x, y, experiment.pgd, steps=1))


def _train(
    experiment: Experiment, images: Images, store: Store, stopping: Callable[[], bool] = lambda: False
) -> nn.Module:
    model = to_train(experiment.models, "soe", images.format, experiment.seed, store)
    return train(
        task_for(experiment, store, "soe", stopping=stopping), model, DeviceImages(images, experiment.data, CPU)
    )


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return _experiment()


@pytest.fixture(scope="module")
def finished(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of an experiment whose defended model is trained."""
    store = experiment.store(str(tmp_path_factory.mktemp("soe")))
    store.write("experiment.json", experiment.to_json().encode())
    torch.set_num_threads(1)
    _train(experiment, load_images(experiment.data, Path()), store)
    return store


def test_a_stopped_training_resumes_to_the_bits_of_an_uninterrupted_one(
    experiment: Experiment, finished: Store, images: Images, tmp_path: Path
) -> None:
    store, calls = experiment.store(str(tmp_path)), itertools.count(1)
    with pytest.raises(Stopped):
        _train(experiment, images, store, lambda: next(calls) == 2)  # of three steps an epoch
    resumed = _train(experiment, images, store).state_dict()
    whole = api.load(finished.path(""), "soe").state_dict()
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_sub_models_start_from_different_weights_and_all_of_them_learn(
    experiment: Experiment, finished: Store, images: Images
) -> None:
    start = untrained(experiment.defended, images.format, 0, {})
    trained = api.load(finished.path(""))
    assert isinstance(start, SynergyOfExperts)
    assert isinstance(trained, SynergyOfExperts)
    weights = [network.classifier.weight for network in (*start.networks, *trained.networks)]
    assert all(weight.shape == (11, 32) for weight in weights)  # ten classes, and the confidence head
    for one, other in itertools.combinations(weights, 2):
        assert not torch.equal(one, other)  # type: ignore[arg-type]
    assert trained.gate(torch.rand(4, 1, 8, 8)).shape == (4, 3)
    shares = [row["expert_shares"] for row in tables.read(finished, "metrics").to_pylist()]
    assert [len(epoch) for epoch in shares] == [3, 3]
    assert all(sum(epoch) == pytest.approx(1) for epoch in shares)


def test_every_suite_measures_it_and_the_analysis_accepts_its_rows(
    experiment: Experiment, finished: Store, images: Images
) -> None:
    model, spec = api.load(finished.path("")), experiment.defended
    options: dict[str, Any] = {"seed": 0, "device": CPU}
    suites = experiment.suites(spec)
    assert set(suites) == {"paper", "pgd_gate", "pgd_expert", "pgd_route", "noise", "experts", "checks"}
    x, y = images.x_test[:8], images.y_test[:8]
    seen = set()
    for suite in suites:
        if suite == CHECKS:
            rows = run.check(model, "soe", x, y, experiment.evaluation, experiment.threat, **options)
            assert rows
            continue
        models = {"soe": model, "standard": model}
        shards, predictions = run.evaluate(
            models, "soe", suite, x, y, experiment.evaluation, experiment.threats, experts=spec.experts, **options
        )
        for table, rows in (("shards", shards), ("predictions", predictions)):
            validate(pa.Table.from_pylist(rows, schema=_schema(table)), table, experiment)
        seen |= {row["source"] for row in predictions if suite == "experts"}
        assert all(sorted(row["gate"]) == [0, 0, 1] for row in predictions)
    assert seen == {"1", "2", "3"}
    wrong = pa.Table.from_pylist([{**predictions[0], "source": "4"}], schema=_schema("predictions"))
    with pytest.raises(InvalidInput, match="source: '4' cannot be used: allowed is standard, soe, 1, 2, 3"):
        validate(wrong, "predictions", experiment)


def _schema(table: str) -> pa.Schema:
    labels = ("experiment", "preset", "dataset", "seed")
    return pa.schema([column for column in tables.SCHEMAS[table] if column.name not in labels])


def test_it_is_planned_as_a_model_without_parents_at_the_cost_of_its_passes(experiment: Experiment) -> None:
    (job,) = (job for job in jobs(experiment, EXPERTS, SIZES) if job.model == "soe")
    assert (job.name, job.inputs) == ("expert soe", frozenset())
    assert jobs(experiment, JOINT, SIZES) == []
    assert job.cost == 2 * 96 * 3 * (2 * 2 + 3 * 2)  # epochs, images, sub-models; two gradients, two versions
    alone = _experiment("soe.attack=one_by_one").defended
    assert METHODS["soe"].passes(alone) == 3 * (2 * 2 + 3 * 4)
    standard = METHODS["standard"].passes(experiment.spec("standard"))
    for attack, clean_trainings in (("together", 26), ("one_by_one", 32)):  # ten steps, three sub-models
        released = build("cifar10", 0, ["defence=soe", "baselines=[]", f"soe.attack={attack}"]).defended
        assert METHODS["soe"].passes(released) == clean_trainings * standard
    assert {job.suite for job in jobs(experiment, EVALUATE, SIZES) if job.model == "soe"} == set(
        experiment.suites(experiment.defended)
    )


def test_it_is_stored_as_its_sub_models(experiment: Experiment, finished: Store) -> None:
    alone = build("digits", 0, [*SETTINGS, "baselines=[]"])
    estimated, _ = stored_bytes([alone], SIZES)
    numbers = sum(parameter.numel() for parameter in api.load(finished.path("")).parameters())
    newest, previous_with_momentum, float_bytes = 1, 2, 4
    assert estimated == pytest.approx(float_bytes * numbers * (newest + previous_with_momentum), rel=0.01)


def test_its_options_are_its_settings_and_pgds_strength() -> None:
    spec = build("digits", 0, ["baselines=soe", "soe.experts=5", "pgd.epsilon=0.1", "pgd.step_size=0.02"]).spec("soe")
    assert dict(spec.options) == {
        "experts": 5,
        "temperature": 1.0,
        "confidence_weight": 1.0,
        "attack": "together",
        "steps": 10,
        "epsilon": 0.1,
        "step_size": 0.02,
    }
    assert spec.networks == 5
    assert spec.experts == ("1", "2", "3", "4", "5")


def test_the_experts_of_a_model_with_a_gate_are_its_parents_if_it_has_any() -> None:
    experiment = build("digits", 0, [*TINY, "baselines=soe,controls"])
    assert experiment.defended.experts == experiment.spec("uniform").experts == ("benign", "fgsm-1", "pgd-1")
    assert experiment.spec("joint-benign").experts == experiment.spec("benign").experts == ()
    assert experiment.selecting == ("soe",)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("soe.experts=1", "soe.experts: 1 cannot be used"),
        ("soe.attack=both", "soe.attack: 'both' cannot be used"),
        ("soe.temperature=-1", "soe.temperature: -1"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(assignment: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message.replace(".", r"\.")) as error:
        build("digits", 0, [assignment])
    assert "\n" not in str(error.value)


def test_tables_and_figures_name_its_sub_models(tmp_path: Path) -> None:
    beyond = "evaluation.beyond=experts,pgd_expert"
    make_up(tmp_path, build("digits", 0, ["defence=soe", "baselines=standard", beyond]), 60)
    (group,) = load_results(str(tmp_path)).groups
    predictions = read_predictions(group)
    assert group.experts == ("1", "2", "3")
    assert all(set(gates.columns) == {"1", "2", "3", "entropy", "examples"} for gates in predictions.gates.values())
    measured, _, shown, _ = make_tables(group, predictions)
    assert any("1" in str(table.rows) for table in shown)
    data = FigureData(group, measured, predictions)
    for name in ("gate_by_attack", "gate_by_class", "gate_and_accuracy", "expert_transfer", "dropped_expert"):
        assert draw(name, data) is not None, name
    assert "experts_and_mixture" not in draw_all(data)  # the sub-models have no rows in the columns of the paper
