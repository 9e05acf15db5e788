"""A run is suspended, another machine takes over, and then the suspended run continues."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pandas as pd
import psutil
import pytest

from dwf_cluster.store.status import Status

from . import PATIENCE
from .conftest import ARGUMENTS, assert_same, store_of
from .process import Launch, launch_on_machine, pause_after_first_epoch


@pytest.mark.interruptions
def test_a_suspended_run_that_was_replaced_writes_nothing_and_names_the_new_owner(
    launch: Launch, reference_run: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    pipes = {"cwd": launch.folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(launch_on_machine("first", ARGUMENTS), **pipes) as first:  # type: ignore[call-overload]
        training = pause_after_first_epoch(launch.folder, "expert pgd-1")
        driver = psutil.Process(first.pid)
        tree = [driver, *driver.children(recursive=True)]
        for process in tree:
            process.suspend()
        (folder,) = (launch.folder / "runs").iterdir()
        status = Status.read(store_of(folder))
        assert status is not None
        assert (status.run, status.host) == (1, "first")
        command = launch_on_machine("second", ARGUMENTS, impatient=True)
        with subprocess.Popen(command, **pipes) as second:  # type: ignore[call-overload]
            for line in second.stdout:
                if re.match(r"expert pgd-1: epoch \d/3", line):
                    break
            before = _jobs(folder)
            for process in tree:
                process.resume()
            training.resume()
            _, errors = first.communicate(timeout=PATIENCE)
            second.stdout.read()
            assert second.wait() == 0, second.stderr.read()
    lines = errors.splitlines()
    assert first.returncode == 1
    assert re.match(
        rf"failed: {folder.name} was taken over by second \(process {second.pid}\) since 20\S+: "
        "this run sent no heartbeat for too long$",
        lines[0],
    ), errors
    assert lines[1].startswith("resume: ")
    assert len(lines) == 2
    assert_same(folder, reference_run[0])
    jobs = _jobs(folder)
    assert set(jobs.state) == {"done"}
    done_before = before[(before.host == "first") & (before.state == "done")]
    assert set(jobs[jobs.host == "first"].index) <= set(done_before.index)
    assert not list(folder.glob(".run-*"))


def _jobs(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "results" / "jobs").set_index("task")
