"""A run whose every process stands still, is taken over by another machine, and then goes on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest

from dwf_cluster.store.status import Status

from .conftest import ARGUMENTS, Launch, assert_same, held, store_of

_IMPATIENT = "from dwf_cluster.store import lease; lease.SILENCE, lease.HEARTBEAT = 2, 1"
"""For the second machine, to which the first one's silence then seems long enough: not two waits of a minute."""


def _on(host: str, *before: str) -> list[str]:
    """A launch on a machine of that name; `before` is run first."""
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    program = "; ".join((*before, "import sys; from dwf_cluster.launch import main; sys.exit(main(sys.argv[1:]))"))
    name = ["sh", "-c", 'hostname "$0" && exec "$@"', host]
    return ["unshare", *root, "--uts", *name, sys.executable, "-c", program, *ARGUMENTS]


@pytest.mark.interruptions
def test_a_run_that_stood_still_and_was_taken_over_writes_nothing_more_and_says_who_took_over(
    launch: Launch, undisturbed: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    pipes = {"cwd": launch.folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(_on("first"), **pipes) as first:  # type: ignore[call-overload]
        training = held(launch.folder, "expert pgd-1")
        driver = psutil.Process(first.pid)
        tree = [driver, *driver.children(recursive=True)]
        for process in tree:
            process.suspend()
        (folder,) = (launch.folder / "runs").iterdir()
        status = Status.read(store_of(folder))
        assert status is not None
        assert (status.run, status.host) == (1, "first")
        with subprocess.Popen(_on("second", _IMPATIENT), **pipes) as second:  # type: ignore[call-overload]
            for line in second.stdout:
                if re.match(r"expert pgd-1: epoch \d/3", line):
                    break
            before = _jobs(folder)
            for process in tree:
                process.resume()
            training.resume()
            _, errors = first.communicate(timeout=200)
            second.stdout.read()
            assert second.wait() == 0, second.stderr.read()
    lines = errors.splitlines()
    assert first.returncode == 1
    assert re.match(
        rf"failed: {folder.name} was taken over by second \(process {second.pid}\) since 20\S+: "
        "this run was silent for too long$",
        lines[0],
    ), errors
    assert lines[1].startswith("resume: ")
    assert len(lines) == 2
    assert_same(folder, undisturbed[0])
    jobs = _jobs(folder)
    assert set(jobs.state) == {"done"}
    done_before = before[(before.host == "first") & (before.state == "done")]
    assert set(jobs[jobs.host == "first"].index) <= set(done_before.index)
    assert not list(folder.glob(".run-*"))


def _jobs(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "results" / "jobs").set_index("task")
