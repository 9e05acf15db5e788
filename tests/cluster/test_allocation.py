"""`sbatch slurm/full_pipeline.sh` on a real SLURM of two nodes, and each way in which a job is interrupted."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import psutil
import pytest

from dwf_cluster.cluster import allocation, connect, environment, node
from dwf_cluster.cluster.allocation import Ports

from ..conftest import LONG_EPOCHS, NO_MIXTURE, TINY, assert_same
from ..process import command_line, pause_after_first_epoch, resume_and_stop
from . import slurm
from .slurm import Slurm

pytestmark = pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))

SCRIPTS = Path(__file__).parents[2] / "slurm"
ARGUMENTS = ["--set", *TINY, *LONG_EPOCHS]
ON_CPUS = ["--gpus-per-node=0", "--cpus-per-task=1", "--mem=3G"]


class Job:
    """A job of a script of `slurm/`, its log, and its experiment's folder."""

    def __init__(
        self, cluster: Slurm, folder: Path, options: list[str], script: str, arguments: list[str], **variables: str
    ) -> None:
        self.cluster, self.folder = cluster, folder
        variables = {"DWF_PYTHON": sys.executable} | variables
        self.number = cluster.submit(*options, SCRIPTS / script, *arguments, cwd=folder, **variables)

    @property
    def log(self) -> str:
        file = self.folder / f"slurm-{self.number}.out"
        return file.read_text() if file.exists() else ""

    @property
    def results(self) -> Path:
        (results,) = (self.folder / "runs").iterdir()
        return results

    def wait_for(self, line: str, times: int = 1) -> None:
        """Wait until at least `times` lines of the log match."""

        def is_logged() -> bool:
            assert self.cluster.state(self.number) not in ("COMPLETED", "FAILED", "CANCELLED"), self.log
            return len(re.findall(line, self.log, re.M)) >= times

        self.cluster.wait_for(is_logged, f"line like {line!r}")

    def end(self, state: str = "COMPLETED") -> None:
        """Wait for the end of the job and of all its processes."""
        assert self.cluster.wait(self.number) == state, self.log
        self.cluster.wait_for(lambda: not self.cluster.processes(self.number), "end of all processes")

    def process(self, title: str) -> psutil.Process:
        """The process of this job whose command line matches."""

        def matching() -> list[psutil.Process]:
            return [p for p in self.cluster.processes(self.number) if re.search(title, command_line(p))]

        self.cluster.wait_for(matching, f"process like {title!r}")
        return matching()[0]


@pytest.fixture
def submit(cluster: Slurm, tmp_path: Path) -> Callable[..., Job]:
    def submit(
        *options: str,
        script: str = "full_pipeline.sh",
        arguments: list[str] = ARGUMENTS,
        defaults: list[str] = ON_CPUS,
        **variables: str,
    ) -> Job:
        return Job(cluster, tmp_path, [*defaults, *options], script, arguments, **variables)

    return submit


EXPERTS = ["--stages", "experts", *ARGUMENTS]
ONE_EXPERT = ["--stages", "experts", "--set", *TINY, "experts.fgsm=0", "experts.pgd=0", "experts.epochs=1"]
ONE_NODE = ["--nodes=1", "--cpus-per-task=2"]


def assert_same_experts(one: Path, other: Path) -> None:
    assert_same(one, other, models=["benign", "fgsm-1", "pgd-1"], tables=["metrics"])


def argument(command: list[str], option: str) -> str:
    """The value of an option in a command line."""
    (value,) = (part.partition("=")[2] for part in command if part.startswith(f"{option}="))
    return value


def partial(folder: Path) -> list[str]:
    """Checkpoints that were saved in the middle of an epoch."""
    return [path.name for path in folder.glob("checkpoints/*/*-step-*")]


def test_a_requeued_run_on_two_nodes_has_the_tables_of_one_machine(
    submit: Callable[..., Job], cluster: Slurm, two_worker_run: Path
) -> None:
    """Two nodes of one worker each train the mixture bit for bit as two workers of one node do."""
    job = submit("--nodes=2", arguments=["--joint-workers", "2", *ARGUMENTS])
    pause_after_first_epoch(job.folder, "joint")  # SLURM's signal resumes it
    cluster("scontrol", "requeue", job.number)
    job.end()
    assert cluster.field(job.number, "Restarts") == "1"
    assert_same(job.results, two_worker_run)
    jobs = pd.read_parquet(job.results / "results" / "jobs").set_index("task")
    assert sorted(jobs.loc["joint", "devices"]) == ["n1: cpu", "n2: cpu"]
    assert jobs.loc["joint", "attempts"] == 2
    assert not list(Path("/tmp").glob(f"dwf-{job.number}-*"))
    assert {file.suffix for file in job.folder.glob("slurm-*")} == {".log", ".out"}


