"""`sbatch slurm/full_pipeline.sh` on a real SLURM of two nodes, and every way in which SLURM takes them away."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest

from dwf_cluster.cluster.allocation import Ports

from ..conftest import SLOWER, TINY, assert_same, go_on_to_stop, held
from . import slurm
from .slurm import Slurm

pytestmark = pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))

SCRIPTS = Path(__file__).parents[2] / "slurm"
ARGUMENTS = ["--set", *TINY, *SLOWER]
ON_CPUS = ["--gpus-per-node=0", "--cpus-per-task=1", "--mem=3G"]


class Job:
    """A job of a script of `slurm/`, its log, its experiment's folder."""

    def __init__(self, cluster: Slurm, folder: Path, options: list[str], script: str, arguments: list[str]) -> None:
        self.cluster, self.folder = cluster, folder
        self.number = cluster.submit(*options, SCRIPTS / script, *arguments, cwd=folder, DWF_PYTHON=sys.executable)

    @property
    def log(self) -> str:
        file = self.folder / f"slurm-{self.number}.out"
        return file.read_text() if file.exists() else ""

    @property
    def results(self) -> Path:
        (results,) = (self.folder / "runs").iterdir()
        return results

    def wait_for(self, line: str, times: int = 1) -> None:
        """Wait until so many lines of the log match."""

        def found() -> bool:
            assert self.cluster.state(self.number) not in ("COMPLETED", "FAILED", "CANCELLED"), self.log
            return len(re.findall(line, self.log, re.M)) >= times

        self.cluster.wait_for(found, f"line like {line!r}")

    def end(self, state: str = "COMPLETED") -> None:
        """Wait for the end; nothing of the job may outlive it."""
        assert self.cluster.wait(self.number) == state, self.log
        self.cluster.wait_for(lambda: not self.cluster.processes(self.number), "end of all processes", 30)

    def process(self, title: str) -> psutil.Process:
        """The process of this job whose command line matches."""

        def found() -> list[psutil.Process]:
            return [p for p in self.cluster.processes(self.number) if re.search(title, " ".join(p.cmdline()))]

        self.cluster.wait_for(found, f"process like {title!r}")
        return found()[0]


@pytest.fixture
def submit(cluster: Slurm, tmp_path: Path) -> Callable[..., Job]:
    def submit(*options: str, script: str = "full_pipeline.sh", arguments: list[str] = ARGUMENTS) -> Job:
        return Job(cluster, tmp_path, [*ON_CPUS, *options], script, arguments)

    return submit


EXPERTS = ["--stages", "experts", *ARGUMENTS]
ONE_NODE = ["--nodes=1", "--cpus-per-task=2"]


def assert_same_experts(one: Path, other: Path) -> None:
    assert_same(one, other, models=["benign", "fgsm-1", "pgd-1"], tables=["metrics"])


def partial(folder: Path) -> list[str]:
    """Checkpoints that were saved in the middle of an epoch."""
    return [path.name for path in folder.glob("checkpoints/*/*-step-*")]


def test_requeued_in_the_middle_two_nodes_come_to_the_tables_of_one_machine(
    submit: Callable[..., Job], cluster: Slurm, two_workers: Path
) -> None:
    """Two nodes of one worker each train the mixture bit for bit as two workers of one node do."""
    job = submit("--nodes=2", arguments=["--joint-workers", "2", *ARGUMENTS])
    held(job.folder, "joint")  # SLURM lets it go on, with its signal
    cluster("scontrol", "requeue", job.number)
    job.end()
    assert cluster.field(job.number, "Restarts") == "1"
    assert_same(job.results, two_workers)
    jobs = pd.read_parquet(job.results / "results" / "jobs").set_index("task")
    assert sorted(jobs.loc["joint", "devices"]) == ["n1: cpu", "n2: cpu"]
    assert jobs.loc["joint", "attempts"] == 2
    assert not Path(f"/tmp/dwf-{job.number}").exists()


@pytest.mark.interruptions
def test_preempted_with_a_warning_it_saves_the_step_it_is_at_without_one_it_has_the_last_epoch(
    submit: Callable[..., Job], cluster: Slurm, two_workers: Path, tmp_path: Path
) -> None:
    preempt = ("--partition=high", "--nodes=2", "--exclusive", "--wrap=true")
    job = submit(*ONE_NODE, arguments=EXPERTS)
    training = held(job.folder, "expert pgd-1")
    other = cluster.submit(*preempt, cwd=tmp_path)
    job.wait_for("^stopping: ")
    go_on_to_stop(training)
    job.wait_for("^requeued: it goes on")
    assert re.search(r"^expert pgd-1: stopped in ", job.log, re.M)
    assert partial(job.results)
    assert cluster.wait(other) == "COMPLETED"

    cluster("scontrol", "update", "partition=main", "GraceTime=0")
    held(job.folder, "expert pgd-1")
    other = cluster.submit(*preempt, cwd=tmp_path)
    assert cluster.wait(other) == "COMPLETED"
    cluster("scontrol", "update", "partition=main", "GraceTime=60")
    job.end()
    assert cluster.field(job.number, "Restarts") == "2"
    assert job.log.count("requeued: it goes on") == 1
    assert_same_experts(job.results, two_workers)


