"""Controls of the mixture: built from what it trains, or as large as it, or at its compute."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dwf_cluster import api
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.registry import Sizes
from dwf_cluster.data.sources import load as load_images
from dwf_cluster.defences.build import to_train, trained, untrained
from dwf_cluster.defences.registry import METHODS
from dwf_cluster.evaluation.registry import CHECKS
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.mixture import Mixture
from dwf_cluster.plan.jobs import EVALUATE, EXPERTS, JOINT, STAGES, deduplicate, jobs, pending
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import Store, checkpoints, prune
from dwf_cluster.training.loop import train

from ..conftest import TINY, task_for

EXPERT_NAMES = ("benign", "fgsm-1", "pgd-1")
CONTROLS = ("uniform", *(f"joint-{name}" for name in EXPERT_NAMES), "joint-uniform")
SIZES = Sizes(96, 40, (1, 8, 8))


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return build("digits", 0, [*TINY, "experts.epochs=1", "joint.epochs=1", "baselines=controls"])


@pytest.fixture(scope="module")
def finished(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """The store of an experiment whose experts and mixture are trained."""
    store = experiment.store(str(tmp_path_factory.mktemp("controls")))
    images = load_images(experiment.data, Path())
    store.write("experiment.json", experiment.to_json().encode())
    for name in (*EXPERT_NAMES, "mixture"):
        model = to_train(experiment.models, name, images.format, experiment.seed, store)
        train(task_for(experiment, store, name), model, DeviceImages(images, experiment.data, torch.device("cpu")))
    return store


def test_the_controls_are_each_expert_of_the_mixture_and_means_of_experts(experiment: Experiment) -> None:
    assert experiment.names == (*EXPERT_NAMES, *CONTROLS, "mixture")
    assert experiment.defended.name == "mixture"
    assert [experiment.spec(name).networks for name in CONTROLS] == [3, 1, 1, 1, 3]


def test_a_control_is_what_its_name_says(experiment: Experiment, finished: Store) -> None:
    x = torch.rand(8, 1, 8, 8)
    models = {name: api.load(finished.path(""), name) for name in experiment.names}
    mixture = models["mixture"]
    assert isinstance(mixture, Mixture)
    with torch.no_grad():
        logits = {name: model(x) for name, model in models.items()}
        for number, name in enumerate(EXPERT_NAMES):
            assert torch.equal(logits[f"joint-{name}"], mixture.experts[number](x))
            assert not torch.equal(logits[f"joint-{name}"], logits[name])  # the joint stage has changed it
    for control, averaged in (("uniform", EXPERT_NAMES), ("joint-uniform", [f"joint-{name}" for name in EXPERT_NAMES])):
        mean = torch.stack([logits[name] for name in averaged]).mean(0)
        torch.testing.assert_close(logits[control], mean, rtol=1e-5, atol=1e-5)
        gate = models[control].gate(x)
        torch.testing.assert_close(gate, torch.full((8, 3), 1 / 3))


def test_models_that_are_loaded_together_are_loaded_once(
    experiment: Experiment, finished: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    load_trained = checkpoints.load_trained

    def counted(store: Store, model: str, epochs: int) -> checkpoints.Checkpoint:
        read.append(model)
        return load_trained(store, model, epochs)

    monkeypatch.setattr(checkpoints, "load_trained", counted)
    loaded: dict[str, torch.nn.Module] = {}
    format = load_images(experiment.data, Path()).format
    for name in experiment.names:
        trained(experiment.models, name, format, experiment.seed, finished, loaded)
    assert sorted(read) == sorted((*EXPERT_NAMES, "mixture"))
    assert set(loaded) == set(experiment.names)


def test_a_control_is_evaluated_after_the_models_that_it_is_built_from_and_never_trained(
    experiment: Experiment,
) -> None:
    assert {job.model for stage in (EXPERTS, JOINT) for job in jobs(experiment, stage, SIZES)} == {
        *EXPERT_NAMES,
        "mixture",
    }
    evaluations = jobs(experiment, EVALUATE, SIZES)
    assert {job.model for job in evaluations} == set(experiment.names)
    for job in evaluations:
        if job.model in CONTROLS and not job.tests_transfer:
            needed = set(EXPERT_NAMES if job.model == "uniform" else ("mixture",))
            needed |= set(EXPERT_NAMES if job.suite == CHECKS else ())  # which try images of other models too
            assert job.inputs == {(experiment.folder, name) for name in needed}
    suites = {job.suite for job in evaluations if job.model == "joint-uniform"}
    assert suites == {job.suite for job in evaluations if job.model == "mixture"}  # the same attacks as the mixture


def test_nothing_of_the_store_is_missing_or_left_over_for_a_control(experiment: Experiment, finished: Store) -> None:
    waiting = pending(experiment, finished, SIZES)
    assert {job.model for job in waiting[EVALUATE]} == set(experiment.names)
    assert sorted(finished.names("checkpoints")) == ["benign", "fgsm-1", "joint", "pgd-1"]
    removable, _ = prune.find(finished.url)
    assert not {item.model for item in removable} & set(CONTROLS)
    other = build("digits", 0, [*TINY, "experts.epochs=1", "joint.epochs=1", "baselines=controls", "gate.hidden=9"])
    every = [job for e in (experiment, other) for stage in STAGES for job in jobs(e, stage, SIZES)]
    assert not any(job.copy_of for job in deduplicate(every) if job.model in CONTROLS)


def test_a_control_whose_mixture_is_not_trained_is_refused_by_the_mixtures_name(
    experiment: Experiment, tmp_path: Path
) -> None:
    store = experiment.store(str(tmp_path))
    store.write("experiment.json", experiment.to_json().encode())
    with pytest.raises(InvalidInput) as error:
        api.load(store.path(""), "joint-uniform")
    where = store.path("").rstrip("/")
    assert str(error.value) == (
        f"name: 'joint-uniform' cannot be used: mixture is trained for 0 of 1 epochs in {where}"
    )


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (
            ["defence=pgd-at", "baselines=controls"],
            "experiment: uniform is built from benign, which the experiment does not train: allowed is to add dwf",
        ),
        (
            ["defence=controls", "baselines=dwf"],
            "experiment: defence 'controls' trains no model: allowed is to add it to the baselines",
        ),
    ],
)
def test_controls_without_a_mixture_or_as_the_defence_are_refused(assignments: list[str], message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        build("digits", 0, assignments)
    assert str(error.value) == message


@pytest.mark.parametrize("settings", [[], TINY, ["pgd.random_start=true", "pgd.steps=3", "joint.epochs=7"]])
def test_pgd_at_at_matched_compute_costs_what_the_whole_defence_costs(settings: list[str]) -> None:
    experiment = build("digits", 0, [*settings, "baselines=pgd-at,pgd-at-matched"])
    costs = {job.model: job.cost for stage in (EXPERTS, JOINT) for job in jobs(experiment, stage, SIZES)}
    matched, defence = costs.pop("pgd-at-matched"), sum(costs.values()) - costs["pgd-at"]
    one_epoch = costs["pgd-at"] / experiment.experts.epochs
    assert defence <= matched < defence + one_epoch
    own, fixed = experiment.spec("pgd-at-matched"), experiment.spec("pgd-at")
    assert (own.options, own.method) == (fixed.options, fixed.method)
    assert METHODS[own.method].passes(own) == METHODS[fixed.method].passes(fixed)


def test_the_pgd_ensemble_is_the_mean_of_as_many_pgd_at_networks_as_the_mixture_has_experts() -> None:
    experiment = build("digits", 0, [*TINY, "baselines=pgd-at,pgd-ensemble"])
    members = ("pgd-at-1", "pgd-at-2", "pgd-at-3")
    assert experiment.names == (*EXPERT_NAMES, "pgd-at", *members, "pgd-ensemble", "mixture")
    pgd_at, ensemble = experiment.spec("pgd-at"), experiment.spec("pgd-ensemble")
    for name in members:
        assert replace(experiment.spec(name), name="pgd-at") == pgd_at
    assert (ensemble.parents, ensemble.networks) == (members, len(EXPERT_NAMES))
    assert {job.model for job in jobs(experiment, EXPERTS, SIZES)} == {*EXPERT_NAMES, "pgd-at", *members}
    assert {job.model for job in jobs(experiment, JOINT, SIZES)} == {"mixture"}
    images = load_images(experiment.data, Path()).format
    networks = {name: untrained(experiment.spec(name), images, 0, {}).eval() for name in members}
    average, x = untrained(ensemble, images, 0, networks).eval(), torch.rand(5, 1, 8, 8)
    logits = torch.stack([network(x) for network in networks.values()])
    torch.testing.assert_close(average(x), logits.mean(0), rtol=1e-5, atol=1e-5)
    assert len({tuple(row.flatten().tolist()) for row in logits}) == len(members)  # of different initial weights


def test_the_wide_network_has_three_times_the_width_and_about_the_cost_and_size_of_a_mixture_of_nine() -> None:
    experiment = build("cifar10", 0, ["baselines=pgd-at,resnet18-wide"])
    sizes = Sizes(50_000, 10_000, (3, 32, 32))
    flop = {job.model: job.flop for stage in (EXPERTS, JOINT) for job in jobs(experiment, stage, sizes)}
    wide, mixture = experiment.spec("resnet18-wide"), experiment.spec("mixture")
    assert wide.width == 3 * experiment.model.width
    defence = sum(flop[name] for name in (*mixture.parents, "mixture"))
    assert defence <= flop["resnet18-wide"] < defence + flop["resnet18-wide"] / wide.training.epochs
    for count in (
        lambda spec: METHODS[spec.method].parameters(spec, sizes.shape),
        lambda spec: METHODS[spec.method].flops(spec, sizes.shape),
    ):
        assert count(wide) == pytest.approx(count(mixture), rel=0.01)
