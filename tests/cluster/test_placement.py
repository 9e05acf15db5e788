"""What each job gets on given resources."""

from __future__ import annotations

import asyncio

import pytest

from dwf_cluster.cluster.control import Claim, Control
from dwf_cluster.cluster.placement import Limits, Resources, cpus_here, gpus_here, place
from dwf_cluster.cluster.schedule import Placement
from dwf_cluster.data.sources import Sizes
from dwf_cluster.experiment import STAGES, InvalidInput, build
from dwf_cluster.plan import Job, jobs


def _places(resources: Resources, *assignments: str) -> dict[str, Placement]:
    experiment = build("digits", 0, assignments)
    found: list[Job] = [job for stage in STAGES for job in jobs(experiment, stage, Sizes(10, 10, (1, 8, 8)))]
    return {job.name: placement for job, placement in place(found, resources).items()}


def test_on_cpus_a_task_does_the_work_itself() -> None:
    places = _places(Resources(cpus=8, gpus=0))
    assert places["expert pgd-1"] == Placement(workers=0, cpus=1, gpus=0)
    assert places["joint"] == Placement(workers=0, cpus=8, gpus=0)
    assert places["evaluate mixture paper 0-9"] == Placement(workers=0, cpus=1, gpus=0)


def test_on_gpus_train_starts_the_workers_that_hold_them() -> None:
    places = _places(Resources(cpus=8, gpus=4))
    assert places["expert pgd-1"] == Placement(workers=1, cpus=1, gpus=1)
    assert places["joint"] == Placement(workers=4, cpus=2, gpus=1)
    assert places["evaluate mixture paper 0-9"] == Placement(workers=0, cpus=1, gpus=1)


def test_on_several_nodes_the_joint_stage_has_a_worker_for_each_gpu_or_each_node() -> None:
    assert _places(Resources(cpus=8, gpus=4, nodes=2))["joint"] == Placement(workers=8, cpus=2, gpus=1)
    assert _places(Resources(cpus=8, gpus=0, nodes=2))["joint"] == Placement(workers=2, cpus=8, gpus=0)


def test_experts_have_several_workers_only_where_gpus_would_wait_for_the_longest() -> None:
    wide = ["experts.batch_size=128", "pgd.steps=10,20,30,40,50"]
    few, many = (_places(Resources(cpus=64, gpus=gpus), *wide) for gpus in (4, 32))
    assert {place.workers for name, place in few.items() if name.startswith("expert ")} == {1}
    assert many["expert pgd-1"].workers == 4  # 32 images each
    assert many["expert benign"].workers == 1
    limited = _places(Resources(cpus=64, gpus=32, limits=Limits(expert_workers=1)), *wide)
    assert limited["expert pgd-1"].workers == 1


def test_what_is_done_changes_no_experts_workers() -> None:
    """BatchNorm would see other parts of each batch: numbers of a resumed run would differ."""
    experiment = build("cifar10")
    found = jobs(experiment, "experts", Sizes(50_000, 10_000, (3, 32, 32)))
    resources = Resources(cpus=64, gpus=16)
    assert place(found, resources) == place(list(reversed(found)), resources)


def test_experts_can_share_gpus() -> None:
    places = _places(Resources(cpus=8, gpus=1, limits=Limits(gpus_per_expert=0.5)))
    assert places["expert pgd-1"] == Placement(workers=1, cpus=1, gpus=0.5)
    assert places["joint"] == Placement(workers=1, cpus=8, gpus=1)


def test_joint_workers_share_the_cpus() -> None:
    resources = Resources(cpus=8, gpus=0, limits=Limits(joint_workers=3))
    assert _places(resources)["joint"] == Placement(workers=3, cpus=2, gpus=0)


def test_gpus_are_those_that_cuda_may_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert gpus_here() == 2
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus_here() == 0
    assert cpus_here() >= 1


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(joint_workers=5), "--joint-workers: 5 cannot be used: allowed are 1 to 4"),
        (Limits(expert_workers=5), "--expert-workers: 5 cannot be used: allowed are 1 to 4"),
        (Limits(gpus_per_expert=0.5), "--gpus-per-expert: 0.5 cannot be used: there are no GPUs"),
    ],
)
def test_limits_without_room_are_refused(limits: Limits, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Resources(cpus=4, gpus=0, limits=limits)


def test_two_that_should_not_share_a_device_are_an_error_that_names_both() -> None:
    def claim(name: str, worker: int, node: str, share: float) -> Claim:
        return Claim(("run", name), worker, node, "H100 GPU-1", share, "H100", 7)

    async def run() -> list[str | None]:
        control = Control()
        found = [
            await control.claim(claim("expert pgd-1", 0, "n1", 0.5)),
            await control.claim(claim("expert pgd-1", 0, "n1", 0.5)),  # its worker was replaced
            await control.claim(claim("expert pgd-2", 0, "n1", 0.5)),
            await control.claim(claim("expert pgd-3", 0, "n2", 1.0)),
            await control.claim(claim("joint", 1, "n1", 1.0)),
        ]
        for name in ("expert pgd-1", "expert pgd-2", "joint"):
            await control.release(("run", name))
        return [*found, await control.claim(claim("joint", 1, "n1", 1.0))]

    *fine, shared, released = asyncio.run(run())
    assert fine == [None] * 4
    assert shared == "H100 GPU-1 on n1 is not free: taken by expert pgd-1 of run, expert pgd-2 of run"
    assert released is None
