"""The plan: which jobs, in which order, at which cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dwf_cluster.data.registry import Sizes
from dwf_cluster.evaluation.registry import SUITES
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.resnet import ResNet
from dwf_cluster.plan.disk_space import stored_bytes
from dwf_cluster.plan.jobs import (
    STAGES,
    Job,
    deduplicate,
    forward_flops,
    jobs,
    pending,
    prepare_training,
    select,
)
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import Store, checkpoints, tables

from ..conftest import TINY

CIFAR10, TINY_SIZES = Sizes(50_000, 10_000, (3, 32, 32)), Sizes(96, 40, (1, 8, 8))


def _costs(experiment: Experiment, stage: str, train: int = 1, test: int = 1) -> dict[str, float]:
    return {job.name: job.cost for job in jobs(experiment, stage, Sizes(train, test, (3, 32, 32)))}


def test_a_training_step_costs_3_passes_and_each_of_its_gradients_2() -> None:
    experiment = build("digits", 0, ["experts.epochs=1", "pgd.steps=4,8", "baselines=pgd-at"])
    costs = _costs(experiment, "experts", train=10)
    assert costs["expert benign"] == 10 * 3
    assert costs["expert fgsm-1"] == 10 * (3 + 2)
    assert costs["expert pgd-1"] == 10 * (3 + 2 * 6)
    assert costs["expert pgd-at"] == 10 * (3 + 2 * 10 * 0.5)


def test_a_joint_step_runs_every_expert_on_three_parts_and_shares_the_first_gradient() -> None:
    experiment = build("digits", 0, ["joint.epochs=2", "pgd.steps=5"])
    assert _costs(experiment, "joint", train=10) == {"joint": 2 * 10 * 9 * (3 * 3 + 2 * 5)}


@pytest.mark.parametrize("stage", ["experts", "evaluate"])
def test_the_longest_jobs_come_first(stage: str) -> None:
    costs = [job.cost for job in jobs(build("cifar10"), stage, CIFAR10)]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 2


def test_jobs_of_models_with_different_networks_are_ordered_by_their_operations() -> None:
    """`resnet18-wide` has nine times the operations of the other networks and fewer passes than `pgd-at-matched`."""
    experiment = build(
        "cifar10", 0, ["model.width=8", "evaluation.batch_size=32", "baselines=pgd-at,pgd-at-matched,resnet18-wide"]
    )
    trainings = {job.model: job for job in jobs(experiment, "experts", CIFAR10)}
    matched, wide, narrow = (trainings[name] for name in ("pgd-at-matched", "resnet18-wide", "pgd-at"))
    assert wide.cost < matched.cost / 8
    assert wide.flop > matched.flop
    assert next(iter(trainings)) == "resnet18-wide"
    assert wide.pass_flop == pytest.approx(9 * narrow.pass_flop, rel=0.05)
    paper = {job.model: job for job in jobs(experiment, "evaluate", CIFAR10) if (job.suite, job.first) == ("paper", 0)}
    wide, narrow = paper["resnet18-wide"], paper["pgd-at"]
    assert wide.cost / wide.stop == narrow.cost / narrow.stop  # passes of an image
    assert wide.stop < narrow.stop  # so a shard of either takes minutes
    assert wide.flop == pytest.approx(narrow.flop, rel=0.3)


def test_images_made_or_tested_on_larger_models_cost_more() -> None:
    """In passes through the model's own networks: a network of three times the width counts as nine."""
    others, wide = (
        {job.suite: job for job in jobs(experiment, "evaluate", CIFAR10) if (job.model, job.first) == ("benign", 0)}
        for experiment in (
            build("cifar10", 0, ["evaluation.beyond=transfer", f"baselines={name}"])
            for name in ("pgd-at", "resnet18-wide")
        )
    )
    steps = build("cifar10").evaluation.probe_steps
    more = [wide[suite].cost / wide[suite].stop - others[suite].cost / others[suite].stop for suite in wide]
    expected = {"paper": 8.0, "checks": 8.0 * 2 * steps}
    assert dict(zip(wide, more, strict=True)) == pytest.approx(
        {suite: expected.get(suite, 0.0) for suite in wide}, rel=0.02
    )


