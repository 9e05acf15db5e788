"""Kinds of failure: how often a job is retried, what the user reads, and what the log contains."""

from __future__ import annotations

import asyncio
import json
import os
import pkgutil
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from dwf_cluster.attacks.gradient import NotLogits
from dwf_cluster.cluster import failures
from dwf_cluster.cluster.connect import RayNotStarted, local
from dwf_cluster.cluster.control import Claim, Control
from dwf_cluster.cluster.driver import fits
from dwf_cluster.cluster.failures import KINDS, Kind, clean, failure, kind_of, last_line
from dwf_cluster.cluster.memory import Memory
from dwf_cluster.data.registry import Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import Job, jobs
from dwf_cluster.plan.resources import Resources
from dwf_cluster.plan.schedule import Allocation
from dwf_cluster.presets import build
from dwf_cluster.store import StorageFailed, Store, checkpoints, tables
from dwf_cluster.store.job_log import recorded

from .. import PATIENCE
from ..conftest import ARGUMENTS, LOCAL, TINY, store_of
from ..process import Launch, command_line, pause_after_first_epoch, resume_and_stop

ROOT = Path(__file__).parents[2]
SIZES = Sizes(96, 40, (1, 8, 8))


LOW_MEMORY = """1 worker(s) were killed due to the node running low on memory. Memory on the node \
(IP: 10.0.0.7, ID: f125) was 22.53GB used / 23.54GB limit (0.957)
OOM kill reason: Memory usage 24192576512B exceeded threshold of 24012765136B (95.0% of 25276514304B limit)
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Task: job ID=01, lease ID=00, task name=expert fgsm-1, required resources={CPU: 1}, pid=175, \
actual memory used=0.25GB, worker ID=54)
Selected to kill: (Task: job ID=01, lease ID=00, task name=expert pgd-1, required resources={CPU: 1}, pid=176, \
actual memory used=0.31GB, worker ID=55)
]
Top 10 memory users: PID	MEM(GB)	COMMAND
4	9.07	/home/somebody/else.py --password hunter2
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io."""
"""The message of Ray 2.60, shortened."""


@pytest.fixture
def pgd(tiny: Experiment) -> Job:
    return next(job for job in jobs(tiny, "experts", SIZES) if job.model == "pgd-1")


def _low_memory() -> Exception:
    from ray.exceptions import OutOfMemoryError

    return OutOfMemoryError(LOW_MEMORY)  # type: ignore[no-untyped-call]


def _in_a_task(error: Exception) -> Exception:
    from ray.exceptions import RayTaskError

    wrapped: Exception = RayTaskError("run_job", f"Traceback: all of it\n{error}", error)  # type: ignore[no-untyped-call]
    return wrapped


def _of_two_workers(error: Exception) -> Exception:
    """The error of one worker, and the broken connection of the other."""
    from ray.train.v2.api.exceptions import WorkerGroupError

    broken = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4711")
    return _in_a_task(WorkerGroupError("[Rank 0,1 Error Snippet]", {0: broken, 1: error}))  # type: ignore[no-untyped-call]


def _dead_worker() -> Exception:
    from ray.exceptions import RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    died = RayActorError(error_msg="The actor died unexpectedly before finishing this task.")  # type: ignore[no-untyped-call]
    return WorkerHealthCheckFailedError("A worker health check failed.", died)  # type: ignore[no-untyped-call]


def _crashed() -> Exception:
    from ray.exceptions import WorkerCrashedError

    return WorkerCrashedError()


def _node_died() -> Exception:
    from ray.exceptions import NodeDiedError

    return NodeDiedError("The node n2 is dead.")  # type: ignore[no-untyped-call]


def _preempted() -> Exception:
    from ray.exceptions import RayActorError

    return RayActorError(error_msg="its node was drained", preempted=True)  # type: ignore[no-untyped-call]


def _wrong_shape() -> Exception:
    with pytest.raises(RuntimeError) as caught:
        nn.Linear(2, 3).load_state_dict(nn.Linear(2, 4).state_dict())
    return caught.value


