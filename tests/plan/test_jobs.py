"""The plan: which jobs, in which order, at which cost."""

from __future__ import annotations

import pytest
import torch

from dwf_cluster.data.registry import Sizes
from dwf_cluster.experiment import Experiment, build
from dwf_cluster.models.resnet import ResNet18
from dwf_cluster.plan import jobs
from dwf_cluster.plan.jobs import STAGES, Job, forward_flops, jobs, pending, prepare_training, select
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import Store, checkpoints, tables

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
def test_the_longest_come_first(stage: str) -> None:
    costs = [job.cost for job in jobs(build("cifar10"), stage, CIFAR10)]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 2


def test_the_evaluation_attacks_every_model_with_every_family() -> None:
    experiment = build("cifar10", 0, ["evaluation.beyond=pgd_gate,noise,transfer"])
    found = {(job.model, job.suite) for job in jobs(experiment, "evaluate", CIFAR10)}
    single = {(regime.name, family) for regime in experiment.regimes for family in ("paper", "noise", "checks")}
    assert found == single | {("mixture", family) for family in ("paper", "pgd_gate", "noise", "checks")}


def test_slices_are_whole_batches_cover_the_test_set_and_take_minutes() -> None:
    for experiment in (build("cifar10"), build("cifar10", 0, ["model.width=4"]), build("digits")):
        slices = [j for j in jobs(experiment, "evaluate", CIFAR10) if (j.model, j.family) == ("benign", "paper")]
        slices.sort(key=lambda job: job.first)
        assert [job.first for job in slices] == [0, *(job.stop for job in slices[:-1])]
        assert slices[-1].stop == 10_000
        assert all(job.first % experiment.evaluation.batch_size == 0 for job in slices)
        assert [job.file for job in slices] == sorted(job.file for job in slices)
        flop = slices[0].cost * forward_flops(experiment, CIFAR10.shape)
        batch = flop * experiment.evaluation.batch_size / slices[0].stop
        assert flop < 1e13 + batch


def test_the_estimate_of_storage_knows_the_size_of_the_networks() -> None:
    experiment = build("cifar10", 0, ["model.width=16"])
    state = ResNet18(10, (0.5,) * 3, (0.5,) * 3, 16).state_dict()
    assert jobs._weights(experiment, 3) == pytest.approx(sum(t.numel() for t in state.values()), rel=0.001)
    one, _ = jobs.stored_bytes([experiment], CIFAR10)
    seeds, _ = jobs.stored_bytes([experiment, experiment.model_copy(update={"seed": 1})], CIFAR10)
    assert seeds == 2 * one
    gates, _ = jobs.stored_bytes([experiment, build("cifar10", 0, ["model.width=16", "gate.kind=hard"])], CIFAR10)
    assert gates < 2 * one  # the experts are stored once


def test_a_slice_can_be_chosen() -> None:
    experiment = build("digits", 0, ["evaluation.shard_examples=100", "evaluation.batch_size=64"])
    slices = [j for j in jobs(experiment, "evaluate", Sizes(1, 360, (1, 8, 8))) if j.family == "paper"]
    assert {(job.first, job.stop) for job in slices} == {(0, 128), (128, 256), (256, 360)}
    assert "evaluate mixture paper 256-359" in {job.name for job in slices}


def _finish(store: Store, job: Job, metrics: bool = True) -> None:
    """Write what a job leaves; `metrics`: whether the checkpoint has its rows, as those of this version do."""
    rows = [{"stage": job.stage, "model": job.model, "epoch": epoch, "loss": 1 / epoch} for epoch in (1, 2, 3)]
    for epoch in () if job.stage == "evaluate" else (2, 3):
        state = {"metrics": rows[:epoch]} if metrics else {}
        checkpoints.save(store, job.model, epoch, 0, {"model.weight": torch.zeros(1)}, state)
    for table in (*job.tables, "jobs"):
        name, content = (job.model, rows) if table == "metrics" else (job.file, [{}])
        tables.write(store, table, name, content)


def _left(experiment: Experiment, store: Store) -> set[str]:
    return {job.name for found in pending(experiment, store, TINY_SIZES).values() for job in found}


def _job(experiment: Experiment, name: str) -> Job:
    every = [job for stage in STAGES for job in jobs(experiment, stage, TINY_SIZES)]
    return next(job for job in every if job.name == name)


@pytest.mark.parametrize("name", ["expert pgd-1", "evaluate benign paper 0-23", "evaluate benign checks 0-7"])
def test_a_job_is_done_when_all_of_its_files_are_there(store: Store, tiny: Experiment, name: str) -> None:
    job, before = _job(tiny, name), _left(tiny, store)
    _finish(store, job)
    assert _left(tiny, store) == before - {name}
    for table in (*job.tables, "jobs"):
        tables.remove(store, table, job.model if table == "metrics" else job.file)
        assert name in _left(tiny, store)
        _finish(store, job)
        assert name not in _left(tiny, store)


def test_rows_that_another_writer_lost_come_back_from_the_checkpoint(store: Store, tiny: Experiment) -> None:
    job = _job(tiny, "expert pgd-1")
    _finish(store, job)
    whole = tables.read(store, "metrics")
    for rows in ([], whole.to_pylist()[:2], [whole.to_pylist()[n] for n in (0, 2)]):
        tables.write(store, "metrics", job.model, rows)
        assert job.name in _left(tiny, store)
        assert prepare_training(job, store) == []
        assert tables.read(store, "metrics").equals(whole)
        assert job.name not in _left(tiny, store)


def test_rows_that_no_checkpoint_has_are_trained_again(store: Store, tiny: Experiment) -> None:
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


def test_a_damaged_checkpoint_is_said_before_training_goes_on(store: Store, tiny: Experiment) -> None:
    job = _job(tiny, "expert pgd-1")
    _finish(store, job)
    store.write("checkpoints/pgd-1/epoch-00003/tensors.safetensors", b"something else")
    folder = store.path("checkpoints/pgd-1/epoch-0000")
    assert prepare_training(job, store) == [f"damaged checkpoint {folder}3 removed; resuming from {folder}2"]


def test_what_is_done_is_seen_without_a_look_at_tensors(
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


def test_a_stage_whose_forerunner_is_missing_is_refused_with_the_way_out(store: Store, tiny: Experiment) -> None:
    with pytest.raises(InvalidInput, match=r"evaluate cannot be run: experts is not done .*experts,joint,evaluate"):
        select(pending(tiny, store, TINY_SIZES), ["evaluate"])
    assert {job.stage for job in select(pending(tiny, store, TINY_SIZES), ["experts"])} == {"experts"}
