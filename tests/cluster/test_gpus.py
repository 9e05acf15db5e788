"""Which GPU each process computes on: with a stub of `torch.cuda`, and with a Ray that has GPUs which do not exist."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import platform
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import torch.distributed as dist

from dwf_cluster.cluster import tasks
from dwf_cluster.cluster.control import Claim, Control
from dwf_cluster.data import sources
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.defences.build import to_train
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import Job, jobs
from dwf_cluster.plan.schedule import Allocation
from dwf_cluster.store import Store, tables
from dwf_cluster.training.loop import Task, train
from dwf_cluster.training.probe import Probe

from .. import PATIENCE
from ..conftest import TINY
from ..process import Launch

ROOT = Path(__file__).parents[2]


class DirectControl:
    """A real `Control` whose methods are called as an actor's are: `control.method.remote(...)`."""

    def __init__(self) -> None:
        self.control = Control()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.control, name)
        return SimpleNamespace(remote=lambda *arguments: asyncio.run(method(*arguments)))


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch) -> DirectControl:
    monkeypatch.setattr(tasks, "_get", lambda value: value)
    return DirectControl()


@pytest.fixture
def second_of_two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `torch.cuda` as in a worker of Ray Train that sees two GPUs and was given the second."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H100")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91000)
    uuids = ["5e70", "0e1f"]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuids[torch.device(device).index])
    )


def _jobs(experiment: Experiment) -> list[Job]:
    sizes = sources.sizes(experiment.data)
    return [job for stage in ("experts", "joint", "evaluate") for job in jobs(experiment, stage, sizes)]


def _job(experiment: Experiment, name: str) -> Job:
    return next(job for job in _jobs(experiment) if job.name == name)


def _claim_by(job: Job, device: str, share: float = 1.0, worker: int = 0) -> Claim:
    return Claim((job.folder, job.name), worker, platform.node(), device, share, "H100", 7, "91000")


@pytest.mark.usefixtures("second_of_two_gpus")
def test_a_worker_claims_the_gpu_that_train_gave_it(tiny: Experiment, control: DirectControl) -> None:
    job = _job(tiny, "joint")
    device = tasks._claim(control, job, 1, Allocation(workers=2, cpus=1, gpus=1))
    assert device == torch.device("cuda", 1)
    expected = Claim((job.folder, "joint"), 1, platform.node(), "H100 GPU-0e1f", 1, "H100", os.getpid(), "91000")
    assert control.claims.remote((job.folder, "joint")) == [expected]


@pytest.mark.usefixtures("second_of_two_gpus")
def test_a_job_without_gpus_computes_on_the_cpu_of_a_machine_with_gpus(
    tiny: Experiment, control: DirectControl
) -> None:
    assert tasks._claim(control, _job(tiny, "joint"), 0, Allocation(workers=0, cpus=1, gpus=0)) == torch.device("cpu")


