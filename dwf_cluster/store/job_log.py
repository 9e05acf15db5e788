"""The `jobs` table: one row per job, written when the job starts and again when it ends."""

from __future__ import annotations

import contextlib
import platform
import resource
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dwf_cluster
from dwf_cluster.store import tables
from dwf_cluster.store.files import Store


@contextmanager
def recorded(
    store: Store, job: Mapping[str, str], file: str, gpus: float, device: str | None
) -> Iterator[dict[str, Any]]:
    """Record a job that runs in this process: its state is `running`, then `done` or `failed`.

    Yields the row. The body of the `with` statement may add columns and set a state other than `done`.

    Args:
        store: store of the experiment.
        job: the columns `stage`, `model` and `task`.
        file: name of the job's file in the table.
        gpus: number of GPUs that the job was given, fractions included.
        device: device that the job computes on; None: not known yet.
    """
    _reset_peak_memory()
    before = tables.read(store, "jobs", [file]).to_pylist()
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    row: dict[str, Any] = {
        **job,
        "state": "running",
        "started": started,
        "attempts": before[0]["attempts"] + 1 if before else 1,
        "host": platform.node(),
        "device": device,
        "gpus": gpus,
        "python_version": platform.python_version(),
        "torch_version": version("torch"),
        "ray_version": version("ray"),
        "dwf_cluster_version": dwf_cluster.__version__,
        "git_commit": _commit(),
    }

    def write() -> None:
        tables.write(store, "jobs", file, [row])

    write()
    try:
        yield row
        row["state"] = "done" if row["state"] == "running" else row["state"]
    except BaseException:
        row["state"] = "failed"
        raise
    finally:
        row["finished"] = datetime.now(timezone.utc)
        row["seconds"] = time.perf_counter() - clock
        row["peak_memory_bytes"] = _peak_memory()
        write()


def _reset_peak_memory() -> None:
    """Start a new measurement, without the jobs that this process ran before, where the system supports that."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_memory() -> int:
    """Peak of this process's private memory since `_reset_peak_memory`, in bytes."""
    with contextlib.suppress(OSError, KeyError), open("/proc/self/status") as file:
        sizes = {name: value.split() for name, _, value in (line.partition(":") for line in file)}
        # Shared pages (torch's libraries, the images) are in memory once for all processes.
        peak, *shared = (int(sizes[name][0]) for name in ("VmHWM", "RssFile", "RssShmem"))
        return (peak - sum(shared)) * 1024
    # Elsewhere: with shared pages, since the process began. Linux counts kibibytes, macOS bytes.
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _commit() -> str | None:
    """The git commit of the code, with `+` if the tree differs from it; None outside a checkout."""
    package = Path(dwf_cluster.__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"],
            cwd=package,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()