def test_the_evaluation_measures_every_model_by_every_suite() -> None:
    experiment = build("cifar10", 0, ["evaluation.beyond=pgd_gate,noise,transfer"])
    measured = {(job.model, job.suite) for job in jobs(experiment, "evaluate", CIFAR10)}
    suites = ("paper", "noise", "autoattack", "checks")
    assert measured == {(name, suite) for name in experiment.names for suite in suites} | {("mixture", "pgd_gate")}


def test_shards_are_whole_batches_cover_the_test_set_and_take_minutes() -> None:
    for experiment in (build("cifar10"), build("cifar10", 0, ["model.width=4"]), build("digits")):
        shards = [j for j in jobs(experiment, "evaluate", CIFAR10) if (j.model, j.suite) == ("benign", "paper")]
        shards.sort(key=lambda job: job.first)
        assert [job.first for job in shards] == [0, *(job.stop for job in shards[:-1])]
        assert shards[-1].stop == 10_000
        assert all(job.first % experiment.evaluation.batch_size == 0 for job in shards)
        assert [job.file for job in shards] == sorted(job.file for job in shards)
        flop = shards[0].cost * forward_flops(experiment.spec("benign"), CIFAR10.shape)
        batch = flop * experiment.evaluation.batch_size / shards[0].stop
        assert flop < 1e13 + batch


def test_the_storage_estimate_follows_the_size_of_the_networks() -> None:
    experiment = build("cifar10", 0, ["model.width=16"])
    state = ResNet(10, (0.5,) * 3, (0.5,) * 3, 16).state_dict()
    backbone = sum(tensor.numel() for tensor in state.values())
    alone, _ = stored_bytes([build("cifar10", 0, ["model.width=16", "defence=standard", "baselines=[]"])], CIFAR10)
    newest, previous_with_momentum, float_bytes = 1, 2, 4
    assert alone == pytest.approx(float_bytes * backbone * (newest + previous_with_momentum), rel=0.01)
    one, _ = stored_bytes([experiment], CIFAR10)
    seeds, _ = stored_bytes([experiment, experiment.model_copy(update={"seed": 1})], CIFAR10)
    assert seeds == 2 * one
    larger, _ = stored_bytes(
        [build("cifar10", 0, ["model.width=16", "defence=resnet18-wide", "baselines=[]"])], CIFAR10
    )
    wide_state = ResNet(10, (0.5,) * 3, (0.5,) * 3, 48).state_dict()
    assert larger == pytest.approx(alone * sum(t.numel() for t in wide_state.values()) / backbone, rel=0.01)
    gates, _ = stored_bytes([experiment, build("cifar10", 0, ["model.width=16", "gate.kind=hard"])], CIFAR10)
    assert gates < 2 * one  # the experts are stored once


def test_a_suite_costs_as_much_for_each_threat_model_that_it_attacks_under() -> None:
    beyond = "evaluation.beyond=noise,pgd_l2,curves,transfer"
    one, three = (
        _costs(build("digits", 0, [beyond, f"evaluation.epsilon={epsilons}"]), "evaluate", test=9)
        for epsilons in ("0.1", "0.1,0.2,0.3")
    )
    for suite, factor in (("paper", 3), ("noise", 3), ("pgd_l2", 1), ("curves", 1)):
        assert three[f"evaluate benign {suite} 0-8"] == factor * one[f"evaluate benign {suite} 0-8"]


def test_a_suite_with_a_number_of_examples_is_measured_on_the_first_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    of_first_70 = replace(SUITES["noise"], examples=lambda evaluation: 70)
    monkeypatch.setattr("dwf_cluster.evaluation.registry.SUITES", {**SUITES, "noise": of_first_70})
    monkeypatch.setattr("dwf_cluster.plan.jobs.SUITES", {**SUITES, "noise": of_first_70})
    assignments = ["evaluation.shard_examples=64", "evaluation.batch_size=64", "evaluation.beyond=noise"]
    listed = jobs(build("digits", 0, assignments), "evaluate", Sizes(1, 360, (1, 8, 8)))
    shards = [job for job in listed if job.model == "mixture"]
    assert {(job.first, job.stop) for job in shards if job.suite == "noise"} == {(0, 64), (64, 70)}
    assert max(job.stop for job in shards if job.suite == "paper") == 360
    few = jobs(build("digits", 0, assignments), "evaluate", Sizes(1, 50, (1, 8, 8)))
    assert {(job.first, job.stop) for job in few if job.suite == "noise"} == {(0, 50)}


