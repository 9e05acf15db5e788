"""A small experiment, a command line run in a process of its own, and small images."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from torch import nn

from dwf_cluster.data import sources
from dwf_cluster.experiment import Experiment, build
from dwf_cluster.store import Store, checkpoints

from . import PATIENCE

TINY = [
    "data.train_examples=96",
    "data.test_examples=40",
    "model.width=4",
    "gate.hidden=8",
    "experts.fgsm=1",
    "experts.pgd=1",
    "experts.epochs=3",
    "experts.batch_size=32",
    "joint.epochs=2",
    "joint.batch_size=32",
    "pgd.steps=1,2",
    "evaluation.pgd_steps=1,2",
    "evaluation.restarts=2",
    "evaluation.restart_steps=2",
    "evaluation.adaptive_steps=2",
    "evaluation.beyond=pgd_gate,pgd_expert,transfer,noise",
    "evaluation.check_examples=8",
    "evaluation.batch_size=24",
    "evaluation.shard_examples=24",
    "evaluation.probe_examples=40",
    "evaluation.probe_steps=2",
]
"""Assignments that make the digits preset a matter of seconds: three experts, 96 images."""


@pytest.fixture(autouse=True, scope="session")
def _heed_interrupts() -> None:
    """A shell may have its background jobs ignore Ctrl-C, and they pass that on; a user's terminal does not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def tiny() -> Experiment:
    return build("digits", 0, TINY)


@pytest.fixture
def images(tiny: Experiment) -> sources.Images:
    return sources.load(tiny.data, Path())


@pytest.fixture
def store(tmp_path: Path, tiny: Experiment) -> Store:
    return tiny.store(str(tmp_path))


def write_npz(path: Path, **changed: np.ndarray | None) -> Path:
    """An .npz data set of 64 + 16 colour images of 8x8 with three classes; arrays can be replaced or left out."""
    random = np.random.default_rng(0)
    y_train, y_test = np.arange(64) % 3, np.arange(16) % 3
    arrays = {
        "x_train": (random.integers(0, 120, (64, 8, 8, 3)) + y_train[:, None, None, None] * 60).astype(np.uint8),
        "y_train": y_train,
        "x_test": (random.integers(0, 120, (16, 8, 8, 3)) + y_test[:, None, None, None] * 60).astype(np.uint8),
        "y_test": y_test,
    } | changed
    kept: dict[str, Any] = {name: array for name, array in arrays.items() if array is not None}
    np.savez(path, **kept)
    return path


