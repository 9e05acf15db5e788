"""An existing Ray cluster: `ray job submit`, `--address`, and experts that share a GPU."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest

from .. import PATIENCE
from ..conftest import TINY
from ..process import Launch

ROOT = Path(__file__).parents[2]
TWO = [*TINY, "experts.pgd=0", "experts.epochs=1"]
ONE = [*TWO, "experts.fgsm=0"]


@pytest.fixture(scope="module")
def ray() -> Iterator[tuple[str, str]]:
    """Address and dashboard of a Ray with two CPUs and a GPU that does not exist."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    ports = []
    for _ in range(3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_AUTH_MODE", "token")
        environment.setenv("RAY_AUTH_TOKEN_PATH", f"{folder}/token")
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        environment.setenv("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "0")
        Path(folder, "token").write_text("c0ffee" * 10)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
        command += ["--num-gpus=1", f"--port={ports[0]}", f"--dashboard-port={ports[1]}", f"--temp-dir={folder}/ray"]
        command += [f"--ray-client-server-port={ports[2]}", "--log-color=false"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if match := re.search(r"--address='(\S+)'", line):
                    yield match[1], f"http://127.0.0.1:{ports[1]}"
                    break
            else:
                raise AssertionError("Ray did not start")
            process.terminate()
            process.stdout.read()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("token", [None, "0ddba11" * 8])
def test_a_client_without_the_token_is_refused(
    ray: tuple[str, str], token: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_NUM_REDIS_GET_RETRIES", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    if token:
        monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    else:
        monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    program = f"import ray; ray.init(address={ray[0]!r}); print('connected')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "InvalidAuthToken" in result.stderr
    assert "connected" not in result.stdout


def test_a_ray_job_runs_a_stage_and_a_run_from_outside_uses_the_same_ray(ray: tuple[str, str], launch: Launch) -> None:
    address, dashboard = ray
    storage = str(launch.folder / "runs")
    submit = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", dashboard]
    arguments = ["--working-dir", ".", "--", sys.executable, "jobs/experts.py", "--gpus-per-expert", "0.5"]
    result = subprocess.run(
        [*submit, *arguments, "--storage", storage, "--set", *TWO],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (folder,) = Path(storage).iterdir()
    jobs = pd.read_parquet(folder / "results" / "jobs")
    assert jobs.gpus.tolist() == [0.5, 0.5]
    assert {device for devices in jobs.devices for device in devices} == {f"{os.uname().nodename}: GPU 0"}
    assert set(jobs.state) == {"done"}

    attached = launch("--address", address, "--storage", storage, "--stages", "experts", "--seed", "1", "--set", *ONE)
    assert attached.returncode == 0, attached.stderr
    assert f"Ray dashboard: {dashboard} " in attached.stdout
    assert set(pd.read_parquet(Path(attached.stdout.splitlines()[-1]) / "results" / "jobs").state) == {"done"}


@pytest.mark.parametrize("stage", ["experts", "joint", "evaluate"])
def test_the_script_of_a_stage_runs_on_this_machine_without_ray(stage: str, launch: Launch) -> None:
    command = [sys.executable, str(ROOT / "jobs" / f"{stage}.py"), "--dry-run", "--storage", str(launch.folder)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    missing = {"joint": "experts", "evaluate": "experts"}.get(stage)
    if missing:
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: --stages: {stage} cannot be run: {missing} is not done")
    else:
        assert result.returncode == 0
        assert "expert pgd-1" in result.stdout