def test_the_shard_size_can_be_chosen() -> None:
    experiment = build("digits", 0, ["evaluation.shard_examples=100", "evaluation.batch_size=64"])
    shards = [j for j in jobs(experiment, "evaluate", Sizes(1, 360, (1, 8, 8))) if j.suite == "paper"]
    assert {(job.first, job.stop) for job in shards} == {(0, 128), (128, 256), (256, 360)}
    assert "evaluate mixture paper 256-359" in {job.name for job in shards}


def _finish(store: Store, job: Job, metrics: bool = True) -> None:
    """Write what a job stores; `metrics`: whether its checkpoints hold their rows, as those of this version do."""
    rows = [{"stage": job.stage, "model": job.model, "epoch": epoch, "loss": 1 / epoch} for epoch in (1, 2, 3)]
    for epoch in () if job.stage == "evaluate" else (2, 3):
        state = {"metrics": rows[:epoch]} if metrics else {}
        checkpoints.save(store, job.model, epoch, 0, {"model.weight": torch.zeros(1)}, state)
    for table in (*job.tables, "jobs"):
        name, content = (job.model, rows) if table == "metrics" else (job.file, [{}])
        tables.write(store, table, name, content)
    if job.keeps_images:
        store.write(job.images_file, b"images")


def _pending(experiment: Experiment, store: Store) -> set[str]:
    return {job.name for stage in pending(experiment, store, TINY_SIZES).values() for job in stage}


def _job(experiment: Experiment, name: str) -> Job:
    every = [job for stage in STAGES for job in jobs(experiment, stage, TINY_SIZES)]
    return next(job for job in every if job.name == name)


@pytest.mark.parametrize("name", ["expert pgd-1", "evaluate benign paper 0-23", "evaluate benign checks 0-7"])
def test_a_job_is_done_when_all_of_its_files_exist(store: Store, tiny: Experiment, name: str) -> None:
    job, before = _job(tiny, name), _pending(tiny, store)
    _finish(store, job)
    assert _pending(tiny, store) == before - {name}
    for table in (*job.tables, "jobs"):
        tables.remove(store, table, job.model if table == "metrics" else job.file)
        assert name in _pending(tiny, store)
        _finish(store, job)
        assert name not in _pending(tiny, store)
    store.remove(job.images_file)
    assert (name in _pending(tiny, store)) == job.keeps_images


def test_missing_rows_are_restored_from_the_checkpoint(store: Store, tiny: Experiment) -> None:
    job = _job(tiny, "expert pgd-1")
    _finish(store, job)
    whole = tables.read(store, "metrics")
    for rows in ([], whole.to_pylist()[:2], [whole.to_pylist()[n] for n in (0, 2)]):
        tables.write(store, "metrics", job.model, rows)
        assert job.name in _pending(tiny, store)
        assert prepare_training(job, store) == []
        assert tables.read(store, "metrics").equals(whole)
        assert job.name not in _pending(tiny, store)


def test_rows_that_are_in_no_checkpoint_are_trained_again(store: Store, tiny: Experiment) -> None:
    job = _job(tiny, "expert pgd-1")
    _finish(store, job, metrics=False)
    assert prepare_training(job, store) == []  # the table of an earlier version is enough
    tables.write(store, "metrics", job.model, tables.read(store, "metrics").to_pylist()[:2])
    (note,) = prepare_training(job, store)
    assert note == (
        f"rows of metrics of pgd-1 are lost: checkpoint {store.path('checkpoints/pgd-1/epoch-00003')} removed, "
        "to train these epochs again"
    )
    assert checkpoints.latest_epoch(store, job.model) == 2
    tables.remove(store, "metrics", job.model)
    assert len(prepare_training(job, store)) == 1
    assert checkpoints.latest_path(store, job.model) is None


