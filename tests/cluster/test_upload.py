"""The files that `ray job submit --working-dir .` uploads, packed by Ray's own function."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package

ROOT = Path(__file__).parents[2]

CODE = ["pyproject.toml", "dwf_cluster/launch.py", "dwf_cluster/data/sources.py", "jobs/experts.py", "own-images.npz"]

OUTPUTS = [
    "runs/digits-seed0-ce2d226613/results/metrics/pgd-1.parquet",
    "runs-of-mine/digits-seed0-ce2d226613/checkpoints/joint/epoch-00001/tensors.safetensors",
    "data/cifar-10-batches-py/data_batch_1",
    "logs/joint.txt",
    "slurm-jobs/17_submitted.pkl",
    "slurm-17.out",
    "slurm-17-node-1.log",
    "slurm/slurm-17.out",
    "board/events.out.tfevents.1764000000.node-1",
    "nohup.out",
    "report.html",
    "figures/digits/fgsm.pdf",
    "strip.png",
    ".venv/bin/python",
    ".venv-old/bin/python",
    "dwf_cluster/__pycache__/launch.cpython-311.pyc",
    "dwf_cluster.egg-info/PKG-INFO",
    "build/lib/dwf_cluster/launch.py",
    ".hypothesis/examples/1",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with the outputs of many runs."""
    for name in (*CODE, *OUTPUTS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("content")
    shutil.copy(ROOT / ".gitignore", tmp_path)
    return tmp_path


def test_a_ray_job_uploads_the_code_and_no_outputs_of_runs(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    package = tmp_path_factory.mktemp("package") / "package.zip"
    create_package(str(folder), package, include_gitignore=True, excludes=[])
    with zipfile.ZipFile(package) as archive:
        uploaded = {name for name in archive.namelist() if not name.endswith("/")}
    assert uploaded == {".gitignore", *CODE}