@pytest.mark.interruptions
def test_a_preempted_run_keeps_the_last_step_with_a_warning_and_the_last_epoch_without(
    submit: Callable[..., Job], cluster: Slurm, two_worker_run: Path, tmp_path: Path
) -> None:
    preempt = ("--partition=high", "--nodes=2", "--exclusive", "--wrap=true")
    job = submit(*ONE_NODE, arguments=EXPERTS)
    training = pause_after_first_epoch(job.folder, "expert pgd-1")
    other = cluster.submit(*preempt, cwd=tmp_path)
    job.wait_for("^stopping: ")
    resume_and_stop(training)
    job.wait_for("^requeued: the run continues")
    assert re.search(r"^expert pgd-1: stopped in ", job.log, re.M)
    assert partial(job.results)
    assert cluster.wait(other) == "COMPLETED"

    cluster("scontrol", "update", "partition=main", "GraceTime=0")
    pause_after_first_epoch(job.folder, "expert pgd-1")
    other = cluster.submit(*preempt, cwd=tmp_path)
    assert cluster.wait(other) == "COMPLETED"
    cluster("scontrol", "update", "partition=main", "GraceTime=60")
    job.end()
    assert cluster.field(job.number, "Restarts") == "2"
    assert job.log.count("requeued: the run continues") == 1
    assert_same_experts(job.results, two_worker_run)


