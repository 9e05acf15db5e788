"""What each job gets on given resources."""

from __future__ import annotations

import pytest

from dwf_cluster.cluster.placement import Placement, Resources, placement
from dwf_cluster.data.sources import Sizes
from dwf_cluster.experiment import InvalidInput, build
from dwf_cluster.plan import jobs


def _placements(resources: Resources) -> dict[str, Placement]:
    experiment = build("digits")
    stages = ("experts", "joint", "evaluate")
    return {
        job.name: placement(job, resources)
        for stage in stages
        for job in jobs(experiment, stage, Sizes(10, 10, (1, 8, 8)))
    }


def test_on_cpus_a_task_does_the_work_itself() -> None:
    places = _placements(Resources(cpus=8, gpus=0, joint_workers=1))
    assert places["expert pgd-1"] == Placement(workers=0, cpus=1, gpus=0)
    assert places["joint"] == Placement(workers=0, cpus=8, gpus=0)
    assert places["evaluate mixture paper 0-9"] == Placement(workers=0, cpus=1, gpus=0)


def test_on_gpus_train_starts_the_workers_that_hold_them() -> None:
    places = _placements(Resources(cpus=8, gpus=4, joint_workers=4))
    assert places["expert pgd-1"] == Placement(workers=1, cpus=1, gpus=1)
    assert places["joint"] == Placement(workers=4, cpus=2, gpus=1)
    assert places["evaluate mixture paper 0-9"] == Placement(workers=0, cpus=1, gpus=1)


def test_joint_workers_share_the_cpus() -> None:
    assert _placements(Resources(cpus=8, gpus=0, joint_workers=3))["joint"] == Placement(workers=3, cpus=2, gpus=0)


def test_gpus_are_those_that_cuda_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert Resources.here(4, None, None) == Resources(4, 2, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Resources.here(4, None, None) == Resources(4, 0, 1)


def test_joint_workers_without_room_are_refused() -> None:
    with pytest.raises(InvalidInput, match="--joint-workers: 5 cannot be used: allowed are 1 to 4"):
        Resources.here(4, 0, 5)
