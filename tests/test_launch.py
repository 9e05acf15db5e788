"""`python -m dwf_cluster.launch`: its plan, errors before anything runs, and lost output."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import secrets
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest

from dwf_cluster.store import checkpoints, tables
from dwf_cluster.store.status import Status

from . import PATIENCE
from .conftest import ARGUMENTS, TINY, store_of
from .process import Launch, pause_after_first_epoch, resume_and_stop


def test_dry_run_prints_the_plan_longest_first_and_starts_and_writes_nothing(launch: Launch) -> None:
    result = launch("--local", "--dry-run", "--cpus", "2", "--gpus", "0", "--set", *TINY)
    assert result.returncode == 0
    lines = result.stdout.splitlines()
    tasks = [line.split()[1:3] for line in lines if line.split()[:1] in (["experts"], ["joint"])]
    assert tasks == [["expert", "pgd-1"], ["expert", "fgsm-1"], ["expert", "benign"], ["joint", "2"]]
    suites, shards = 5, 2
    assert sum("evaluate mixture" in line for line in lines) == suites * shards + 1  # and the checks
    assert lines[-1].startswith(str(launch.folder / "runs" / "digits-seed0-"))
    assert list(launch.folder.iterdir()) == []


def test_dry_run_shows_the_allocation_of_each_task(launch: Launch) -> None:
    wide = [*TINY, "joint.batch_size=128"]
    with_gpus = launch("--local", "--dry-run", "--cpus", "8", "--gpus", "4", "--set", *wide).stdout
    (joint,) = (line for line in with_gpus.splitlines() if line.startswith(" joint"))
    assert re.search(r" 4 x \(2 CPU, 1 GPU\) +0-3 ", joint)


def test_dry_run_shows_devices_start_and_end_of_each_task_makespan_and_lower_bound(launch: Launch) -> None:
    arguments = ["--gpus", "16", "--expert-workers", "4", "--preset", "cifar10", "--stages", "experts"]
    result = launch("--local", "--dry-run", *arguments)
    lines = result.stdout.splitlines()
    (longest,) = (line for line in lines if "expert pgd-3" in line)
    assert re.search(r" 4 x \(1 CPU, 1 GPU\) +8-11 +0:00:00 +\d:\d\d:\d\d ", longest)
    alone = launch("--local", "--dry-run", *arguments[:2], *arguments[4:]).stdout
    (longest,) = (line for line in alone.splitlines() if "expert pgd-3" in line)
    assert re.search(r" 1 CPU, 1 GPU +2 +0:00:00 +\d:\d\d:\d\d ", longest)
    heads = ("makespan: ", "lower bound: ", "speed of ")
    makespan, bound, speed = (next(line for line in lines if line.startswith(head)) for head in heads)
    hours = [int(h) * 60 + int(m) for h, m in re.findall(r": (\d+):(\d+):\d+", f"{makespan}\n{bound}")]
    assert hours[1] <= hours[0] <= 1.05 * hours[1]
    assert re.match(r"speed of experts: \S+ TFLOP/s a GPU, \S+ microseconds a kernel .*(estimate|measured)", speed)


def test_dry_run_on_several_gpus_says_how_long_the_joint_stage_takes_with_both_kinds_of_parallelism(
    launch: Launch,
) -> None:
    lines = launch("--local", "--dry-run", "--gpus", "9", "--preset", "cifar10").stdout.splitlines()
    (by_batches, by_experts) = (line for line in lines if "joint.parallelism" in line)
    assert re.fullmatch(r"joint with joint.parallelism=ddp: \d:\d\d:\d\d on 4 GPUs", by_batches)
    assert re.fullmatch(r"joint with joint.parallelism=experts: \d:\d\d:\d\d on 9 GPUs", by_experts)


def test_dry_run_of_several_seeds_prints_one_plan(launch: Launch) -> None:
    result = launch("--local", "--dry-run", "--gpus", "0", "--seed", "3,5", "--stages", "experts", "--set", *TINY)
    rows = [line.split() for line in result.stdout.splitlines() if " expert " in line]
    assert [(*row[:2], row[4]) for row in rows][:3] == [
        ("seed", "3", "pgd-1"),
        ("seed", "5", "pgd-1"),
        ("seed", "3", "fgsm-1"),
    ]
    seeds, experts = 2, 3
    assert len(rows) == seeds * experts
    assert [line.split("/")[-1][:13] for line in result.stdout.splitlines()[-2:]] == ["digits-seed3-", "digits-seed5-"]


def test_a_ray_job_refuses_a_storage_in_its_temporary_folder(launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    result = launch("--address", "auto")
    assert result.returncode == 2
    assert result.stderr.startswith("error: --storage: './runs' cannot be used in a Ray job, whose folder is temporary")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--local", "--cpus", "2", "--joint-workers", "3"], "--joint-workers: 3 cannot be used: allowed are 1 to 2"),
        (["--local", "--storage", "file/below"], "--storage: '"),
    ],
)
def test_a_wrong_number_of_workers_or_an_unusable_storage_is_one_line(
    launch: Launch, arguments: list[str], message: str
) -> None:
    (launch.folder / "file").write_text("not a folder")
    result = launch(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {message}")
    assert result.stderr.count("\n") == 1
    assert [path.name for path in launch.folder.iterdir()] == ["file"]


def test_a_run_without_its_data_set_and_without_a_network_fails_in_one_line_that_says_what_to_do(
    launch: Launch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nothing listens there
    result = launch("--local", "--preset", "svhn", "--data-folder", tmp_path / "nothing")
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert first.startswith("failed: SVHN is not in ")
    assert second.startswith("resume: python -m dwf_cluster.launch --local --preset svhn")
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------- what a terminal does


@pytest.fixture
def short_path(small_disk: Path) -> Iterator[Path]:
    """A link to the small disk. Its path is short enough for the path of a socket."""
    link = Path("/tmp", secrets.token_hex(4))
    link.symlink_to(small_disk)
    yield link
    link.unlink()


def test_a_full_temporary_folder_is_one_line(launch: Launch, short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(short_path))
    result = launch(*ARGUMENTS)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: TMPDIR: '{short_path}' cannot be used: No space left on device; allowed is ")
    assert list(short_path.iterdir()) == []
    assert not (launch.folder / "runs").exists()


def test_a_run_continues_if_its_output_cannot_be_written(launch: Launch) -> None:
    command = [sys.executable, "-m", "dwf_cluster.launch", "--local", "--gpus", "0", "--set", *TINY]
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [*command, "--dry-run"], cwd=launch.folder, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
        assert (result.returncode, result.stderr) == (0, "")
        result = subprocess.run(
            [*command, "no=field"], cwd=launch.folder, stdout=full, stderr=full, text=True, check=False
        )
        assert result.returncode == 2


@pytest.mark.interruptions
def test_closing_the_terminal_stops_a_run_as_ctrl_c_does(launch: Launch) -> None:
    terminal, child_side = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "dwf_cluster.launch", *ARGUMENTS]
    with subprocess.Popen(
        command,
        cwd=launch.folder,
        stdin=child_side,
        stdout=child_side,
        stderr=child_side,
        start_new_session=True,
        preexec_fn=take_terminal,  # noqa: PLW1509, no other thread has started
    ) as driver:
        os.close(child_side)
        printed = b""
        while b"Ray dashboard" not in printed:
            printed += os.read(terminal, 4096)
        training = pause_after_first_epoch(launch.folder, "expert pgd-1")
        os.close(terminal)
        resume_and_stop(training)
        assert driver.wait(PATIENCE) == 130
    (folder,) = (launch.folder / "runs").iterdir()
    status = Status.read(store_of(folder))
    assert status is not None
    assert status.state == "stopped"
    assert checkpoints.latest_epoch(store_of(folder), "pgd-1") in (1, 2)
    (job,) = tables.read(store_of(folder), "jobs", ["expert-pgd-1"]).to_pylist()
    assert job["state"] == "stopped"  # its process survived the terminal