GPU = (
    "CUDA out of memory. Tried to allocate 2.25 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.5 GiB is free. "
    "Including non-PyTorch memory, this process has 77 GiB memory in use. If reserved but unallocated memory is large"
)
CASES: list[tuple[Callable[[], Exception], Kind, str]] = [
    (
        _low_memory,
        failures.OUT_OF_MEMORY,
        "out of memory on n1: 22.53 of 23.54 GB were in use, 0.31 GB of them by this job; "
        "set a lower --cpus, a higher experts.accumulation or a lower experts.batch_size",
    ),
    (
        lambda: MemoryError("Unable to allocate 9 GiB"),
        failures.OUT_OF_MEMORY,
        "out of memory: Unable to allocate 9 GiB; set",
    ),
    (
        lambda: torch.OutOfMemoryError(GPU),
        failures.OUT_OF_GPU_MEMORY,
        "out of GPU memory: CUDA out of memory. Tried to allocate 2.25 GiB; "
        "set a higher experts.accumulation or a lower experts.batch_size",
    ),
    (_crashed, failures.WORKER_DIED, "worker died: its process ended without a message"),
    (_dead_worker, failures.WORKER_DIED, "worker died: its process ended without a message"),
    (_node_died, failures.NODE_LOST, "node lost: The node n2 is dead."),
    (_preempted, failures.PREEMPTION, "preemption: its node was drained"),
    (
        lambda: StorageFailed("runs/x: cannot be written: full"),
        failures.STORE,
        "store: runs/x: cannot be written: full",
    ),
    (
        lambda: FileNotFoundError("pgd-1 has no checkpoint that can be read"),
        failures.BAD_DATA,
        "FileNotFoundError: pgd-1 has no checkpoint that can be read",
    ),
    (lambda: NotLogits("the loss became nan"), failures.CODE, "NotLogits: the loss became nan"),
    (
        _wrong_shape,
        failures.CODE,
        "RuntimeError: size mismatch for bias: copying a param with shape torch.Size([4]) from checkpoint, "
        "the shape in current model is torch.Size([3]).",
    ),
    (
        lambda: RuntimeError(
            "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronous\n"
            "For debugging consider passing CUDA_LAUNCH_BLOCKING=1\nCompile with `TORCH_USE_CUDA_DSA`\n"
        ),
        failures.CODE,
        "RuntimeError: CUDA error: device-side assert triggered",
    ),
]


@pytest.mark.parametrize(("make", "kind", "reason"), CASES)
def test_a_failure_has_a_kind_and_a_reason_of_one_line(
    make: Callable[[], Exception], kind: Kind, reason: str, pgd: Job
) -> None:
    failed = failure(_in_a_task(make()), pgd, "expert pgd-1", {"f125": "n1"})
    assert failed.kind is kind
    assert failed.reason.startswith(reason)
    assert "\n" not in failed.reason


@pytest.mark.parametrize(("make", "kind", "reason"), CASES[:6])
def test_the_failure_of_one_worker_counts_and_not_the_broken_connections_of_the_others(
    make: Callable[[], Exception], kind: Kind, reason: str, pgd: Job
) -> None:
    failed = failure(_of_two_workers(make()), pgd, "expert pgd-1", {"f125": "n1"})
    assert (failed.kind, failed.reason[: len(reason)]) == (kind, reason)


@pytest.mark.parametrize("name", failures._BY_CLASS)
def test_the_exceptions_that_decide_the_kind_exist(name: str) -> None:
    exception = pkgutil.resolve_name(name)
    assert issubclass(exception, BaseException)
    assert f"{exception.__module__}.{exception.__qualname__}" == name  # as `kind_of` spells it


def test_an_error_without_text_has_a_line() -> None:
    assert last_line("") == "no message"
    assert kind_of(KeyError("x")) is failures.CODE


@pytest.mark.parametrize(
    ("stage", "fields"),
    [
        ("joint", "a lower --cpus, a higher joint.accumulation or a lower joint.batch_size"),
        ("evaluate", "a lower --cpus or a lower evaluation.batch_size"),
    ],
)
def test_low_memory_names_the_fields_of_the_stage(stage: str, fields: str, tiny: Experiment) -> None:
    job = jobs(tiny, stage, SIZES)[0]
    assert failure(_low_memory(), job, job.name, {}).reason.endswith(f"; set {fields}")