def test_a_damaged_checkpoint_is_named_before_training_resumes(store: Store, tiny: Experiment) -> None:
    job = _job(tiny, "expert pgd-1")
    _finish(store, job)
    store.write("checkpoints/pgd-1/epoch-00003/tensors.safetensors", b"something else")
    folder = store.path("checkpoints/pgd-1/epoch-0000")
    assert prepare_training(job, store) == [f"damaged checkpoint {folder}3 removed; resuming from {folder}2"]


def test_finished_jobs_are_recognised_without_reading_tensors(
    store: Store, tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    for job in jobs(tiny, "experts", TINY_SIZES):
        _finish(store, job)
    read = Store.read

    def watched(store: Store, name: str) -> bytes | None:
        assert not name.endswith("safetensors")
        return read(store, name)

    monkeypatch.setattr(Store, "read", watched)
    assert pending(tiny, store, TINY_SIZES)["experts"] == []


def test_a_stage_whose_inputs_are_missing_is_refused_with_the_stages_to_run(store: Store, tiny: Experiment) -> None:
    with pytest.raises(InvalidInput, match=r"evaluate cannot be run: experts is not done .*experts,joint,evaluate"):
        select(pending(tiny, store, TINY_SIZES), ["evaluate"])
    assert {job.stage for job in select(pending(tiny, store, TINY_SIZES), ["experts"])} == {"experts"}


def _copies(*experiments: Experiment) -> set[str]:
    """Names of the jobs of the last experiment that copy those of an earlier one."""
    every = [job for e in experiments for stage in STAGES for job in jobs(e, stage, TINY_SIZES)]
    unique = deduplicate(every)
    assert [(job.folder, job.name) for job in unique] == [(job.folder, job.name) for job in every]
    assert not any(job.copy_of for job in unique if job.folder == experiments[0].folder)
    return {job.name for job in unique if job.folder == experiments[-1].folder and job.copy_of}


def test_models_without_parents_and_their_evaluations_are_shared_and_others_are_not() -> None:
    tiny = [*TINY, "evaluation.beyond=noise"]
    experiment = build("digits", 0, tiny)
    without_parents = {
        job.name for stage in STAGES for job in jobs(experiment, stage, TINY_SIZES) if not job.spec.parents
    }
    assert _copies(experiment, build("digits", 0, [*tiny, "gate.hidden=9"])) == without_parents
    assert _copies(experiment, build("digits", 1, tiny)) == set()
    trainings = {f"expert {name}" for name in ("benign", "fgsm-1", "pgd-1")}
    assert _copies(experiment, build("digits", 0, [*tiny, "evaluation.restarts=3"])) == trainings
    # The checks of every model make images on every other one.
    no_pgd = {name for name in without_parents if "pgd-1" not in name and "checks" not in name}
    assert _copies(experiment, build("digits", 0, [*tiny, "pgd.steps=3"])) == no_pgd


def test_the_checks_wait_for_the_models_that_images_are_made_on_and_pay_for_them(tiny: Experiment) -> None:
    job = _job(tiny, "evaluate pgd-1 checks 0-7")
    assert job.inputs == {(tiny.folder, name) for name in ("benign", "fgsm-1", "pgd-1")}
    mixture = _job(tiny, "evaluate mixture checks 0-7")
    assert mixture.inputs == {(tiny.folder, name) for name in tiny.names}
    steps, queries, sources = tiny.evaluation.probe_steps, 300, 3
    own = 3 * (2 * 14 * steps + queries)  # three experts
    assert mixture.cost == pytest.approx(8 * (own + sources * 2 * steps))


def test_evaluations_that_are_transferred_to_all_models_are_not_shared() -> None:
    tiny = [*TINY, "evaluation.beyond=transfer"]
    copies = _copies(build("digits", 0, tiny), build("digits", 0, [*tiny, "gate.hidden=9"]))
    assert {name for name in copies if name.startswith("evaluate")} == {
        f"evaluate {name} checks 0-7" for name in ("benign", "fgsm-1", "pgd-1")
    }
