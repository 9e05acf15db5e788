"""Which job starts when: the rule, the planned timeline, its lower bound."""

from __future__ import annotations

import itertools

import pytest

from dwf_cluster.data.registry import Sizes
from dwf_cluster.data.sources import sizes
from dwf_cluster.plan.jobs import STAGES, Job, jobs
from dwf_cluster.plan.resources import Limits, Resources, allocate
from dwf_cluster.plan.schedule import PROCESS_FLOP, Planned, Schedule, lower_bound, timeline
from dwf_cluster.presets import build

from ..conftest import TINY


def _jobs(seeds: int = 1, stages: tuple[str, ...] = STAGES, *assignments: str) -> list[Job]:
    experiments = [build("digits", seed, [*TINY, *assignments]) for seed in range(seeds)]
    size = Sizes(96, 40, (1, 8, 8))
    return [job for experiment in experiments for stage in stages for job in jobs(experiment, stage, size)]


def _schedule(every: list[Job], resources: Resources) -> Schedule:
    return Schedule(every, allocate(every, resources), resources.slots)


def _startable(schedule: Schedule) -> list[Job]:
    return list(iter(schedule.start, None))


def test_the_longest_expert_starts_first_and_others_fill_the_slots() -> None:
    schedule = _schedule(_jobs(), Resources(cpus=2, gpus=0))
    first = _startable(schedule)
    assert [job.name for job in first] == ["expert pgd-1", "expert fgsm-1"]
    schedule.end(first[1])
    assert [job.name for job in _startable(schedule)] == ["expert benign"]


def test_evaluations_of_trained_experts_fill_the_time_until_the_joint_stage_gets_all_slots() -> None:
    schedule = _schedule(_jobs(1, STAGES, "evaluation.beyond=noise"), Resources(cpus=3, gpus=0))
    experts = {job.model: job for job in _startable(schedule)}
    assert set(experts) == {"benign", "fgsm-1", "pgd-1"}
    schedule.end(experts["benign"])
    (evaluation,) = _startable(schedule)
    assert evaluation.name.startswith("evaluate benign ")
    schedule.end(experts["fgsm-1"])
    (other,) = _startable(schedule)
    schedule.end(experts["pgd-1"])
    assert _startable(schedule) == []  # the joint stage is ready, and no smaller job starts before it
    schedule.end(evaluation)
    assert _startable(schedule) == []
    schedule.end(other)
    (joint,) = _startable(schedule)
    assert joint.stage == "joint"


GPUS = Resources(cpus=2, gpus=2)


@pytest.mark.parametrize(("resources", "processes"), [(GPUS, 4), (Resources(cpus=2, gpus=0), None)], ids=str)
def test_with_gpus_one_process_runs_all_shards_of_a_model(resources: Resources, processes: int | None) -> None:
    every = _jobs(1, ("evaluate",), "evaluation.beyond=noise")
    batches = _batches(_schedule(every, resources))
    assert sorted(job.name for batch in batches for job in batch) == sorted(job.name for job in every)
    assert all(len({job.model for job in batch}) == 1 for batch in batches)
    assert len(batches) == (processes or len(every))  # without GPUs every shard is a task, so that they fill the CPUs


def test_a_long_evaluation_is_cut_into_processes_that_are_longer_than_twenty_starts() -> None:
    experiment = build("cifar10", 0, [])
    every = jobs(experiment, "evaluate", sizes(experiment.data))
    batches = _batches(_schedule(every, Resources(cpus=8, gpus=8)))
    work = [sum(job.flop for job in batch) for batch in batches]
    assert max(work) <= max(PROCESS_FLOP, *(job.flop for job in every))
    start, speed = 15, 9e13  # estimates: seconds, and FLOP/s of an H100
    assert len(batches) * start < 0.05 * sum(work) / speed
    assert len(batches) >= 2 * 8  # enough to fill the eight GPUs,
    assert max(work) <= sum(work) / 8  # and none is longer than a GPU's equal share


def test_a_process_runs_no_shard_whose_inputs_are_missing() -> None:
    schedule = _schedule(_jobs(1, STAGES, "evaluation.beyond=noise"), Resources(cpus=3, gpus=3))
    experts = {job.model: job for job in _startable(schedule)}
    schedule.end(experts["benign"])
    first = schedule.start()
    assert first is not None
    shards = [first, *schedule.start_after(first)]
    assert {job.suite for job in shards} == {"paper", "noise"}  # the checks wait for the other experts
    assert {job.model for job in shards} == {"benign"}
    schedule.end(experts["pgd-1"])
    other = schedule.start()
    assert other is not None
    assert other.model == "pgd-1"  # the slot of `benign` is taken by its process
    assert schedule.start() is None


def _batches(schedule: Schedule) -> list[list[Job]]:
    """Run a schedule, one process after the other; returns the jobs of each."""
    batches = []
    while job := schedule.start():
        batches.append([job, *schedule.start_after(job)])
        for current, following in itertools.pairwise([*batches[-1], None]):
            assert current is not None
            assert schedule.end(current) is following
    return batches


