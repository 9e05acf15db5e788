"""The allocation of each job on given resources."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from dwf_cluster.cluster.control import Claim, Control
from dwf_cluster.data.registry import Sizes
from dwf_cluster.plan import resources
from dwf_cluster.plan.jobs import STAGES, Job, jobs
from dwf_cluster.plan.resources import Limits, Resources, alike_nodes, allocate, cpus_here, gpus_here, unused_gpus
from dwf_cluster.plan.schedule import Allocation
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput


def _allocations(resources: Resources, *assignments: str) -> dict[str, Allocation]:
    experiment = build("digits", 0, assignments)
    every: list[Job] = [job for stage in STAGES for job in jobs(experiment, stage, Sizes(10, 10, (1, 8, 8)))]
    return {job.name: allocation for job, allocation in allocate(every, resources).items()}


def test_on_cpus_a_task_does_the_work_itself() -> None:
    allocations = _allocations(Resources(cpus=8, gpus=0))
    assert allocations["expert pgd-1"] == Allocation(workers=0, cpus=1, gpus=0)
    assert allocations["joint"] == Allocation(workers=0, cpus=8, gpus=0)
    assert allocations["evaluate mixture paper 0-9"] == Allocation(workers=0, cpus=1, gpus=0)


def test_on_gpus_ray_train_starts_workers_with_the_gpus() -> None:
    allocations = _allocations(Resources(cpus=8, gpus=4))
    assert allocations["expert pgd-1"] == Allocation(workers=1, cpus=1, gpus=1)
    assert allocations["joint"] == Allocation(workers=2, cpus=2, gpus=1)
    assert allocations["evaluate mixture paper 0-9"] == Allocation(workers=0, cpus=1, gpus=1)


@pytest.mark.parametrize("resources", [Resources(64, 8, nodes=8), Resources(64, 0, nodes=64)], ids=["GPUs", "CPUs"])
@pytest.mark.parametrize(("batch", "workers"), [(512, 16), (128, 4), (127, 3), (63, 1), (2, 1)])
def test_each_worker_of_the_joint_stage_has_32_images_of_a_batch(
    resources: Resources, batch: int, workers: int
) -> None:
    joint = _allocations(resources, f"joint.batch_size={batch}")["joint"]
    assert max(1, joint.workers) == workers


def test_the_joint_stage_has_a_worker_for_each_gpu_or_without_gpus_for_each_node() -> None:
    batch = "joint.batch_size=512"
    assert _allocations(Resources(cpus=8, gpus=4, nodes=2), batch)["joint"] == Allocation(workers=8, cpus=2, gpus=1)
    assert _allocations(Resources(cpus=8, gpus=0, nodes=2), batch)["joint"] == Allocation(workers=2, cpus=8, gpus=0)


def test_gpus_that_the_joint_stage_leaves_free_keep_their_share_of_the_cpus() -> None:
    joint = _allocations(Resources(cpus=64, gpus=8), "joint.batch_size=128")["joint"]
    assert joint == Allocation(workers=4, cpus=8, gpus=1)


@pytest.mark.parametrize(("workers", "cpus"), [(1, 8), (2, 8), (3, 4), (5, 2), (16, 1)])
def test_no_worker_of_the_joint_stage_needs_more_cpus_than_a_node_has_for_it(workers: int, cpus: int) -> None:
    resources = Resources(cpus=8, gpus=0, nodes=2, limits=Limits(joint_workers=workers))
    joint = _allocations(resources)["joint"]
    assert (max(1, joint.workers), joint.cpus) == (workers, cpus)


@pytest.mark.parametrize(
    ("limits", "workers"),
    [(Limits(), 1), (Limits(expert_workers=3), 3), (Limits(expert_workers=3, gpus_per_expert=0.5), 1)],
)
def test_an_expert_has_one_gpu_unless_more_are_requested(limits: Limits, workers: int) -> None:
    allocations = _allocations(Resources(cpus=64, gpus=32, limits=limits))
    assert {given.workers for name, given in allocations.items() if name.startswith("expert ")} == {workers}


@pytest.mark.parametrize(("stage", "option"), [("joint", "--joint-workers"), ("experts", "--expert-workers")])
def test_workers_without_images_are_refused(stage: str, option: str) -> None:
    """The other workers would wait for gradients that they do not have."""
    limits = Limits(joint_workers=17) if stage == "joint" else Limits(expert_workers=17)
    message = f"^{option}: 17 cannot be used: allowed are 1 to 16, two images of a batch of 32 for each$"
    with pytest.raises(InvalidInput, match=message):
        _allocations(Resources(cpus=64, gpus=32, limits=limits), f"{stage}.batch_size=32")


def test_workers_that_divide_the_experts_have_one_each_at_most() -> None:
    by_experts = "joint.parallelism=experts"
    assert _allocations(Resources(cpus=64, gpus=16), by_experts)["joint"].workers == 9
    assert _allocations(Resources(cpus=64, gpus=8), by_experts)["joint"].workers == 8
    assert _allocations(Resources(cpus=64, gpus=1), by_experts)["joint"].workers == 1
    assert _allocations(Resources(cpus=64, gpus=0), by_experts)["joint"].workers == 0
    with pytest.raises(InvalidInput, match=r"^--joint-workers: 10 cannot be used: allowed are 1 to 9, one expert for"):
        _allocations(Resources(cpus=64, gpus=16, limits=Limits(joint_workers=10)), by_experts)


def test_an_allocation_does_not_depend_on_other_jobs() -> None:
    """Otherwise BatchNorm would see other parts of a batch, and several seeds would give other numbers than one."""
    size = Sizes(50_000, 10_000, (3, 32, 32))
    seeds = [[job for stage in STAGES for job in jobs(build("cifar10", seed), stage, size)] for seed in range(5)]
    resources = Resources(cpus=64, gpus=16, limits=Limits(expert_workers=4))
    together = allocate([job for jobs in seeds for job in jobs], resources)
    assert all(allocate([job], resources) == {job: together[job]} for jobs in seeds for job in jobs)


def test_experts_can_share_gpus() -> None:
    allocations = _allocations(Resources(cpus=8, gpus=1, limits=Limits(gpus_per_expert=0.5)))
    assert allocations["expert pgd-1"] == Allocation(workers=1, cpus=1, gpus=0.5)
    assert allocations["joint"] == Allocation(workers=1, cpus=8, gpus=1)
    assert allocations["evaluate mixture paper 0-9"] == Allocation(workers=0, cpus=1, gpus=1)


def test_joint_workers_share_the_cpus() -> None:
    resources = Resources(cpus=8, gpus=0, limits=Limits(joint_workers=3))
    assert _allocations(resources)["joint"] == Allocation(workers=3, cpus=2, gpus=0)


def _machine(
    monkeypatch: pytest.MonkeyPatch, devices: int, cuda: bool = True, visible: str | None = None
) -> tuple[int, str]:
    """Number of GPUs used, and the warning, on a machine with this number of NVIDIA devices."""
    monkeypatch.setattr(resources, "glob", lambda pattern: [f"/dev/nvidia{n}" for n in range(devices)])
    monkeypatch.setattr(resources, "_torch_uses_gpus", lambda: cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    return gpus_here(), unused_gpus()


def test_gpus_are_those_in_cuda_visible_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _machine(monkeypatch, 8) == (8, "")
    assert _machine(monkeypatch, 8, visible="2,5") == (2, "")
    assert _machine(monkeypatch, 0) == (0, "")


def test_unused_gpus_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, built_without = (_machine(monkeypatch, 8, visible=""), _machine(monkeypatch, 8, cuda=False))
    assert hidden == (0, "warning: 8 GPU of this machine not used: CUDA_VISIBLE_DEVICES is empty")
    assert built_without == (0, "warning: 8 GPU of this machine not used: this PyTorch is built without CUDA")


def test_gpu_support_of_pytorch_is_detected_without_importing_it() -> None:
    assert resources._torch_uses_gpus() == (torch.version.cuda is not None)


def _version_1(folder: str, quota: int) -> dict[str, str]:
    return {f"{folder}/cpu.cfs_quota_us": str(quota), f"{folder}/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("cgroup", "files", "cpus"),
    [
        ("0::/", {}, 64),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2),
        ("0::/a/b", {"a/b/cpu.max": "100000 100000", "a/cpu.max": "250000 100000"}, 1),
        ("0::/", {"cpu.max": "20000 100000"}, 1),  # a fifth of a CPU is still one process
        ("0::/host/path", {"cpu.max": "300000 100000"}, 3),  # of a container that sees the host's path
        ("0::/", {"cpu.max": "9900000 100000"}, 64),
        ("4:cpu,cpuacct:/job\n1:memory:/x", _version_1("cpu,cpuacct/job", -1), 64),
        ("4:cpu,cpuacct:/job\n0::/", _version_1("cpu,cpuacct", 400000), 4),
        (None, {}, 64),
    ],
)
def test_cpus_are_those_of_the_affinity_or_fewer_by_a_cgroups_quota(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str | None, files: dict[str, str], cpus: int
) -> None:
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda process: set(range(64)), raising=False)
    all_files = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    if cgroup is not None:
        all_files["proc/self/cgroup"] = cgroup
    for name, text in all_files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpus_here(tmp_path) == cpus


def _node(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": f"id-{name}", "NodeManagerHostname": name, "Alive": alive, "Resources": resources}


def test_equal_nodes_with_the_most_gpus_together_are_used_and_the_others_named() -> None:
    four = [_node(f"n{n}", CPU=64 - n, GPU=8) for n in range(4)]
    others = [_node("head", CPU=16), _node("small", CPU=8, GPU=2), _node("gone", alive=False, CPU=64, GPU=8)]
    resources, line = alike_nodes([*others, *four, _node("idle")], Limits())
    assert resources == Resources(cpus=61, gpus=8, nodes=4, excluded_nodes=("id-head", "id-small"))
    assert line == "nodes: 4 with 61 CPU, 8 GPU are used; left out: head (16 CPU, 0 GPU), small (8 CPU, 2 GPU)"


def test_many_small_gpu_nodes_outweigh_a_large_one_and_types_are_not_mixed() -> None:
    small = [_node(f"n{n}", **{"CPU": 8, "GPU": 2, "accelerator_type:A100": 1}) for n in range(3)]
    large = _node("large", **{"CPU": 32, "GPU": 4, "accelerator_type:H100": 1})
    other = _node("other", **{"CPU": 8, "GPU": 2, "accelerator_type:L4": 1})
    resources, line = alike_nodes([large, other, *small], Limits())
    assert (resources.nodes, resources.gpus) == (3, 2)
    assert line.endswith("left out: large (32 CPU, 4 GPU H100), other (8 CPU, 2 GPU L4)")


def test_without_gpus_all_nodes_with_cpus_are_used() -> None:
    resources, line = alike_nodes([_node("head"), _node("n1", CPU=4), _node("n2", CPU=6.5)], Limits())
    assert (resources, line) == (Resources(cpus=4, gpus=0, nodes=2), "")


def test_a_ray_without_a_cpu_for_jobs_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^--address: no node of that Ray has a CPU for jobs$"):
        alike_nodes([_node("head"), _node("gpus", GPU=8)], Limits())


def test_jobs_must_not_run_on_nodes_that_are_left_out() -> None:
    (joint,) = jobs(build("digits"), "joint", Sizes(10, 10, (1, 8, 8)))
    resources = Resources(cpus=8, gpus=2, excluded_nodes=("id-head", "id-small"))
    assert allocate([joint], resources)[joint].label_selector == {"ray.io/node-id": "!in(id-head,id-small)"}
    assert allocate([joint], Resources(cpus=8, gpus=2))[joint].label_selector is None


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (Limits(joint_workers=5), "--joint-workers: 5 cannot be used: allowed are 1 to 4"),
        (Limits(expert_workers=5), "--expert-workers: 5 cannot be used: allowed are 1 to 4"),
        (Limits(gpus_per_expert=0.5), "--gpus-per-expert: 0.5 cannot be used: there are no GPUs"),
    ],
)
def test_limits_beyond_the_slots_are_refused(limits: Limits, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Resources(cpus=4, gpus=0, limits=limits)


def test_jobs_that_must_not_share_a_device_are_an_error_that_names_both() -> None:
    def claim(name: str, worker: int, node: str, share: float) -> Claim:
        return Claim(("run", name), worker, node, "H100 GPU-1", share, "H100", 7)

    async def run() -> list[str | None]:
        control = Control()
        complaints = [
            await control.claim(claim("expert pgd-1", 0, "n1", 0.5)),
            await control.claim(claim("expert pgd-1", 0, "n1", 0.5)),  # its worker was replaced
            await control.claim(claim("expert pgd-2", 0, "n1", 0.5)),
            await control.claim(claim("expert pgd-3", 0, "n2", 1.0)),
            await control.claim(claim("joint", 1, "n1", 1.0)),
        ]
        for name in ("expert pgd-1", "expert pgd-2", "joint"):
            await control.release(("run", name))
        return [*complaints, await control.claim(claim("joint", 1, "n1", 1.0))]

    *fine, shared, released = asyncio.run(run())
    assert fine == [None] * 4
    assert shared == "H100 GPU-1 on n1 is not free: taken by expert pgd-1 of run, expert pgd-2 of run"
    assert released is None