@pytest.mark.usefixtures("second_of_two_gpus")
def test_a_claim_waits_for_a_job_that_no_longer_uses_the_gpu_but_has_not_ended(
    tiny: Experiment, control: DirectControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending, starting = _job(tiny, "expert pgd-1"), _job(tiny, "expert benign")
    control.claim.remote(_claim_by(ending, "H100 GPU-0e1f"))
    pauses: list[float] = []

    def end_the_job(pause: float) -> None:
        pauses.append(pause)
        control.release.remote((ending.folder, ending.name))

    monkeypatch.setattr(tasks.time, "sleep", end_the_job)
    tasks._claim(control, starting, 0, Allocation(workers=1, cpus=1, gpus=1))
    assert len(pauses) == 1
    assert [claim.device for claim in control.claims.remote((starting.folder, starting.name))] == ["H100 GPU-0e1f"]


@pytest.mark.usefixtures("second_of_two_gpus")
def test_a_gpu_that_is_not_released_is_an_error_that_names_the_other_job(
    tiny: Experiment, control: DirectControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, job = _job(tiny, "expert pgd-1"), _job(tiny, "expert benign")
    control.claim.remote(_claim_by(other, "H100 GPU-0e1f", share=0.5))
    tasks._claim(control, job, 0, Allocation(workers=1, cpus=1, gpus=0.5))
    monkeypatch.setattr(tasks, "CLAIM_SECONDS", -1.0)
    with pytest.raises(tasks.DeviceShared, match=r"^H100 GPU-0e1f on \S+ is not free: taken by expert pgd-1 of digits"):
        tasks._claim(control, job, 0, Allocation(workers=1, cpus=1, gpus=1))


def test_replaced_workers_may_swap_their_gpus(tiny: Experiment, control: DirectControl) -> None:
    job = _job(tiny, "joint")
    for worker, device in enumerate(("GPU 0", "GPU 1")):
        assert control.claim.remote(_claim_by(job, device, worker=worker)) is None
    first, second = _claim_by(job, "GPU 1", worker=0), _claim_by(job, "GPU 0", worker=1)
    assert control.claim.remote(first) == f"GPU 1 on {platform.node()} is not free: taken by another worker of this job"
    assert control.claim.remote(second) is None
    assert control.claim.remote(first) is None


@pytest.mark.parametrize("accelerator", [None, torch.device("cuda")])
def test_the_task_that_waits_for_a_training_does_not_call_cuda(
    accelerator: torch.device | None,
    tiny: Experiment,
    store: Store,
    control: DirectControl,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The workers choose the backend and name the device."""
    job = _job(tiny, "joint")

    def refuse() -> None:
        raise AssertionError("a task that holds no GPU called CUDA")

    class Trainer:
        def __init__(self, loop: Callable[[], None], torch_config: Any, **others: Any) -> None:
            self.backend = torch_config.backend

        def fit(self) -> None:
            for worker in range(2):
                claim = _claim_by(job, f"H100 GPU-{worker}", worker=worker)
                assert control.claim.remote(claim) is None
            # In a worker, as Train would call `init_process_group`.
            with monkeypatch.context() as worker_machine:
                worker_machine.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: accelerator)
                # Older torch calls this function.
                worker_machine.setattr(torch._C, "_get_accelerator", lambda: accelerator or torch.device("cpu"))
                backends.update(dist.BackendConfig(self.backend).get_device_backend_map())

    backends: dict[str, str] = {}
    monkeypatch.setattr(tasks, "TorchTrainer", Trainer)
    monkeypatch.setattr(torch.cuda, "is_available", refuse)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", refuse, raising=False)
    tasks.run_job(job, store, None, Allocation(workers=2, cpus=1, gpus=1), control)  # type: ignore[arg-type]
    assert backends == ({"cuda": "nccl"} if accelerator else {"cpu": "gloo"})
    (row,) = tables.read(store, "jobs", [job.file]).to_pylist()
    assert row["device"] == "H100"
    assert row["devices"] == [f"{platform.node()}: H100 GPU-{worker}" for worker in range(2)]
    assert (row["cudnn_version"], row["tf32"]) == ("91000", True)


class OnAnotherGpu:
    """Images on the CPU that report to be on a GPU."""

    def __init__(self, images: DeviceImages, index: int) -> None:
        self._images = images
        self.x_train = NumberAndDevice(len(images.x_train), torch.device("cuda", index))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._images, name)


class NumberAndDevice:
    """The number of the training images and their device, as the epoch loop uses them."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count, self.device = count, device

    def __len__(self) -> int:
        return self.count


def test_metrics_have_the_type_of_the_device_without_its_index(
    tiny: Experiment, store: Store, images: sources.Images
) -> None:
    arrays = DeviceImages(images, tiny.data, torch.device("cpu"))
    for index, epochs in enumerate((1, 2)):  # stopped after the first epoch, resumed on another GPU
        experiment = tiny.model_copy(update={"experts": tiny.experts.model_copy(update={"epochs": epochs})})
        spec, evaluation = experiment.spec("benign"), experiment.evaluation
        probe = Probe(experiment.threat, evaluation.probe_steps, evaluation.probe_examples)
        task = Task(spec, "experts", experiment.seed, probe, experiment.checkpoint_minutes, store)
        model = to_train(experiment.models, "benign", images.format, experiment.seed, store)
        train(task, model, OnAnotherGpu(arrays, index))  # type: ignore[arg-type]
    assert tables.read(store, "metrics", ["benign"])["device"].to_pylist() == ["cuda", "cuda"]


SMALL = [
    "data.test_examples=16",
    "experts.pgd=0",
    "experts.epochs=1",
    "joint.epochs=1",
    "joint.batch_size=96",
    "evaluation.beyond=",
    "evaluation.batch_size=16",
    "evaluation.shard_examples=16",
    "evaluation.probe_examples=16",
]
CLAIM = re.compile(r"^(?P<job>.+): worker (?P<worker>\d+) on \S+: (?P<device>GPU \d+) \(process (?P<process>\d+)\)$")
END = re.compile(r"^(?P<job>.+): \S+ in [\d.]+ s \(\d+ of \d+\)$")


@pytest.mark.parametrize(("gpus", "workers", "share"), [(4, 3, 1.0), (3, 2, 0.5)])
def test_each_process_uses_one_gpu_and_no_gpu_is_oversubscribed(
    gpus: int, workers: int, share: float, launch: Launch
) -> None:
    resources = ["--local", "--gpus", str(gpus), "--cpus", str(gpus), "--joint-workers", str(workers)]
    result = launch(*resources, "--gpus-per-expert", str(share), "--set", *TINY, *SMALL)
    assert result.returncode == 0, result.stderr
    devices_of = defaultdict[str, set[str]](set)
    jobs_of = defaultdict[str, set[str]](set)
    holders = defaultdict[str, Counter[str]](Counter)  # by device: share of each job that has not ended
    for line in result.stdout.splitlines():
        if claim := CLAIM.match(line):
            job, device, process = claim["job"], claim["device"], claim["process"]
            devices_of[process].add(device)
            jobs_of[process].add(job)
            holders[device][job] += share if job.startswith("expert") else 1  # type: ignore[assignment]
            assert holders[device].total() <= 1, f"{device} is shared by {list(holders[device])}"
        elif end := END.match(line):
            for shares in holders.values():
                shares.pop(end["job"], None)
    assert {len(devices) for devices in devices_of.values()} == {1}, devices_of
    trainings = [jobs for jobs in jobs_of.values() if not any(job.startswith("evaluate ") for job in jobs)]
    assert {len(jobs) for jobs in trainings} == {1}
    evaluations = [jobs for jobs in jobs_of.values() if jobs not in trainings]
    assert all(len({job.split()[1] for job in jobs}) == 1 for jobs in evaluations), "models share a process"
    models = {job.split()[1] for jobs in evaluations for job in jobs}
    assert len(evaluations) <= 2 * len(models)  # the checks of a model wait for all models

    table = pd.read_parquet(Path(result.stdout.splitlines()[-1]) / "results" / "jobs").set_index("task")
    assert set(table.state) == {"done"}
    assert set(table.index) == functools.reduce(set.union, jobs_of.values())  # every job has claimed its devices
    joint = table.loc["joint"]
    assert len(set(joint.devices)) == workers
    beside = table[(table.stage == "evaluate") & (table.started < joint.finished) & (table.finished > joint.started)]
    assert len(beside) >= 1
    assert set(table.device) == {"cpu"}  # because these GPUs do not exist


SHARDS = """
import json, os, sys, time
from pathlib import Path

from dwf_cluster.cluster import driver
from dwf_cluster.cluster.connect import local
from dwf_cluster.cluster.events import Ended, Started
from dwf_cluster.data.registry import Sizes
from dwf_cluster.plan.jobs import jobs
from dwf_cluster.plan.resources import Resources, allocate
from dwf_cluster.presets import build

TINY, folder = json.loads(sys.argv[1]), Path(sys.argv[2])


def run_jobs(jobs, store, images, allocation, control):
    for job in jobs:
        attempts = folder / job.file
        attempts.write_text(attempts.read_text() + "+" if attempts.exists() else "+")
        if (job.model, job.suite, job.first) == ("benign", "paper", 24):
            raise ValueError("this shard cannot be measured")
        if (job.model, job.suite, job.first) == ("pgd-1", "noise", 0) and attempts.read_text() == "+":
            # A result that is not yet with the driver dies with the process, and its shard runs again.
            while not all((folder / f"{earlier.file}.ended").exists() for earlier in jobs[: jobs.index(job)]):
                time.sleep(0.01)  # there is no event for files of another process
            os._exit(1)
        yield True


driver._run_jobs = run_jobs
experiment = build("digits", 0, TINY)
shards = jobs(experiment, "evaluate", Sizes(96, 40, (1, 8, 8)))
with local(Resources(2, 2)) as cluster:
    submitted = []
    submit = driver.Cluster.submit
    driver.Cluster.submit = lambda self, batch, *a, **k: submitted.append(list(batch)) or submit(self, batch, *a, **k)
    stores = {experiment.folder: experiment.store(str(folder))}
    allocations = allocate(shards, cluster.resources)
    events = []
    for event in cluster.run(shards, allocations, stores, cluster.share(None), lambda job: job.name, bool):
        events.append(event)
        if isinstance(event, Ended):
            (folder / f"{event.job.file}.ended").touch()
print(json.dumps({
    "shards": [job.name for job in shards],
    "submitted": [[job.name for job in batch] for batch in submitted],
    "events": [
        [type(e).__name__, e.job.name, getattr(e, "state", "")] for e in events if isinstance(e, Started | Ended)
    ],
    "reasons": [e.reason for e in events if isinstance(e, Ended) and e.reason],
}))
"""


def test_a_process_with_a_gpu_runs_all_shards_of_a_model_and_a_shard_that_fails_fails_alone(tmp_path: Path) -> None:
    """Of `benign` one shard raises; the process of `pgd-1` dies once."""
    command = [sys.executable, "-c", SHARDS, json.dumps(TINY), tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    run = json.loads(result.stdout.splitlines()[-1])
    failing = "evaluate benign paper 24-39"

    states = {name: state for kind, name, state in run["events"] if kind == "Ended"}
    assert states == {name: "failed" if name == failing else "done" for name in run["shards"]}
    (reason,) = run["reasons"]
    assert "this shard cannot be measured" in reason
    attempts = {path.name: len(path.read_text()) for path in tmp_path.iterdir() if path.is_file()}
    assert {name: count for name, count in attempts.items() if count > 1} == {"evaluate-pgd-1-noise-000000000": 2}

    running: set[str] = set()  # the progress counts a shard when it runs, not when its process starts
    for kind, name, _ in run["events"]:
        running ^= {name}
        assert (kind == "Started") == (name in running)
        assert len(running) <= 2
    of_model = Counter(batch[0].split()[1] for batch in run["submitted"])
    assert of_model["mixture"] == of_model["fgsm-1"] == 1
    assert of_model["benign"] == of_model["pgd-1"] == 2  # the rest after the failed shard; the dead one and its rest
