"""The plan: which jobs, in which order, at which cost."""

from __future__ import annotations

import pytest

from dwf_cluster.experiment import Experiment, InvalidInput, build
from dwf_cluster.plan import jobs, unfinished
from dwf_cluster.store import Store, tables


def _costs(experiment: Experiment, stage: str, train: int = 1, test: int = 1) -> dict[str, float]:
    return {job.name: job.cost for job in jobs(experiment, stage, train, test)}


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
    costs = [job.cost for job in jobs(build("cifar10"), stage, 50_000, 10_000)]
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 2


def test_the_evaluation_attacks_every_model_with_every_family() -> None:
    names = set(_costs(build("cifar10"), "evaluate"))
    assert len(names) == (9 + 2 + 1) * 4
    assert {"evaluate mixture pgd", "evaluate fgsm-at pgd_restarts", "evaluate benign fgsm"} <= names


def test_what_is_done_is_left_out(store: Store, tiny: Experiment) -> None:
    tables.write(store, "predictions", "evaluate-benign-pgd", [])
    todo = unfinished(tiny, store, ["experts", "joint", "evaluate"], 1, 1)
    assert len(todo["evaluate"]) == 4 * 4 - 1
    assert "evaluate benign pgd" not in {job.name for job in todo["evaluate"]}


def test_a_stage_whose_forerunner_is_missing_is_refused_with_the_way_out(store: Store, tiny: Experiment) -> None:
    with pytest.raises(InvalidInput, match=r"evaluate cannot be run: experts is not done .*experts,joint,evaluate"):
        unfinished(tiny, store, ["evaluate"], 1, 1)
    assert list(unfinished(tiny, store, ["experts"], 1, 1)) == ["experts"]
