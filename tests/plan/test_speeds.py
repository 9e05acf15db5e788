"""How long jobs take: recorded and measured speeds, and jobs that are bound by the launches of their kernels."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu.measure import kernels
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.data.registry import ImageFormat, Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.resnet import resnet18
from dwf_cluster.plan import speeds
from dwf_cluster.plan.jobs import STAGES, Job, jobs
from dwf_cluster.plan.resources import Resources, allocate
from dwf_cluster.plan.schedule import Allocation
from dwf_cluster.plan.speeds import Entry, Speed, Speeds, entries
from dwf_cluster.presets import build
from dwf_cluster.store import Store, tables

CIFAR10 = Sizes(50_000, 10_000, (3, 32, 32))


def _all(experiment: Experiment, sizes: Sizes = CIFAR10) -> list[Job]:
    return [job for stage in STAGES for job in jobs(experiment, stage, sizes)]


def _speeds(listed: list[Job], resources: Resources, storage: Path) -> Speeds:
    return Speeds(listed, allocate(listed, resources), str(storage))


def test_every_stage_has_a_speed_in_float32_that_says_whether_it_was_measured() -> None:
    recorded = entries(speeds.FILE)
    for device in ("gpu", "cpu"):
        assert {e.stage for e in recorded if (e.device, e.precision) == (device, "float32")} == set(STAGES)
    for entry in recorded:
        assert entry.teraflops > 0
        assert (entry.launch_microseconds > 0) == (entry.device == "gpu")
        assert entry.card
        assert entry.date
        assert (entry.kind == "measurement") == bool(entry.versions)
        assert entry.source.endswith("not measured") == (entry.kind == "estimate")


def test_a_run_of_cifar10_is_estimated_at_less_than_18_hours_of_an_h100(tmp_path: Path) -> None:
    every, one = _all(build("cifar10", 0)), Resources(cpus=8, gpus=1)
    planned, allocations = _speeds(every, one, tmp_path), allocate(every, one)
    hours = sum(planned.seconds(job, allocations[job]) for job in every) / 3600
    assert hours == pytest.approx(17.6, abs=0.1)
    assert all("estimate for an H100" in line for line in planned.lines(every))


def test_a_measurement_replaces_an_estimate_and_a_newer_one_an_older(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    estimate = Entry("gpu", "experts", "float32", 1.0, 10.0, "estimate", "an H100", "2030-01-01")
    old = Entry("gpu", "experts", "float32", 2.0, 10.0, "measurement", "H100", "2028-01-01", {"torch": "2.10"})
    new = replace(old, teraflops=3.0, date="2029-01-01")
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"speeds": [asdict(entry) for entry in (new, old, estimate)]}))
    monkeypatch.setattr(speeds, "FILE", file)
    (job, *_) = jobs(build("cifar10", 0), "experts", CIFAR10)
    (line,) = _speeds([job], Resources(cpus=1, gpus=1), tmp_path).lines([job])
    assert line == (
        "speed of experts: 3 TFLOP/s a GPU, 10 microseconds a kernel at least, measured on H100, torch 2.10, 2029-01-01"
    )


def test_workers_that_divide_the_experts_take_as_long_as_the_one_with_the_most_experts() -> None:
    (joint,) = jobs(build("cifar10", 0, ["joint.parallelism=experts"]), "joint", CIFAR10)
    speed = Speed(90e12, 15.6e-6, "")
    one, two, eight, nine = (speed.seconds(joint, gpus) for gpus in (1, 2, 8, 9))
    assert two == pytest.approx(one * 5 / 9)
    assert eight == pytest.approx(one * 2 / 9)
    assert nine == pytest.approx(one / 9)


def test_more_workers_make_a_joint_stage_faster_until_it_is_bound_by_launches() -> None:
    (joint,) = jobs(build("cifar10", 0), "joint", CIFAR10)
    speed = Speed(90e12, 15.6e-6, "")
    one, two, four, many = (speed.seconds(joint, gpus) for gpus in (1, 2, 4, 64))
    assert one > two
    assert two == four == many == 15.6e-6 * speeds.launches(joint, joint.spec.networks)
    assert one / many == pytest.approx(1.5, abs=0.1)


def test_smaller_batches_of_the_same_work_take_longer_where_launches_bind() -> None:
    def seconds(*settings: str) -> float:
        (job,) = (j for j in jobs(build("cifar10", 0, settings), "experts", CIFAR10) if j.model == "pgd-1")
        return Speed(83e12, 15.6e-6, "").seconds(job, 1)

    whole = seconds()
    assert seconds("experts.batch_size=256") == whole
    assert seconds("experts.batch_size=16") == seconds("experts.accumulation=8") > 4 * whole


def _kernels(model: torch.nn.Module, steps: int) -> int:
    x, y = torch.rand(8, 3, 32, 32), torch.zeros(8, dtype=torch.int64)
    attack = pgd(frozen(model), x, y, Ball("linf", 0.03), step_size=0.01, steps=steps)
    return kernels(lambda: list(attack), torch.device("cpu"))


@pytest.mark.parametrize("networks", [1, 9])
def test_the_plan_counts_the_kernels_of_an_iteration_of_pgd(networks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dwf_cluster.models.stack._SMALL", 0)  # as on a GPU, where experts run one after the other
    images = ImageFormat((3, 32, 32), 10, (0.5,) * 3, (0.25,) * 3)
    experts = [resnet18(images, 2) for _ in range(networks)]
    gate = Gate(networks, images.shape, images.mean, images.std, hidden=4)
    model = experts[0] if networks == 1 else Mixture(experts, gate)
    counted = _kernels(model, 2) - _kernels(model, 1)
    assert counted == pytest.approx(speeds.kernel_count(networks), rel=0.02)


def _finish(store: Store, job: Job, **columns: Any) -> None:
    row = {"stage": job.stage, "task": job.name, "state": "done", "attempts": 1, "gpus": 1.0, "seconds": 10.0}
    tables.write(store, "jobs", job.file, [row | columns])


def test_finished_jobs_give_the_speed_of_their_stage(store: Store, tiny: Experiment) -> None:
    every, gpu = _all(tiny, Sizes(96, 40, (1, 8, 8))), Resources(cpus=1, gpus=1)
    first, second, *others = (job for job in every if job.stage == "experts")
    before = _speeds(every, gpu, Path(store.url))
    allocations = allocate(every, gpu)
    planned = [before.seconds(job, allocations[job]) for job in (first, second)]
    for job in (first, second):
        _finish(store, job)
    _finish(store, others[0], attempts=2, seconds=1000.0)  # its seconds are those of its last attempt
    after = _speeds(every, gpu, Path(store.url))
    factor = 20 / sum(planned)
    for job in others:
        assert after.seconds(job, allocations[job]) == pytest.approx(factor * before.seconds(job, allocations[job]))
    experts, joint, _ = after.lines(every)
    assert experts.endswith("measured on finished jobs")
    assert "estimate" in joint


def test_jobs_on_another_kind_of_device_give_no_speed(store: Store, tiny: Experiment) -> None:
    every = _all(tiny, Sizes(96, 40, (1, 8, 8)))
    for job in every:
        _finish(store, job, gpus=0.0)
    on_gpu = _speeds(every, Resources(cpus=1, gpus=1), Path(store.url))
    on_cpu = _speeds(every, Resources(cpus=1, gpus=0), Path(store.url))
    assert not any("measured on finished jobs" in line for line in on_gpu.lines(every))
    assert all(line.endswith("measured on finished jobs") for line in on_cpu.lines(every))


def test_trainings_in_bfloat16_are_planned_with_a_speed_of_their_own(tmp_path: Path) -> None:
    in_float32, in_bfloat16 = (
        jobs(build("cifar10", 0, [f"experts.precision={precision}"]), "experts", CIFAR10)
        for precision in ("float32", "bfloat16")
    )
    planned = _speeds([*in_float32, *in_bfloat16], Resources(cpus=1, gpus=1), tmp_path)
    first, second = planned.lines([*in_float32, *in_bfloat16])
    assert first.startswith("speed of experts: ")
    assert second.startswith("speed of experts in bfloat16: ")
    one, other = (planned.seconds(job, Allocation(0, 1, 1)) for job in (in_float32[0], in_bfloat16[0]))
    assert one > other


def test_a_precision_without_an_entry_is_planned_with_the_speed_of_float32(tmp_path: Path) -> None:
    every = jobs(build("cifar10", 0, ["experts.precision=bfloat16"]), "experts", CIFAR10)
    (line,) = _speeds(every, Resources(cpus=1, gpus=0), tmp_path).lines(every)
    assert line.startswith("speed of experts in bfloat16: 0.025 TFLOP/s a CPU, ")
    assert line.endswith(", for float32: none is known for bfloat16")