def test_the_table_in_the_docs_has_the_kinds_and_retries_of_the_code() -> None:
    words = {0: "not", None: "every time"}
    text = (ROOT / "docs" / "failures.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][1:]
    retries = {row[0]: row[2] for row in rows}
    assert list(retries) == [kind.name for kind in KINDS]
    for kind in KINDS:
        assert retries[kind.name].startswith(words.get(kind.retries, f"{kind.retries} times")), kind
    assert f"wait {failures.NODE_PATIENCE:g} s" in text


def test_logs_contain_neither_credentials_nor_command_lines_of_other_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    text = (
        f"{LOW_MEMORY}\nkey wJalrXUtnFEMI/K7MDENG of AKIAIOSFODNN7EXAMPLE\nhttps://me:hunter3@host/x\n"
        "GET /b?X-Amz-Signature=c0ffee&x=1\nAuthorization: Bearer c0ffee"
    )
    cleaned = clean(text)
    for secret in ("wJalr", "AKIA", "hunter", "c0ffee", "somebody"):
        assert secret not in cleaned
    assert "https://***@host/x" in cleaned
    assert "Refer to the documentation" in cleaned


def test_a_log_has_the_traceback_and_the_end_of_the_output() -> None:
    content = failures.log("Traceback: all of it", ["x" * failures.LOG_BYTES, "last words"])
    assert content.startswith(b"Traceback: all of it\n")
    assert content.endswith(b"xlast words")
    assert len(content) < failures.LOG_BYTES + 1000


def test_a_failed_job_stores_its_traceback(store: Store) -> None:
    with pytest.raises(KeyError), failures.logged(store, "joint"):
        {}["this one"]
    content = store.read("logs/joint.txt")
    assert content is not None
    assert content.startswith(b"Traceback (most recent call last)")
    assert b"KeyError: 'this one'" in content


def test_jobs_reserve_measured_or_estimated_memory_up_to_that_of_a_node(tiny: Experiment, store: Store) -> None:
    first, second, third = jobs(tiny, "experts", SIZES)
    allocation, needs = Allocation(0, 1, 0), Memory(16 << 30)
    assert 400 << 20 < needs.need(first, allocation) < 1 << 30
    with recorded(store, {"stage": "experts", "model": first.model, "task": first.name}, first.file, 0, "cpu"):
        pass
    needs.learn(first, True, store)
    (row,) = tables.read(store, "jobs").to_pylist()
    assert needs.need(second, allocation) == pytest.approx(1.1 * row["peak_memory_bytes"], rel=1e-6)
    assert needs.need(second, Allocation(2, 1, 0)) == 0  # nothing is reserved for Train's workers
    needs.failed(third, failures.OUT_OF_MEMORY)
    needs.failed(second, failures.WORKER_DIED)
    assert needs.need(third, allocation) == 16 << 30
    assert needs.need(second, allocation) < 16 << 30
    wide = build("digits", 0, [*TINY, "defence=resnet18-wide", "baselines=[]"]).defended
    other = replace(second, spec=wide, model=wide.name)
    assert needs.need(other, allocation) != needs.need(second, allocation)  # a network of another size is estimated
    deep = replace(second, spec=replace(second.spec, backbone="densenet169", width=64))
    usual = replace(second, spec=replace(second.spec, width=64))
    assert needs.need(deep, allocation) > 3 * needs.need(usual, allocation)
    assert Memory(100 << 20).need(first, allocation) == 100 << 20
    assert Memory(0).need(first, allocation) == 0


def test_the_peak_memory_of_a_job_excludes_earlier_jobs_of_its_process(tiny: Experiment, store: Store) -> None:
    job = {"stage": "experts", "model": "pgd-1", "task": "expert pgd-1"}
    peaks = []
    for size in (300 << 20, 0):
        with recorded(store, job, "expert-pgd-1", 0, "cpu"):
            bytes([1]) * size
        peaks.append(tables.read(store, "jobs").to_pylist()[0]["peak_memory_bytes"])
    assert peaks[0] > peaks[1] + (200 << 20)


def test_the_driver_restores_the_state_of_a_restarted_control_actor() -> None:
    def claim(job: str) -> Claim:
        return Claim(("run", job), 0, "n1", "GPU-0", 1.0, "H100", 7)

    async def restarted() -> tuple[list[Claim], set[str], str | None, str | None]:
        control = Control()
        news = await control.news({"run"}, [claim("joint")])
        refused = await control.claim(claim("expert pgd-1"))
        await control.release(("run", "joint"))
        return news, await control.stopped(0), refused, await control.claim(claim("expert pgd-1"))

    news, stopped, refused, accepted = asyncio.run(restarted())
    assert (news, stopped, accepted) == ([], {"run"}, None)
    assert refused is not None
    assert "taken by joint of run" in refused


def test_a_job_fits_if_the_nodes_can_hold_all_its_workers() -> None:
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 4.0}]
    assert fits(Allocation(0, 4, 0), nodes)
    assert not fits(Allocation(0, 5, 0), nodes)
    assert fits(Allocation(2, 1, 1), nodes)
    assert not fits(Allocation(3, 1, 1), nodes)
    assert fits(Allocation(4, 1, 0.5), nodes)
    assert not fits(Allocation(0, 1, 0), [])