def test_the_joint_stage_does_not_wait_for_baselines() -> None:
    every = _jobs(1, ("experts", "joint"), "baselines=fgsm-at")
    joint = next(job for job in every if job.stage == "joint")
    assert joint.inputs == {(joint.folder, name) for name in ("benign", "fgsm-1", "pgd-1")}


def test_a_transfer_column_needs_every_model() -> None:
    paper = [job for job in _jobs() if job.suite == "paper"]
    models = ("benign", "fgsm-1", "pgd-1", "mixture")
    assert {job.inputs for job in paper} == {frozenset((paper[0].folder, model) for model in models)}


def test_after_a_failure_no_job_of_a_later_stage_starts() -> None:
    schedule = _schedule(_jobs(1, STAGES, "evaluation.beyond=noise"), Resources(cpus=1, gpus=0))
    (failed,) = _startable(schedule)
    schedule.end(failed, done=False)
    others = []
    while started := schedule.start():
        others.append(started.name)
        schedule.end(started)
    assert others == ["expert fgsm-1", "expert benign"]


def test_experts_of_all_seeds_start_before_joint_stages() -> None:
    every = _jobs(3, ("experts", "joint"))
    order = list(timeline(every, allocate(every, Resources(cpus=4, gpus=0)), 4))
    assert [job.stage for job in order] == ["experts"] * 9 + ["joint"] * 3
    assert [job.model for job in order[:3]] == ["pgd-1"] * 3
    assert len({job.folder for job in order[:3]}) == 3


def _use(planned: dict[Job, Planned], shares: dict[Job, float]) -> list[float]:
    """The share that is taken of each device at each start."""
    used = []
    for now in {when.start for when in planned.values()}:
        busy = [(n, shares[job]) for job, w in planned.items() if w.start <= now < w.end for n in w.devices]
        used += [sum(share for n, share in busy if n == device) for device, _ in busy]
    return used


@pytest.mark.parametrize(("gpus", "share"), [(0, 1.0), (1, 0.5), (4, 1.0), (4, 0.25), (7, 1.0)])
def test_the_timeline_shares_no_device_twice_and_keeps_the_order_of_inputs(gpus: int, share: float) -> None:
    every, resources = _jobs(2), Resources(cpus=3, gpus=gpus, limits=Limits(gpus_per_expert=share))
    allocations = allocate(every, resources)
    planned = timeline(every, allocations, resources.slots)
    assert set(planned) == set(every)
    assert max(_use(planned, {job: min(1.0, allocations[job].gpus or 1.0) for job in every})) <= 1 + 1e-9
    for job, other in itertools.permutations(every, 2):
        if other.output in job.inputs:
            assert planned[job].start >= planned[other].end * (1 - 1e-9)


def test_joint_stages_of_several_seeds_run_side_by_side_if_there_are_gpus_for_them() -> None:
    every = [job for seed in range(3) for job in jobs(build("cifar10", seed), "joint", Sizes(96, 40, (3, 32, 32)))]
    planned = timeline(every, allocate(every, Resources(cpus=8, gpus=8)), 8)
    first, second, third = planned.values()
    assert (first.devices, second.devices) == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert first.start == second.start < third.start


def test_the_lower_bound_is_all_work_shared_or_the_longest_chain() -> None:
    every = _jobs(1, ("experts", "joint"))
    costs = {job.name: job.flop for job in every}
    one, many = Resources(cpus=1, gpus=0), Resources(cpus=100, gpus=0)
    assert lower_bound(every, allocate(every, one), 1) == sum(costs.values())
    assert lower_bound(every, allocate(every, many), 100) == costs["expert pgd-1"] + costs["joint"] / 100


def test_the_lower_bound_counts_the_rounds_of_equal_jobs_and_the_chain_after_the_last() -> None:
    """Three seeds' longest experts on two CPUs: one of them waits, and its joint stage follows."""
    every = [job for job in _jobs(3, ("experts", "joint")) if job.name in ("expert pgd-1", "joint")]
    limits = Limits(joint_workers=1)
    allocations = allocate(every, Resources(cpus=2, gpus=0, limits=limits))
    lengths = {"experts": 2.0, "joint": 0.01}  # so short that sharing all work bounds less
    bound = lower_bound(every, allocations, 2, lambda job, allocation: lengths[job.stage])
    assert bound == pytest.approx(2 * lengths["experts"] + lengths["joint"])


@pytest.mark.parametrize("seeds", [1, 5])
@pytest.mark.parametrize("gpus", [1, 2, 4, 8, 9, 16, 32, 64])
def test_at_the_papers_scale_the_makespan_is_close_to_the_lower_bound(gpus: int, seeds: int) -> None:
    experiments = [build("cifar10", seed) for seed in range(seeds)]
    resources = Resources(cpus=8, gpus=gpus)
    for stages in (("experts",), STAGES):
        every = [j for e in experiments for stage in stages for j in jobs(e, stage, sizes(e.data))]
        allocations = allocate(every, resources)
        planned, bound = timeline(every, allocations, resources.slots), lower_bound(every, allocations, resources.slots)
        # Joint stages take four GPUs each, so the ninth has little to do.
        close = 1.07 if gpus == 9 else 1.05
        assert bound * (1 - 1e-9) <= max(when.end for when in planned.values()) <= close * bound