@pytest.mark.interruptions
def test_a_run_whose_node_goes_down_is_requeued_and_loses_no_result(
    submit: Callable[..., Job], cluster: Slurm, two_worker_run: Path
) -> None:
    job = submit("--nodes=2", arguments=EXPERTS)
    pause_after_first_epoch(job.folder, "expert pgd-1")
    cluster("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    cluster.wait_for(lambda: cluster.state(job.number) == "PENDING", "requeue")
    cluster("scontrol", "update", "nodename=n2", "state=resume")
    job.end()
    assert cluster.field(job.number, "Restarts") == "1"
    assert_same_experts(job.results, two_worker_run)


@pytest.mark.interruptions
def test_a_killed_worker_and_a_killed_head_are_replaced_within_the_allocation(
    submit: Callable[..., Job], cluster: Slurm, two_worker_run: Path
) -> None:
    job = submit(*ONE_NODE, arguments=EXPERTS)
    job.process("ray::expert pgd-1").kill()
    pause_after_first_epoch(job.folder, "expert pgd-1")
    job.process("gcs_server").kill()
    job.end()
    assert "the Ray cluster was lost; see " in job.log
    assert cluster.field(job.number, "Restarts") == "0"
    assert_same_experts(job.results, two_worker_run)


@pytest.mark.interruptions
def test_a_cancelled_run_names_the_command_that_resumes_it(
    submit: Callable[..., Job], cluster: Slurm, two_worker_run: Path
) -> None:
    job = submit(*ONE_NODE, arguments=EXPERTS)
    pause_after_first_epoch(job.folder, "expert pgd-1")
    cluster("scancel", job.number)
    job.end("CANCELLED")
    assert f"\nresume: sbatch slurm/full_pipeline.sh --stages experts --set {TINY[0]} " in job.log
    resumed = submit(*ONE_NODE, arguments=EXPERTS)
    resumed.end()
    assert_same_experts(resumed.results, two_worker_run)


@pytest.mark.interruptions
def test_a_run_whose_time_is_over_is_requeued(submit: Callable[..., Job], cluster: Slurm) -> None:
    """SLURM checks time limits every half minute, and they are whole minutes."""
    endless = [*EXPERTS, "experts.epochs=9999"]
    job = submit("--time=2", "--signal=USR2@20", *ONE_NODE, arguments=endless)
    job.wait_for("^requeued: the run continues")
    cluster.wait_for(lambda: cluster.state(job.number) == "PENDING", "requeue")
    assert partial(job.results)
    cluster("scancel", job.number)
    job.end("CANCELLED")


@pytest.mark.interruptions
def test_a_requeued_sweep_on_two_nodes_continues(
    submit: Callable[..., Job], cluster: Slurm, two_worker_run: Path, tmp_path: Path
) -> None:
    shutil.copytree(two_worker_run, tmp_path / "runs" / two_worker_run.name, ignore=NO_MIXTURE)
    varied = ["gate.kind=soft", "gate.kind=hard", "--joint-workers", "2"]
    job = submit("--nodes=2", script="sweep.sh", arguments=[*varied, *ARGUMENTS])
    pause_after_first_epoch(job.folder, "joint")  # of one trial; SLURM's signal resumes it
    cluster("scontrol", "requeue", job.number)
    job.end()
    assert cluster.field(job.number, "Restarts") == "1"
    (table,) = (job.folder / "runs" / "sweeps").glob("*/trials.parquet")
    trials = pd.read_parquet(table).set_index("gate.kind")
    assert trials.state.to_dict() == {"soft": "done", "hard": "done"}
    assert_same(job.folder / "runs" / trials.folder["soft"], two_worker_run)


def test_a_node_that_does_not_join_is_named_with_its_log(cluster: Slurm, submit: Callable[..., Job]) -> None:
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


@pytest.fixture
def strangers(cluster: Slurm, tmp_path: Path) -> Iterator[list[Path]]:
    """Folders of another user, named after the jobs that will be submitted next."""
    number = cluster.submit("--hold", "--wrap=true", cwd=tmp_path)
    cluster("scancel", number)
    folders = [Path(f"/tmp/dwf-{int(number) + following}") for following in (1, 2)]
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)  # of a killed test run
        folder.mkdir()
        (folder / "token").write_text("theirs")
        os.chown(folder, 65534, 65534)
    yield folders
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def test_two_jobs_on_one_node_have_their_own_resources_ports_and_tokens(
    submit: Callable[..., Job], strangers: list[Path]
) -> None:
    jobs = [submit("--nodes=1", "--gpus-per-node=h100:1", "--nodelist=n1", arguments=EXPERTS) for _ in range(2)]
    ports = set()
    for job in jobs:
        job.wait_for("^experts: 3 to do")
        ray = job.process("ray.scripts.scripts")
        command = ray.cmdline()
        assert {"--num-cpus=1", "--num-gpus=1", f"--memory={(3 << 30) * 4 // 5 + 1}"} <= set(command), command
        assert ray.environ()["GLOO_SOCKET_IFNAME"] == "lo"
        assert not [p for p in job.cluster.processes(job.number) if "ray.util.client.server" in p.cmdline()]
        ports |= {re.findall(r"^Ray dashboard: http://127.0.0.1:(\d+) ", job.log, re.M)[0]}
        (token,) = Path("/tmp").glob(f"dwf-{job.number}-*/token")
        assert f"cat {token}`" in job.log
        assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert len(ports) == 2
    for job in jobs:
        job.cluster("scancel", job.number)
        job.end("CANCELLED")
    assert [(folder / "token").read_text() for folder in strangers] == ["theirs", "theirs"]


def test_ray_has_the_resources_of_each_of_three_different_nodes(submit: Callable[..., Job], cluster: Slurm) -> None:
    job = submit("--partition=uneven", "--exclusive", "--nodes=3", arguments=EXPERTS)

    def started() -> bool:
        commands = [command_line(process).split() for process in cluster.processes(job.number)]
        rays = [command for command in commands if "--block" in command]
        cpus = {(argument(command, "--node-name"), argument(command, "--num-cpus")) for command in rays}
        return cpus == {("n1", str(slurm.CPUS)), ("n2", str(slurm.CPUS)), (slurm.LAST, "1")}

    cluster.wait_for(started, "Ray on three nodes")
    cluster("scancel", job.number)
    job.end("CANCELLED")


@pytest.mark.interruptions
def test_different_nodes_give_the_same_tables(submit: Callable[..., Job], two_worker_run: Path) -> None:
    job = submit("--partition=uneven", "--exclusive", "--nodes=2", f"--nodelist=n1,{slurm.LAST}", arguments=EXPERTS)
    job.end()
    assert_same_experts(job.results, two_worker_run)