@pytest.mark.interruptions
def test_a_node_that_goes_down_costs_the_allocation_but_no_result(
    submit: Callable[..., Job], cluster: Slurm, two_workers: Path
) -> None:
    job = submit("--nodes=2", arguments=EXPERTS)
    held(job.folder, "expert pgd-1")
    cluster("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait_for(lambda: cluster.state(job.number) == "PENDING", "requeue")
    cluster("scontrol", "update", "nodename=n2", "state=resume")
    job.end()
    assert cluster.field(job.number, "Restarts") == "1"
    assert_same_experts(job.results, two_workers)


@pytest.mark.interruptions
def test_a_killed_worker_and_a_killed_head_are_replaced_within_the_allocation(
    submit: Callable[..., Job], cluster: Slurm, two_workers: Path
) -> None:
    job = submit(*ONE_NODE, arguments=EXPERTS)
    job.process("ray::expert pgd-1").kill()
    held(job.folder, "expert pgd-1")
    job.process("gcs_server").kill()
    job.end()
    assert "the Ray cluster was lost; see " in job.log
    assert cluster.field(job.number, "Restarts") == "0"
    assert_same_experts(job.results, two_workers)


@pytest.mark.interruptions
def test_cancelled_it_stops_for_good_says_how_to_resume_and_is_resumed(
    submit: Callable[..., Job], cluster: Slurm, two_workers: Path
) -> None:
    job = submit(*ONE_NODE, arguments=EXPERTS)
    held(job.folder, "expert pgd-1")
    cluster("scancel", job.number)
    job.end("CANCELLED")
    assert f"\nresume: sbatch slurm/full_pipeline.sh --stages experts --set {TINY[0]} " in job.log
    again = submit(*ONE_NODE, arguments=EXPERTS)
    again.end()
    assert_same_experts(again.results, two_workers)


@pytest.mark.interruptions
def test_out_of_time_it_is_requeued(submit: Callable[..., Job], cluster: Slurm) -> None:
    """SLURM looks at time limits every half minute only, and they are whole minutes."""
    endless = [*EXPERTS, "experts.epochs=9999"]
    job = submit("--time=2", "--signal=USR2@20", *ONE_NODE, arguments=endless)
    job.wait_for("^requeued: it goes on")
    cluster.wait_for(lambda: cluster.state(job.number) == "PENDING", "requeue")
    assert partial(job.results)
    cluster("scancel", job.number)
    job.end("CANCELLED")


@pytest.mark.interruptions
def test_a_sweep_on_two_nodes_goes_on_after_it_was_requeued(
    submit: Callable[..., Job], cluster: Slurm, two_workers: Path
) -> None:
    varied = ["gate.kind=soft", "gate.kind=hard", "--joint-workers", "2"]
    job = submit("--nodes=2", script="sweep.sh", arguments=[*varied, *ARGUMENTS])
    held(job.folder, "joint")  # of one trial; SLURM lets it go on, with its signal
    cluster("scontrol", "requeue", job.number)
    job.end()
    assert cluster.field(job.number, "Restarts") == "1"
    (table,) = (job.folder / "runs" / "sweeps").glob("*/trials.parquet")
    trials = pd.read_parquet(table).set_index("gate.kind")
    assert trials.state.to_dict() == {"soft": "done", "hard": "done"}
    assert_same(job.folder / "runs" / trials.folder["soft"], two_workers)


def test_a_node_that_does_not_come_is_named_with_its_log(cluster: Slurm, submit: Callable[..., Job]) -> None:
    job = submit("--nodes=2", "--export=ALL,DWF_JOIN_SECONDS=10", arguments=EXPERTS)

    def second() -> list[psutil.Process]:
        return [
            process
            for process in cluster.processes(job.number)
            if process.environ().get("SLURM_PROCID") == "1" and "dwf_cluster.cluster.node" in process.cmdline()
        ]

    cluster.wait_for(second, "second node's process")
    second()[0].suspend()
    job.end("FAILED")
    assert f"failed: node n2 has not joined within 10 s; its log: {job.folder}/slurm-{job.number}-n2.log" in job.log
    assert "\nresume: sbatch " in job.log


def test_two_jobs_on_one_node_do_not_meet_and_have_what_is_theirs(submit: Callable[..., Job]) -> None:
    jobs = [submit("--nodes=1", "--gpus-per-node=h100:1", "--nodelist=n1", arguments=EXPERTS) for _ in range(2)]
    ports = set()
    for job in jobs:
        job.wait_for("^experts: 3 to do")
        told = job.process("ray.scripts.scripts").cmdline()
        assert {"--num-cpus=1", "--num-gpus=1", f"--memory={(3 << 30) * 4 // 5 + 1}"} <= set(told), told
        ports |= {re.findall(r"^Ray dashboard: http://127.0.0.1:(\d+) ", job.log, re.M)[0]}
        token = Path(f"/tmp/dwf-{job.number}/token")
        assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert len(ports) == 2
    for job in jobs:
        job.cluster("scancel", job.number)
        job.end("CANCELLED")


def test_ports_of_neighbouring_jobs_are_disjoint_and_free() -> None:
    with socket.socket() as taken:
        mine = Ports.free(7)
        taken.bind(("", mine.head))
        others = [Ports.free(7), Ports.free(8), Ports.free(7 + 4000)]
    used = [port for ports in others for port in (ports.head, ports.dashboard, ports.client)]
    assert mine.head not in used
    assert all(20_000 <= port < 32_000 for port in used)


def test_outside_an_allocation_it_says_what_to_do() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dwf_cluster.cluster.allocation"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == "error: no SLURM allocation here; use sbatch slurm/full_pipeline.sh\n"
