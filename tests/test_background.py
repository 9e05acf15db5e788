"""Training goes on while a checkpoint is written, which nobody can see in the stored files, also after a kill."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import load
from dwf_cluster.defences.build import to_train
from dwf_cluster.experiment import Experiment
from dwf_cluster.presets import build
from dwf_cluster.store import StorageFailed, Store, checkpoints, disk, tables
from dwf_cluster.training.loop import train

from . import PATIENCE
from .conftest import TINY, task_for

STEPS = 3
"""Of an epoch."""

WITH_ALL_TENSORS = [
    *TINY,
    "baselines=free",
    "free.replays=2",
    "experts.epochs=6",
    "experts.keep=best",
    "data.validation_examples=30",
]
"""A model `free`, of three epochs, whose checkpoints have momentum, best weights and a perturbation."""


def _train(experiment: Experiment, store: Store, model: str, **options: Callable[..., Any]) -> None:
    torch.set_num_threads(1)
    images = load(experiment.data, Path())
    network = to_train(experiment.models, model, images.format, experiment.seed, store)
    data = DeviceImages(images, experiment.data, torch.device("cpu"))
    train(task_for(experiment, store, model, **options), network, data)


def _wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE), "the other thread waits too"


def test_training_goes_on_while_a_slow_store_writes_the_tensors_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with a training that waits for each of its checkpoints."""
    experiment, write = build("digits", 0, WITH_ALL_TENSORS), Store.write
    epochs = experiment.spec("free").training.epochs
    files: dict[str, list[tuple[str, bytes]]] = {"waiting": [], "going on": []}
    is_saved = {epoch: threading.Event() for epoch in range(1, epochs + 1)}
    has_gone_on = threading.Event()
    steps = itertools.count(1)

    def observed(store: Store, name: str, content: bytes) -> None:
        if store.url.endswith("going on"):
            _wait(has_gone_on)
        write(store, name, content)
        if name.startswith("checkpoints"):
            files[Path(store.url).name].append((name, content if name.endswith("safetensors") else b""))
        if name.endswith("manifest.json") and store.url.endswith("waiting"):
            is_saved[checkpoints.latest_epoch(store, "free")].set()

    def go_on() -> bool:
        if next(steps) == 2 * STEPS:  # the end of the second epoch, while the first one is written
            has_gone_on.set()
        return False

    monkeypatch.setattr(Store, "write", observed)
    _train(
        experiment, experiment.store(str(tmp_path / "waiting")), "free", on_epoch=lambda r: _wait(is_saved[r["epoch"]])
    )
    store = experiment.store(str(tmp_path / "going on"))
    _train(experiment, store, "free", stopping=go_on)
    assert epochs > 2
    assert len(files["waiting"]) == 3 * epochs
    assert files["going on"] == files["waiting"]
    first, *_ = (content for name, content in files["waiting"] if name.endswith("safetensors"))
    assert all(kind in first for kind in (b'"model.', b'"momentum.', b'"best.', b'"perturbation"'))
    assert [row["epoch"] for row in tables.read(store, "metrics").to_pylist()] == list(range(1, epochs + 1))


@pytest.mark.parametrize("epoch", [1, 3], ids=["first", "last"])
def test_a_write_that_fails_ends_the_training_with_its_error(
    tiny: Experiment, store: Store, monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    write, ended = Store.write, list[int]()

    def full(store: Store, name: str, content: bytes) -> None:
        if f"epoch-{epoch:05d}" in name:
            raise StorageFailed(f"{name}: cannot be written: no space")
        write(store, name, content)

    monkeypatch.setattr(Store, "write", full)
    with pytest.raises(
        StorageFailed, match=r"^checkpoints/benign/epoch-0000\d/state.json: cannot be written: no space$"
    ):
        _train(tiny, store, "benign", on_epoch=lambda row: ended.append(row["epoch"]))
    assert ended == list(range(1, epoch + 1))  # the next epoch's checkpoint is not begun
    assert checkpoints.latest_epoch(store, "benign") == epoch - 1


def test_a_training_that_fails_while_a_write_fails_names_both(
    tiny: Experiment, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    error: Exception = StorageFailed("no space")
    monkeypatch.setattr(Store, "write", fail)
    with pytest.raises(StorageFailed, match="no space") as raised:
        _train(tiny, store, "benign", on_epoch=lambda row: 1 / 0)
    assert isinstance(raised.value.__context__, ZeroDivisionError)


def _train_until_killed(folder: str, messages: Connection) -> None:
    """Train; write half of the second epoch's tensors and no more, and report when training has gone on meanwhile."""
    experiment, write, steps = build("digits", 0, TINY), disk._write, itertools.count(1)
    is_writing = threading.Event()

    def write_half(path: str, content: bytes, mode: str) -> None:
        if "epoch-00002/.tensors" not in path:
            write(path, content, mode)
            return
        write(path, content[: len(content) // 2], mode)
        is_writing.set()
        threading.Event().wait()

    def report() -> bool:
        if next(steps) == 3 * STEPS:
            _wait(is_writing)
            messages.send("at the end of the third epoch")
        return False

    disk._write = write_half
    _train(experiment, experiment.store(folder), "pgd-1", stopping=report)


def test_a_training_killed_while_it_writes_a_checkpoint_resumes_from_the_one_before(
    tiny: Experiment, tmp_path: Path
) -> None:
    whole, killed = (tiny.store(str(tmp_path / name)) for name in ("whole", "killed"))
    context = multiprocessing.get_context("spawn")
    messages, sender = context.Pipe(duplex=False)
    process = context.Process(target=_train_until_killed, args=(killed.url, sender))
    process.start()
    _train(tiny, whole, "pgd-1")
    assert messages.poll(PATIENCE)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    (unfinished,) = Path(killed.path("checkpoints/pgd-1/epoch-00002")).glob(".tensors*")
    assert unfinished.stat().st_size > 0
    assert checkpoints.latest_epoch(killed, "pgd-1") == 1
    assert tables.read(killed, "metrics")["epoch"].to_pylist() == [1, 2]  # the second is trained again

    _train(tiny, killed, "pgd-1")
    expected, resumed = (checkpoints.load_latest(store, "pgd-1") for store in (whole, killed))
    assert expected is not None
    assert resumed is not None
    assert resumed.epoch == expected.epoch == 3
    assert all(torch.equal(tensor, resumed.tensors[name]) for name, tensor in expected.tensors.items())
    assert tables.read(killed, "metrics")["epoch"].to_pylist() == [1, 2, 3]
