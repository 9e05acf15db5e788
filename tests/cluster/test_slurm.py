"""`--slurm`: submission, looking on, coming back; on a real SLURM, and with submitit's local executor."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from ..conftest import SLOWER, TINY, Launch, assert_same, go_on_to_stop, held, write_npz
from . import slurm
from .slurm import Slurm

needs_slurm = pytest.mark.skipif(slurm.missing() is not None, reason=str(slurm.missing()))
ASK = ["--slurm", "--gpus-per-node", "0", "--cpus-per-node", "2", "--time", "30", "--sbatch", "mem=3G"]
EXPERTS = ["--stages", "experts", "--set", *TINY, *SLOWER]


@pytest.fixture
def on_slurm(cluster: Slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launch:
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    return Launch(tmp_path)


@needs_slurm
def test_several_seeds_are_an_array_that_goes_on_when_nobody_looks_and_is_found_again(
    on_slurm: Launch, cluster: Slurm, undisturbed: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    command = [*ASK, "--seed", "0,1", "--throttle", "1", *EXPERTS]

    training: list[psutil.Process] = []

    def close(process: psutil.Process, line: str) -> None:
        training.append(held(on_slurm.folder, "expert pgd-1"))
        process.kill()

    status, _ = on_slurm.until(r"job \S+: RUNNING", close, *command)
    assert status == -signal.SIGKILL
    running = cluster("squeue", "-hro", "%K %T").split("\n")
    assert sorted(filter(None, running)) == ["0 RUNNING", "1 PENDING"]  # no more than one at once

    status, errors, lines = on_slurm.along([("^Ctrl-C", lambda _, line: training[0].resume())], *command)
    assert status == 0, errors
    folders = [Path(line) for line in lines[-2:]]
    assert [folder.name[:13] for folder in folders] == ["digits-seed0-", "digits-seed1-"]
    assert len([line for line in lines if re.search(r": job \d+_[01] is there already$", line)]) == 2
    assert not [line for line in lines if re.search(r"job \S+ submitted$", line)]
    assert any(line.startswith(f"{folders[1].name}: expert pgd-1: epoch 3/3") for line in lines)
    assert_same(folders[0], undisturbed[0], models=["benign", "fgsm-1", "pgd-1"], tables=["metrics"])
    assert set(pd.read_parquet(folders[0] / "results" / "jobs").attempts) == {1}

    again = on_slurm(*command)
    assert again.returncode == 0
    assert again.stdout.splitlines() == [str(folder) for folder in folders]  # nothing to submit


@needs_slurm
def test_a_job_that_ends_too_early_is_a_failure_with_its_log_and_the_command_that_resumes(on_slurm: Launch) -> None:
    exploding = ["experts.learning_rate=100", "experts.weight_decay=1", "experts.epochs=9"]
    result = on_slurm(*ASK, *EXPERTS, *exploding)
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert re.fullmatch(rf"failed: job \d+ ended before all was done; log: {on_slurm.folder}/slurm-jobs/\S+", first)
    assert second.startswith("resume: python -m dwf_cluster.launch --slurm --gpus-per-node 0 ")
    assert "NonFiniteLoss" in result.stdout


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
    options = set(re.findall(r"^#SBATCH (\S+)$", result.stdout, re.M))
    assert {"--nodes=2", "--partition=high", "--cpus-per-task=2", "--mem=3G", "--time=30", "--array=0-3%2"} <= options
    assert {"--requeue", "--signal=USR2@120", "--open-mode=append"} <= options
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
        (["--time", "soon"], "--time: 'soon' cannot be used: allowed are minutes, HH:MM:SS, D-HH or D-HH:MM:SS"),
        (["--executor", "lsf"], "--executor: invalid choice: 'lsf'"),
    ],
)
def test_what_sbatch_or_a_shell_must_not_see_is_refused(on_slurm: Launch, arguments: list[str], message: str) -> None:
    result = on_slurm("--slurm", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1


def test_without_slurm_it_says_so(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    result = launch("--slurm")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --slurm: cannot be used: srun and sbatch are not on PATH")


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("90", 90), ("1:30", 2), ("02:00:00", 120), ("1-00", 1440), ("1-02:03:04", 1564), ("0:10", 1), ("00:05:00", 5)],
)
def test_time_limits_are_read_as_sbatch_reads_them(text: str, minutes: int) -> None:
    from dwf_cluster.launch import _minutes

    assert _minutes(text) == minutes


def test_the_local_executor_is_told_saves_and_goes_on_as_slurm_would_have_it(
    launch: Launch, undisturbed: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    def tell(process: psutil.Process, line: str) -> None:
        training = held(launch.folder, "expert pgd-1")
        (job,) = (
            child
            for child in process.children(recursive=True)
            if child.cmdline()[1:4] == ["-u", "-m", "submitit.core._submit"]
        )
        job.send_signal(signal.SIGUSR2)
        (log,) = launch.folder.glob("slurm-jobs/*/*.out")
        while "\nstopping: " not in log.read_text():
            time.sleep(0.01)  # a file tells nobody
        go_on_to_stop(training)

    command = ["--slurm", "--executor", "local", *EXPERTS]
    lines: list[str] = []
    status, stderr = launch.until(r"job \S+: RUNNING", tell, *command, rest=lines)
    assert status == 0, stderr
    assert any(line.startswith("expert pgd-1: stopped in ") for line in lines)
    folder = Path(lines[-1])
    assert_same(folder, undisturbed[0], models=["benign", "fgsm-1", "pgd-1"], tables=["metrics"])
    assert pd.read_parquet(folder / "results" / "jobs").set_index("task").attempts["expert pgd-1"] == 2