def test_a_job_that_has_a_whole_node_uses_gpus_that_slurm_does_not_manage(
    submit: Callable[..., Job], tmp_path: Path
) -> None:
    script = tmp_path / "site.sh"
    header = (SCRIPTS / "full_pipeline.sh").read_text()
    script.write_text(header.replace("#SBATCH --gpus-per-node=h100:8\n", ""))  # as docs/slurm.md has it
    here = ["--partition=uneven", f"--nodelist={slurm.LAST}", "--nodes=1", "--cpus-per-task=1"]
    job = submit(script=str(script), defaults=here, CUDA_VISIBLE_DEVICES="5,7")
    ray = job.process("ray.scripts.scripts")
    assert "--num-gpus=2" in ray.cmdline()
    assert ray.environ()["CUDA_VISIBLE_DEVICES"] == "5,7"
    job.cluster("scancel", job.number)
    job.end("CANCELLED")


def test_a_step_with_its_own_tmp_reports_its_exit_status(submit: Callable[..., Job], tmp_path: Path) -> None:
    """As in a container, or where a plugin gives each step a private /tmp."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/bash\n"
        f'exec unshare --mount bash -c \'mount -t tmpfs tmpfs "$TMPDIR"; exec {sys.executable} "$@"\' _ "$@"\n'
    )
    python.chmod(0o755)
    temporary = tempfile.mkdtemp(prefix="t", dir="/tmp")  # not in tmp_path, whose path is too long for Ray's sockets
    try:
        job = submit(*ONE_NODE, arguments=ONE_EXPERT, DWF_PYTHON=str(python), TMPDIR=temporary)
        job.end()
        assert f" cat {temporary}/dwf-{job.number}-" in job.log
        assert "lost" not in job.log
    finally:
        os.rmdir(temporary)


def test_a_driver_that_has_ended_is_not_started_again(submit: Callable[..., Job]) -> None:
    job = submit(*ONE_NODE, arguments=["--help"])
    job.end()
    assert job.log.count("Ray dashboard: ") == 1


@pytest.mark.parametrize(
    ("status", "starts", "message"),
    [
        ("", 3, "Ray has not started on all nodes; see {log}; resume: again\n"),
        ("joined", 3, "the Ray cluster was lost; see {log}; resume: again\n"),
        ("1", 1, ""),
    ],
)
def test_a_lost_cluster_is_started_again_but_a_failed_run_is_not(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: str,
    starts: int,
    message: str,
) -> None:
    file = tmp_path / "slurm-7.status"
    commands = {
        "srun": f'echo start >> starts; [ -z "{status}" ] || printf "{status}" > {file}; exit 1',
        "scontrol": "echo n1",
    }
    for name, command in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{command}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in {"JOB_ID": "7", "JOB_NUM_NODES": "1", "JOB_NODELIST": "n1", "SUBMIT_DIR": tmp_path}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        assert allocation.run([], "again") == 1
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert (tmp_path / "starts").read_text().count("start") == starts
    assert capsys.readouterr().err.endswith(message.format(log=tmp_path / "slurm-7-n1.log"))
    assert not file.exists()


DEFECT = """
import dwf_cluster.store

def check_url(url):
    raise ZeroDivisionError

dwf_cluster.store.check_url = check_url
"""
KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


def first_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sitecustomize: str
) -> tuple[int, subprocess.Popen[bytes]]:
    """Run the first node's part with a stand-in for Ray and a changed driver; its exit status, and the stand-in."""
    (tmp_path / "sitecustomize.py").write_text(sitecustomize)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    ray = subprocess.Popen(["sleep", "infinity"])
    monkeypatch.setattr(node, "LOSS_SECONDS", 0.1)
    monkeypatch.setattr(node, "_start_ray", lambda options: ray)
    variables = {"SLURM_SUBMIT_DIR": tmp_path, "SLURM_JOB_ID": "7", "SLURMD_NODENAME": "n1", "DWF_FOLDER": tmp_path}
    variables |= {"DWF_HEAD_PORT": 1, "DWF_DASHBOARD_PORT": 2, "SLURM_LAUNCH_NODE_IPADDR": "::1"}
    variables |= {environment.RESUME_COMMAND: "sbatch it"}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR2)}
    try:
        return node._run_first_node([]), ray
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def test_a_defect_of_the_driver_is_not_a_lost_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status, ray = first_node(tmp_path, monkeypatch, DEFECT)
    assert status == 0
    assert environment.status_file().read_text() == "1"
    *_, error, failed, resume = capfd.readouterr().err.splitlines()
    assert error == "ZeroDivisionError"
    assert failed.startswith("failed: a defect of the program")
    assert resume == "resume: sbatch it"
    assert ray.poll() is not None


