"""The plan: which jobs, in which order, at which cost."""

from __future__ import annotations

import pytest

from dwf_cluster.data.sources import Sizes
from dwf_cluster.experiment import Experiment, InvalidInput, build
from dwf_cluster.plan import forward_flops, jobs, select, unfinished
from dwf_cluster.store import Store, tables

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
    found = {(job.model, job.family) for job in jobs(experiment, "evaluate", CIFAR10)}
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


def test_a_slice_can_be_chosen() -> None:
    experiment = build("digits", 0, ["evaluation.shard_examples=100", "evaluation.batch_size=64"])
    slices = [j for j in jobs(experiment, "evaluate", Sizes(1, 360, (1, 8, 8))) if j.family == "paper"]
    assert {(job.first, job.stop) for job in slices} == {(0, 128), (128, 256), (256, 360)}
    assert "evaluate mixture paper 256-359" in {job.name for job in slices}


def test_what_is_done_is_left_out(store: Store, tiny: Experiment) -> None:
    before = unfinished(tiny, store, TINY_SIZES)["evaluate"]
    for table, family in (("shards", "paper"), ("checks", "checks")):
        job = next(job for job in before if (job.model, job.family) == ("benign", family))
        tables.write(store, table, job.file, [])
        assert job.product == (table, job.file)
        assert job not in unfinished(tiny, store, TINY_SIZES)["evaluate"]
    assert len(unfinished(tiny, store, TINY_SIZES)["evaluate"]) == len(before) - 2


def test_a_stage_whose_forerunner_is_missing_is_refused_with_the_way_out(store: Store, tiny: Experiment) -> None:
    with pytest.raises(InvalidInput, match=r"evaluate cannot be run: experts is not done .*experts,joint,evaluate"):
        select(unfinished(tiny, store, TINY_SIZES), ["evaluate"])
    assert {job.stage for job in select(unfinished(tiny, store, TINY_SIZES), ["experts"])} == {"experts"}
