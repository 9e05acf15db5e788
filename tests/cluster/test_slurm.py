"""`--slurm`: submit jobs, follow them, follow them again; on a real SLURM, and with submitit's local executor."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import pandas as pd
import psutil
import pytest
import submitit
from ray._private.runtime_env.packaging import create_package

from dwf_cluster.cluster.sbatch import RESERVED, SlurmJob, SlurmOptions, follow
from dwf_cluster.console import options
from dwf_cluster.settings import InvalidInput

from ..conftest import LONG_EPOCHS, TINY, assert_same, write_npz
from ..process import Launch, pause_after_first_epoch, resume_and_stop
from . import slurm
from .slurm import Slurm

needs_slurm = pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))
ASK = ["--slurm", "--gpus-per-node", "0", "--cpus-per-node", "2", "--time", "30", "--sbatch", "mem=3G"]
EXPERTS = ["--stages", "experts", "--set", *TINY, *LONG_EPOCHS]


@pytest.fixture
def on_slurm(cluster: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return Launch(tmp_path)


@needs_slurm
def test_an_array_of_seeds_continues_when_launch_is_killed_and_is_followed_again(
    on_slurm: Launch, cluster: Slurm, reference_run: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    command = [*ASK, "--seed", "0,1", "--throttle", "1", *EXPERTS]

    training: list[psutil.Process] = []

    def close(process: psutil.Process, line: str) -> None:
        training.append(pause_after_first_epoch(on_slurm.folder, "expert pgd-1"))
        process.kill()

    status, _ = on_slurm.run_and_act_at(r"job \S+: RUNNING", close, *command)
    assert status == -signal.SIGKILL
    running = cluster("squeue", "-hro", "%K %T").split("\n")
    assert sorted(filter(None, running)) == ["0 RUNNING", "1 PENDING"]  # no more than one at once

    status, errors, lines = on_slurm.run_with_steps([("^Ctrl-C", lambda _, line: training[0].resume())], *command)
    assert status == 0, errors
    folders = [Path(line) for line in lines[-2:]]
    assert [folder.name[:13] for folder in folders] == ["digits-seed0-", "digits-seed1-"]
    assert len([line for line in lines if re.search(r": job \d+_[01] is already in the queue$", line)]) == 2
    assert not [line for line in lines if re.search(r"job \S+ submitted$", line)]
    assert any(line.startswith(f"{folders[1].name}: expert pgd-1: epoch 3/3") for line in lines)
    assert_same(folders[0], reference_run[0], models=["benign", "fgsm-1", "pgd-1"], tables=["metrics"])
    assert set(pd.read_parquet(folders[0] / "results" / "jobs").attempts) == {1}

    third = on_slurm(*command)
    assert third.returncode == 0
    assert third.stdout.splitlines() == [str(folder) for folder in folders]  # nothing to submit


@needs_slurm
def test_a_failed_job_is_reported_with_its_log_and_the_command_that_resumes(on_slurm: Launch) -> None:
    exploding = ["experts.learning_rate=100", "experts.weight_decay=1", "experts.epochs=9"]
    result = on_slurm(*ASK, *EXPERTS, *exploding)
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert re.fullmatch(rf"failed: job \d+ ended before all was done; log: {on_slurm.folder}/slurm-jobs/\S+", first)
    assert second.startswith("resume: python -m dwf_cluster.launch --slurm --gpus-per-node 0 ")
    assert "NonFiniteLoss" in result.stdout
    assert (on_slurm.folder / "slurm-jobs").stat().st_mode & 0o777 == 0o700


@needs_slurm
def test_names_do_not_reach_a_shell(on_slurm: Launch) -> None:
    hostile = write_npz(on_slurm.folder / "x$(touch pwned);touch pwned #`touch pwned`.npz").name
    small = ["model.width=4", "experts.fgsm=0", "experts.pgd=0", "experts.epochs=1", "evaluation.probe_examples=8"]
    result = on_slurm(*ASK, "--preset", hostile, "--stages", "experts", "--set", *small, "pgd.steps=1")
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(
        r"x-touch-pwned-touch-pwned-touch-pwned-seed0-[0-9a-f]{10}", result.stdout.split("/")[-1].strip()
    )
    assert not list(on_slurm.folder.rglob("pwned"))


@needs_slurm
def test_dry_run_prints_a_script_that_sbatch_takes(on_slurm: Launch, cluster: Slurm) -> None:
    result = on_slurm(*ASK, "--nodes", "2", "--partition", "high", "--seed", "0..3", "--throttle", "2", "--dry-run")
    assert result.returncode == 0, result.stderr
    script = on_slurm.folder / "script.sh"
    script.write_text(result.stdout)
    header = set(re.findall(r"^#SBATCH (\S+)$", result.stdout, re.M))
    assert {"--nodes=2", "--partition=high", "--cpus-per-task=2", "--mem=3G", "--time=30", "--array=0-3%2"} <= header
    assert {"--requeue", "--signal=USR2@120", "--open-mode=append"} <= header
    cluster("sbatch", "--test-only", script, cwd=on_slurm.folder)
    assert not list(on_slurm.folder.glob("runs"))
    assert cluster("squeue", "-h") == ""


@needs_slurm
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--partition", "nosuch"], "--slurm: allocation failure: Invalid partition name"),
        (["--partition", "high\nrm -rf ."], "--partition: 'high\\nrm -rf .' cannot be used: allowed are letters"),
        (["--account", "$(reboot)"], "--account: '$(reboot)' cannot be used"),
        (["--sbatch", "qos"], "--sbatch: 'qos' cannot be used: allowed is option=value, such as qos=high"),
        (["--sbatch", "wrap=rm *"], "--sbatch: 'rm *' cannot be used"),
        (
            ["--sbatch", "signal=USR1@10"],
            "--sbatch: 'signal' cannot be used: trainings are signalled to save 120 s before the ",
        ),
        (
            ["--sbatch", "sig=USR1@10"],
            "--sbatch: 'sig' cannot be used: trainings are signalled to save 120 s before the time",
        ),
        (["--sbatch", "mem=3G", "cpus-per-task=2"], "--sbatch: 'cpus-per-task' cannot be used: use --cpus-per-node"),
        (["--time", "soon"], "--time: 'soon' cannot be used: allowed are minutes, HH:MM:SS, D-HH or D-HH:MM:SS"),
        (["--executor", "lsf"], "--executor: invalid choice: 'lsf'"),
    ],
)
def test_arguments_that_sbatch_or_a_shell_would_interpret_are_refused(
    on_slurm: Launch, arguments: list[str], message: str
) -> None:
    result = on_slurm("--slurm", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("option", sorted(RESERVED))
def test_options_of_sbatch_that_jobs_rely_on_are_refused(launch: Launch, option: str) -> None:
    with pytest.raises(InvalidInput, match=rf"^--sbatch: '{option}' cannot be used: \w"):
        SlurmOptions(1, None, None, 60, {option: "1"}, None, "slurm")
    SlurmOptions(
        1, None, None, 60, dict.fromkeys(("gpus", "mem", "qos", "nodelist", "export", "time-min"), "1"), None, "slurm"
    )


@needs_slurm
@pytest.mark.parametrize("name", ["a\n#SBATCH --wrap=true", "100%j", "a\\b"])
def test_a_folder_name_that_sbatch_would_interpret_is_refused(on_slurm: Launch, name: str) -> None:
    on_slurm.folder /= name
    on_slurm.folder.mkdir()
    result = on_slurm("--slurm", "--dry-run")
    assert result.returncode == 2, result.stdout
    assert result.stderr.startswith("error: --slurm: cannot be used in the folder ")
    assert result.stderr.count("\n") == 1


@needs_slurm
def test_a_python_that_cannot_be_run_is_refused_before_submission(
    on_slurm: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DWF_PYTHON", "/nowhere/python")
    result = on_slurm(*ASK)
    assert result.returncode == 2
    assert result.stderr == (
        "error: DWF_PYTHON: '/nowhere/python' cannot be used: allowed is a command that can be run\n"
    )


def test_squeue_is_called_once_for_all_jobs_with_growing_pauses_and_at_once_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, queue = tmp_path / "calls", tmp_path / "queue"
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$@" >> {calls}\ncat {queue}\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    jobs = {SlurmJob(f"seed{i}", (), ""): submitit.SlurmJob[None](tmp_path / "%j", f"7_{i}") for i in range(50)}
    states = dict.fromkeys(range(50), "RUNNING|None") | {1: "PENDING|Priority"}
    lines: list[str] = []
    call_times: list[int] = []
    second, logged, begins, ends = 0, 300, 350, 400

    def write_queue() -> None:
        queue.write_text("".join(f"7_{i}|{state}\n" for i, state in states.items()))

    def log(number: int) -> Path:
        path = list(jobs.values())[number].paths.stdout
        path.parent.mkdir(exist_ok=True)
        return path

    def wait(seconds: float) -> None:
        nonlocal second
        assert seconds == 1
        call_times.extend([second] * (len(calls.read_text().splitlines()) - len(call_times)))
        if second == logged:
            assert lines[-1] != "seed0: epoch 1"
            log(0).write_text("epoch 1\nepo")
        elif second == logged + 1:
            assert lines[-1] == "seed0: epoch 1"  # not the line that is not whole yet
        elif second == begins:
            states[1] = "RUNNING|None"
            write_queue()
            log(1).write_text("")
        elif second == begins + 1:
            assert lines[-1] == "seed1: job 7_1: RUNNING"
        elif second == ends:
            for run, job in jobs.items():
                log(int(run.folder[4:]))
                job.paths.result_pickle.touch()
        second += 1

    write_queue()
    log(0).write_text("")
    follow(jobs, SlurmOptions(1, None, None, 60, {}, None, "slurm"), lines.append, wait)
    assert second == ends + 1
    assert set(calls.read_text().splitlines()) == {"--noheader --array --jobs=7 --format=%i|%T|%r"}
    assert len([line for line in lines if line.endswith(": RUNNING")]) == 50
    assert "seed1: job 7_1: PENDING (Priority)" in lines
    assert lines[-1] == "seed0: epo"
    before = [first for first in call_times if first <= begins]
    pauses = [later - earlier for earlier, later in itertools.pairwise(before)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (10, 60)
    after = [first for first in call_times if first > begins]
    assert after[:2] == [begins + 1, begins + 11]


def test_ray_job_submit_uploads_no_results_logs_or_scripts_of_jobs(tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    uploaded = ["slurm/full_pipeline.sh", "dwf_cluster/launch.py"]
    excluded = [
        "slurm-7.out",
        "slurm-7-n1.log",
        "slurm-7.status",
        "slurm-jobs/7/7_submitted.pkl",
        "runs/x/experiment.json",
    ]
    for name in (*uploaded, *excluded, "report.html"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / ".gitignore").write_text((Path(__file__).parents[2] / ".gitignore").read_text())
    create_package(str(folder), tmp_path / "package.zip", include_gitignore=True)
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        assert {name for name in package.namelist() if not name.endswith("/")} == {*uploaded, ".gitignore"}


def test_without_slurm_the_error_names_the_missing_commands(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = launch("--slurm")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --slurm: cannot be used: srun and sbatch are not on PATH")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("02:00:00", 120), ("1-00", 1440), ("1-02:03:04", 1564), ("0:10", 1), ("00:05:00", 5)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, minutes: int) -> None:
    assert options.minutes(text) == minutes


def test_a_job_of_the_local_executor_saves_at_the_signal_and_is_requeued(
    launch: Launch, reference_run: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    def send_signal(process: psutil.Process, line: str) -> None:
        training = pause_after_first_epoch(launch.folder, "expert pgd-1")
        (job,) = (
            child
            for child in process.children(recursive=True)
            if child.cmdline()[1:4] == ["-u", "-m", "submitit.core._submit"]
        )
        job.send_signal(signal.SIGUSR2)
        (log,) = launch.folder.glob("slurm-jobs/*/*.out")
        while "\nstopping: " not in log.read_text():
            time.sleep(0.01)  # a file sends no events
        resume_and_stop(training)

    command = ["--slurm", "--executor", "local", *EXPERTS]
    lines: list[str] = []
    status, stderr = launch.run_and_act_at(r"job \S+: RUNNING", send_signal, *command, later_lines=lines)
    assert status == 0, stderr
    assert any(line.startswith("expert pgd-1: stopped in ") for line in lines)
    folder = Path(lines[-1])
    assert_same(folder, reference_run[0], models=["benign", "fgsm-1", "pgd-1"], tables=["metrics"])
    assert pd.read_parquet(folder / "results" / "jobs").set_index("task").attempts["expert pgd-1"] == 2