class InDouble(nn.Module):
    """A model in double precision that takes images in single precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(x.double())
        return logits


class Launch:
    """`python -m dwf_cluster.launch` as a user runs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _command(self, arguments: Sequence[str | os.PathLike[str]]) -> list[str]:
        return [sys.executable, "-m", "dwf_cluster.launch", *map(str, arguments)]

    def __call__(self, *arguments: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            self._command(arguments), cwd=self.folder, capture_output=True, text=True, timeout=PATIENCE, check=False
        )

    def until(
        self,
        line: str,
        then: Callable[[psutil.Process, str], None],
        *arguments: str | os.PathLike[str],
        rest: list[str] | None = None,
    ) -> tuple[int, str]:
        """Run until a line of the output matches, do something, read on; returns the exit status and stderr.

        `rest` is given the lines that follow.
        """
        code, errors, lines = self.along([(line, then)], *arguments)
        met = next(number for number, printed in enumerate(lines) if re.search(line, printed))
        (rest if rest is not None else []).extend(lines[met + 1 :])
        return code, errors

    def along(
        self, steps: Sequence[tuple[str, Callable[[psutil.Process, str], None]]], *arguments: str | os.PathLike[str]
    ) -> tuple[int, str, list[str]]:
        """Run to the end, and do each step at the first line that matches it, one after the other.

        Returns the exit status, stderr, and the lines of stdout.
        """
        left, lines = list(steps), list[str]()
        with subprocess.Popen(
            self._command(arguments),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            for printed in process.stdout:
                lines.append(printed.rstrip("\n"))
                if left and re.search(left[0][0], printed):
                    left.pop(0)[1](psutil.Process(process.pid), printed)
            errors = process.stderr.read()
            assert not left, f"no line matched {left[0][0]!r}: {errors}"
            return process.wait(), errors, lines


def held(folder: Path, job: str) -> psutil.Process:
    """Stop a process of a job, as soon as its training's first epoch is saved: what is to meet it there may be slow.

    To be called before the job begins: the run's output tells of an epoch up to a second after its end.
    """

    def is_it(process: psutil.Process) -> bool:
        try:  # another run on this machine may have a job of that name
            return re.match(rf"ray::(\S+ )?{job}", title(process)) is not None and folder.samefile(process.cwd())
        except (psutil.Error, OSError):  # it has ended
            return False

    saved = f"runs/*/checkpoints/{job.rsplit(maxsplit=1)[-1]}/epoch-00001/manifest.json"
    deadline, process = time.monotonic() + PATIENCE, None
    while True:
        if process is None or not is_it(process):
            process = next(filter(is_it, psutil.process_iter()), None)
        if process is not None and any(folder.glob(saved)):
            process.suspend()
            return process
        assert time.monotonic() < deadline, f"no {job} to be held"
        time.sleep(0.01)  # nobody tells of another process's file


def go_on_to_stop(training: psutil.Process) -> None:
    """Let a held training go on, so that it meets its run's wish to stop."""
    time.sleep(2)  # until the wish has got there: less than a quarter of that, and nothing tells of it
    training.resume()


def answer(request: urllib.request.Request | str) -> str:
    """What a service answers to a request. One that is starting, or busy, may refuse the first connections."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as response:
                text: str = response.read().decode()
                return text
        except urllib.error.HTTPError as error:
            if error.code < 500 or time.monotonic() > deadline:
                raise
        except OSError:  # refused, reset, timed out
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)  # a service does not tell when it is ready


def on_machine(name: str, arguments: Sequence[str], impatient: bool = False) -> list[str]:
    """A launch on a machine of another name.

    Args:
        name: its host name.
        arguments: of the launch.
        impatient: whether another machine's silence of two seconds seems long to it: not two waits of a minute.
    """
    root = [] if os.geteuid() == 0 else ["--map-root-user"]
    patience = "from dwf_cluster.store import lease; lock.SILENCE, lock.HEARTBEAT = 2, 1; " if impatient else ""
    program = f"{patience}import sys; from dwf_cluster.launch import main; sys.exit(main(sys.argv[1:]))"
    rename = ["sh", "-c", 'hostname "$0" && exec "$@"', name]
    return ["unshare", *root, "--uts", *rename, sys.executable, "-c", program, *arguments]


def title(process: psutil.Process) -> str:
    """A process's command line; empty if it has ended."""
    try:
        return " ".join(process.cmdline()).strip()  # Ray pads the title that it sets
    except psutil.Error:
        return ""


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    return Launch(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


MODELS = ["benign", "fgsm-1", "pgd-1", "mixture"]
LOCAL = ["--local", "--cpus", "2", "--gpus", "0"]
SLOWER = ["data.train_examples=700", "experts.epochs=3", "joint.epochs=3", "pgd.steps=6,8"]
ARGUMENTS = [*LOCAL, "--set", *TINY, *SLOWER]
"""Epochs of a second or two: long enough to be interrupted in the middle."""
TIMINGS = {
    "metrics": ["seconds", "images_per_second"],
    "evaluations": ["seconds"],
    "predictions": [],
    "shards": ["seconds"],
    "checks": [],
}


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The experiment's folder and what a run printed that nothing disturbed."""
    launch = Launch(tmp_path_factory.mktemp("undisturbed"))
    result = launch(*ARGUMENTS)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1]), result


def store_of(folder: Path | str) -> Store:
    """The store of an experiment's folder or URL."""
    url, _, name = str(folder).rpartition("/")
    return Store(url, name)


def _frame(store: Store, table: str) -> pd.DataFrame:
    frame = pd.read_parquet(store.path(f"results/{table}"))
    keys = ("epoch", "attack", "source", "epsilon", "steps", "first", "example", "check")
    columns = ["model", *(c for c in keys if c in frame)]
    return frame.sort_values(columns, ignore_index=True).drop(columns=TIMINGS[table])


def assert_same(
    one: Path | str, other: Path | str, models: Sequence[str] = MODELS, tables: Iterable[str] = TIMINGS
) -> None:
    """Two experiments' folders hold the same weights and, timings aside, the same rows."""
    stores = [store_of(one), store_of(other)]
    for model in models:
        first, second = (checkpoints.load_latest(store, model) for store in stores)
        assert first is not None
        assert second is not None
        assert first.epoch == second.epoch
        assert first.tensors.keys() == second.tensors.keys()
        for name, tensor in first.tensors.items():
            assert torch.equal(tensor, second.tensors[name]), (model, name)
    for table in tables:
        left, right = (frame[frame.model.isin(models)] for frame in (_frame(store, table) for store in stores))
        pd.testing.assert_frame_equal(left.reset_index(drop=True), right.reset_index(drop=True))


@pytest.fixture(scope="session")
def two_workers(
    undisturbed: tuple[Path, subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The folder of a run with the same experts, whose joint stage ran on two workers."""
    launch = Launch(tmp_path_factory.mktemp("two_workers"))
    mixtures = shutil.ignore_patterns("joint*", "mixture*", "*evaluate-*", "lease", "status.json")
    shutil.copytree(undisturbed[0], launch.folder / "runs" / undisturbed[0].name, ignore=mixtures)
    result = launch("--stages", "joint,evaluate", "--joint-workers", "2", *ARGUMENTS)
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.splitlines()[-1])
