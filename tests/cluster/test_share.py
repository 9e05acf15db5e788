"""The share of a node that a SLURM job has: GPUs with and without GRES, memory by each option of sbatch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dwf_cluster.cluster import share

MANAGED, UNMANAGED = "Gres=gpu:h100:8", "Gres=(null)"


@pytest.fixture(autouse=True)
def _on_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("SLURM_", "DWF_", "CUDA_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SLURMD_NODENAME", "n1")


@pytest.mark.parametrize(
    ("gres", "cpus", "variables", "devices", "warning"),
    [
        (MANAGED, 64, {"SLURM_GPUS_ON_NODE": "2", "CUDA_VISIBLE_DEVICES": "4,5"}, "4,5", None),
        (MANAGED, 64, {}, "", "set DWF_GPUS=8 "),
        (MANAGED, 64, {"SLURM_GPUS_PER_NODE": "0"}, "", None),
        (MANAGED, 64, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, "", None),
        (UNMANAGED, 64, {}, "0,1,2,3,4,5,6,7", None),
        (UNMANAGED, 64, {"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}, "GPU-a,GPU-b", None),
        (UNMANAGED, 64, {"DWF_GPUS": "0"}, "", None),
        (UNMANAGED, 8, {}, "", "n1: 8 GPUs are visible and not used: "),
        (UNMANAGED, 8, {"DWF_GPUS": "2"}, "0,1", None),
        (UNMANAGED, 8, {"DWF_GPUS": "9"}, "0,1,2,3,4,5,6,7", "n1: DWF_GPUS is 9, but 8 are visible"),
        ("", 64, {}, "", "n1: 8 GPUs are visible and not used: "),  # SLURM does not answer
    ],
)
def test_ray_uses_the_gpus_of_the_job_and_a_warning_counts_unused_ones(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    gres: str,
    cpus: int,
    variables: dict[str, str],
    devices: str,
    warning: str | None,
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f"#!/bin/sh\necho 'NodeName=n1\n   CPUEfctv=64 CPUTot=64\n   {gres}'\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(share, "gpus_here", lambda: 8)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    expected = int(variables.get("SLURM_GPUS_ON_NODE", len(devices.split(",")) if devices else 0))
    assert share.claim_gpus(cpus) == expected
    assert os.environ["CUDA_VISIBLE_DEVICES"] == devices
    errors = capsys.readouterr().err
    assert errors.count("\n") == (warning is not None)
    assert (warning or "") in errors


GIB = 1 << 30


@pytest.mark.parametrize(
    ("variables", "limit", "expected"),
    [
        ({"SLURM_MEM_PER_NODE": "2048"}, None, 2 * GIB),
        ({"SLURM_MEM_PER_CPU": "512"}, None, GIB),
        ({"SLURM_MEM_PER_GPU": "1024"}, None, 4 * GIB),
        ({"SLURM_MEM_PER_GPU": "1024"}, 3 * GIB, 3 * GIB),
        ({}, 5 * GIB, 5 * GIB),  # --mem=0: no variable, and the whole node as the limit
        ({}, 1 << 62, None),
        ({}, None, None),
    ],
)
def test_memory_is_what_the_job_requested_within_the_limit_of_its_control_group(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], limit: int | None, expected: int | None
) -> None:
    pages = {"SC_PHYS_PAGES": 8 * GIB // 4096, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(share, "cgroup_limit", lambda: limit)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    by_cpus = 8 * GIB * 2 // 16
    assert share.memory_share(cpus=2, gpus=4) == (by_cpus if expected is None else expected)


def test_the_lowest_limit_of_the_control_groups_applies(tmp_path: Path) -> None:
    job = tmp_path / "system.slice" / "job_7"
    step = job / "step_0" / "user"
    step.mkdir(parents=True)
    (step / "memory.max").write_text("max\n")
    (job / "memory.max").write_text("4096\n")
    (tmp_path / "system.slice" / "memory.max").write_text("8192\n")
    membership = tmp_path / "cgroup"
    membership.write_text("0::/system.slice/job_7/step_0/user\n")
    assert share.cgroup_limit(tmp_path, membership) == 4096

    old = tmp_path / "memory" / "slurm" / "job_7"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("2048\n")
    membership.write_text("9:cpu,cpuacct:/\n4:memory:/slurm/job_7\n1:name=systemd:/x\n0::/\n")
    assert share.cgroup_limit(tmp_path, membership) == 2048
    assert share.cgroup_limit(tmp_path, tmp_path / "absent") is None