def test_a_run_fails_with_one_line_after_three_attempts_at_low_memory(
    launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Any machine uses more, so Ray kills each worker, and the control actor, at its first check.
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.001")
    alone = ["experts.fgsm=0", "experts.pgd=0"]
    result = launch(*LOCAL, "--stages", "experts", "--set", *TINY, *alone)
    assert result.returncode == 1
    failed, resume = (line for line in result.stderr.splitlines() if line.startswith(("failed: ", "resume: ")))
    assert re.match(
        r"failed: stage experts, expert benign: out of memory on \S+: [\d.]+ of [\d.]+ GB were in use.*; set a lower "
        r"--cpus, a higher experts\.accumulation or a lower experts\.batch_size; tried 3 times; log: \S+$",
        failed,
    )
    assert resume.startswith("resume: python -m dwf_cluster.launch --local")
    assert "Traceback" not in result.stderr
    assert result.stdout.count("tried again") == failures.OUT_OF_MEMORY.retries
    log = Path(failed.rpartition("log: ")[2]).read_text()
    assert "OOM kill reason" in log
    assert "memory users" not in log


@pytest.mark.interruptions
def test_a_run_stops_although_its_control_actor_was_killed(launch: Launch) -> None:
    def kill_then_interrupt(driver: psutil.Process, line: str) -> None:
        training = pause_after_first_epoch(launch.folder, "expert pgd-1")
        (control,) = (p for p in driver.children(recursive=True) if command_line(p).startswith("ray::Control"))
        control.kill()
        driver.send_signal(signal.SIGINT)
        resume_and_stop(training)

    code, stderr = launch.run_and_act_at("^Ray dashboard", kill_then_interrupt, *ARGUMENTS)
    assert code == 130, stderr
    assert "Traceback" not in stderr
    (folder,) = (launch.folder / "runs").iterdir()
    assert checkpoints.latest_epoch(store_of(folder), "pgd-1") in (1, 2)


SCRIPT = """
import json, os, sys, time
from dataclasses import replace
from pathlib import Path

from dwf_cluster.cluster import driver, failures
from dwf_cluster.cluster.connect import local
from dwf_cluster.cluster.events import Ended, Note
from dwf_cluster.data.registry import Sizes
from dwf_cluster.presets import build
from dwf_cluster.plan.jobs import jobs
from dwf_cluster.plan.resources import Resources
from dwf_cluster.plan.schedule import Allocation

TINY, folder = json.loads(sys.argv[1]), Path(sys.argv[2])


def run_job(job, store, images, allocation, control):
    import ray, torch
    from dwf_cluster.cluster import failures
    from dwf_cluster.cluster.control import Claim

    memory = ray.get_runtime_context().get_assigned_resources().get("memory", 0)
    with open(folder / job.model, "a") as file:
        file.write(f"{memory} {os.getpid()}\\n")
    with failures.logged(store, job.file):
        print(f"{job.model} begins", flush=True)
        if job.model == "fgsm-1":
            time.sleep(2)  # Ray's dashboard learns once a second which process it is
            os._exit(1)
        if job.model == "pgd-1":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has none")
    ray.get(control.claim.remote(Claim((job.folder, job.name), 0, "n1", "cpu", 0.0, "cpu", os.getpid())))
    return True


driver._run_job = run_job
failures.NODE_PATIENCE = 0.0
experiment = build("digits", 0, TINY)
experts = jobs(experiment, "experts", Sizes(96, 40, (1, 8, 8)))
(joint,) = jobs(experiment, "joint", Sizes(96, 40, (1, 8, 8)))
with local(Resources(2, 0)) as cluster:
    cluster.resources = Resources(64, 0)
    events = []
    for pending, allocation in ((experts, Allocation(0, 1, 0)), ([joint], Allocation(0, 64, 0))):
        allocations = dict.fromkeys(pending, allocation)
        stores = {experiment.folder: experiment.store(str(folder))}
        events += cluster.run(pending, allocations, stores, cluster.share(None), lambda job: job.name, bool)
ended = {e.job.name: (e.state, e.reason) for e in events if isinstance(e, Ended)}
print(json.dumps({"ended": ended, "notes": [e.text for e in events if isinstance(e, Note)]}))
"""


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder and events of a Ray: one expert is done, one dies, one has a full GPU; the joint stage does not fit."""
    folder = tmp_path_factory.mktemp("failing")
    command = [sys.executable, "-c", SCRIPT, json.dumps(TINY), folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout.splitlines()[-1])


def _attempts(folder: Path, model: str) -> list[list[str]]:
    return [line.split() for line in (folder / model).read_text().splitlines()]


def test_a_job_whose_worker_dies_is_retried_twice(failing: tuple[Path, dict[str, Any]]) -> None:
    folder, events = failing
    attempts = _attempts(folder, "fgsm-1")
    assert len(attempts) == len({pid for _, pid in attempts}) == 3
    state, reason = events["ended"]["expert fgsm-1"]
    assert state == "failed"
    assert re.match(r"worker died: .*; tried 3 times; log: \S+$", reason)
    notes = [note for note in events["notes"] if note.startswith("expert fgsm-1: worker died: ")]
    assert [note.endswith("; tried again") for note in notes] == [True, True]
    log = Path(reason.rpartition("log: ")[2]).read_text()
    assert "fgsm-1 begins" in log


def test_a_job_with_a_full_gpu_is_not_retried_and_has_a_log(failing: tuple[Path, dict[str, Any]]) -> None:
    folder, events = failing
    assert len(_attempts(folder, "pgd-1")) == 1
    state, reason = events["ended"]["expert pgd-1"]
    assert state == "failed"
    assert reason.startswith("out of GPU memory: CUDA out of memory. Tried to allocate 2 GiB; set a higher experts.acc")
    log = Path(reason.rpartition("log: ")[2]).read_text()
    assert log.startswith("Traceback (most recent call last)")
    assert "pgd-1 begins" in log


def test_each_task_reserves_memory(failing: tuple[Path, dict[str, Any]]) -> None:
    folder, events = failing
    assert events["ended"]["expert benign"] == ["done", ""]
    assert all(float(memory) > 400 << 20 for memory, _ in _attempts(folder, "benign"))


def test_a_job_that_no_node_can_hold_fails_after_a_limited_wait(failing: tuple[Path, dict[str, Any]]) -> None:
    _, events = failing
    assert events["ended"]["joint"] == ["failed", "node lost: no nodes are left that can hold 64 CPU"]
    assert any(note.startswith("joint: node lost: ") for note in events["notes"])


def test_a_ray_that_does_not_start_is_retried_and_then_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    log = "ERROR dashboard\nTraceback\nRuntimeError: Module MetricsHead failed to start. Timeout after 30.0 seconds."

    def fail(**options: object) -> None:
        raise Exception(log)

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr("ray.init", fail)
    expected = (
        "Ray did not start in 3 attempts: RuntimeError: Module MetricsHead failed to start. Timeout after 30.0 seconds."
    )
    with pytest.raises(RayNotStarted, match=re.escape(expected) + "$"), local(Resources(1, 0)):
        pass