def test_a_killed_driver_is_a_lost_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    status, ray = first_node(tmp_path, monkeypatch, KILLED)
    assert status == 1
    assert not environment.status_file().exists()
    assert capfd.readouterr().err == "the driver was ended by signal 9\n"
    assert ray.poll() is not None


def test_a_head_with_an_ipv6_address_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as head:
        port = head.getsockname()[1]
        monkeypatch.setenv("SLURM_LAUNCH_NODE_IPADDR", "::1")
        monkeypatch.setenv("DWF_HEAD_PORT", str(port))
        connect.reach_head()
        assert node._url(*environment.head_address()) == f"[::1]:{port}"
    assert [node._own_address(host) for host in ("::1", "127.0.0.1")] == ["::1", "127.0.0.1"]
    assert [node._interface(address) for address in ("::1", "127.0.0.1", "192.0.2.1")] == ["lo", "lo", None]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("DWF_HEAD_ADDRESS", "n1-ib", "an IP address of the first node"),
        ("DWF_HEAD_ADDRESS", "192.0.2.1", "an IP address of the first node"),
        ("DWF_GPUS", "all", "the number of GPUs to use on each node"),
    ],
)
def test_settings_of_a_site_are_checked(name: str, value: str, allowed: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dwf_cluster.cluster.allocation"],
        env=os.environ | {"SLURM_JOB_ID": "7", name: value},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == f"error: {name}: {value!r} cannot be used: allowed is {allowed}\n"


def test_a_temporary_folder_whose_path_is_too_long_for_sockets_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12345678")
    for parent, used in ((tmp_path / ("x" * 40), "/tmp"), (Path("/dev/shm"), "/dev/shm"), (Path("/nowhere"), "/tmp")):
        monkeypatch.setenv("TMPDIR", str(parent))
        assert str(allocation.new_folder().parent) == used
    assert allocation.new_folder() != allocation.new_folder()


def test_private_folders_of_earlier_starts_of_this_job_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    current, old, foreign, other_job = (tmp_path / f"dwf-{name}" for name in ("7-new", "7-old", "7-foreign", "71-x"))
    for folder in (current, old, foreign, other_job):
        folder.mkdir()
    os.chown(foreign, 65534, 65534)
    allocation.remove_old_folders(current)
    assert {folder.name for folder in tmp_path.iterdir()} == {current.name, foreign.name, other_job.name}


def test_a_private_folder_is_removed_although_a_dying_process_still_writes_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    (old := tmp_path / "dwf-7-old").mkdir()
    write = "import sys; print(flush=True); [open(f'{sys.argv[1]}/{number}', 'w') for number in range(20_000)]"
    with subprocess.Popen(
        [sys.executable, "-c", write, old], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        allocation.remove_old_folders(tmp_path / "dwf-7-new")
    assert not old.exists()


@pytest.mark.parametrize("script", ["full_pipeline.sh", "sweep.sh"])
def test_a_batch_script_uses_the_environment_beside_it_or_prints_what_to_do(tmp_path: Path, script: str) -> None:
    def run(**variables: str) -> subprocess.CompletedProcess[str]:
        variables = {"PATH": "/usr/bin:/bin", "SLURM_SUBMIT_DIR": str(tmp_path)} | variables
        command = ["bash", SCRIPTS / script, "seeds=0..1"]
        return subprocess.run(command, env=variables, cwd="/", capture_output=True, text=True, check=False)

    absent = run()
    assert (absent.returncode, absent.stderr.count("\n")) == (2, 1)
    assert absent.stderr.startswith("error: python cannot import dwf_cluster: run `make demo` in the folder that you ")
    assert run(DWF_PYTHON="/nowhere").stderr.startswith("error: /nowhere cannot import dwf_cluster: ")
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    expected = "-m dwf_cluster.cluster.allocation " + ("--sweep " if script == "sweep.sh" else "") + "seeds=0..1"
    assert run().stdout.splitlines()[-1] == expected


def test_ports_of_neighbouring_jobs_are_disjoint_and_free() -> None:
    with socket.socket() as occupied:
        mine = Ports.free(7)
        occupied.bind(("", mine.head))
        others = [Ports.free(7), Ports.free(8), Ports.free(7 + 6000)]
    used = [port for ports in others for port in (ports.head, ports.dashboard)]
    assert mine.head not in used
    assert all(20_000 <= port < 32_000 for port in used)


def test_outside_an_allocation_the_error_names_the_command_to_use() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dwf_cluster.cluster.allocation"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr == "error: no SLURM allocation here; use sbatch slurm/full_pipeline.sh\n"
