"""The store under faults: what passes is waited for, what does not is said in one line, and nothing is half-written."""

from __future__ import annotations

import errno
import multiprocessing
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from dwf_cluster.experiment import InvalidInput
from dwf_cluster.store import StorageFailed, Store, checkpoints, files


class Faulty(MemoryFileSystem):
    """Raises what it is told to, then works."""

    protocol = "faulty"
    store: dict[str, object] = {}  # noqa: RUF012, as its parent has it
    pseudo_dirs = [""]  # noqa: RUF012
    faults: list[Exception] = []  # noqa: RUF012
    asked = 0
    half = False  # whether a fault in writing leaves half of it

    @classmethod
    def _fault(cls) -> None:
        cls.asked += 1
        if cls.faults:
            raise cls.faults.pop(0)

    def cat_file(self, *arguments: object, **options: object) -> bytes:
        self._fault()
        content: bytes = super().cat_file(*arguments, **options)
        return content

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
        if self.half and self.faults:
            super().pipe_file(path, value[: len(value) // 2], mode, **options)
        self._fault()
        super().pipe_file(path, value, mode, **options)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    Faulty.faults, Faulty.asked, Faulty.store, Faulty.half = [], 0, {}, False
    monkeypatch.setattr(files, "PATIENCE", 0.5)
    store = Store("faulty://root", "experiment")
    store.write("file", b"before")
    Faulty.asked = 0
    yield store
    Faulty.faults = []


PASSING = [
    TimeoutError(),
    ConnectionResetError("reset"),
    OSError(errno.EIO, "input/output error"),
    OSError(errno.EREMOTEIO, "We encountered an internal error"),  # 500, as s3fs has it
    OSError(errno.EBUSY, "Please reduce your request rate"),  # 503
    OSError("502 Bad Gateway"),
]


@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_what_passes_is_waited_for(faulty: Store, fault: Exception) -> None:
    Faulty.faults = [fault] * 3
    assert faulty.read("file") == b"before"
    Faulty.faults = [fault] * 2
    faulty.write("file", b"after")
    assert (faulty.read("file"), Faulty.asked) == (b"after", 4 + 3 + 1)


@pytest.mark.parametrize("fault", PASSING, ids=str)
def test_but_not_for_ever(faulty: Store, fault: Exception) -> None:
    Faulty.faults = [fault] * 1000
    with pytest.raises(StorageFailed) as failed:
        faulty.read("file")
    assert str(failed.value).startswith("faulty://root/experiment/file: cannot be read: ")
    assert 3 < Faulty.asked < 1000


@pytest.mark.parametrize(
    "fault",
    [
        PermissionError("The AWS Access Key Id you provided does not exist in our records"),
        PermissionError("The provided token has expired"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EROFS, "Read-only file system"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
    ],
    ids=str,
)
def test_what_does_not_pass_is_said_at_once(faulty: Store, fault: OSError) -> None:
    Faulty.faults = [fault]
    with pytest.raises(StorageFailed) as failed:
        faulty.write("file", b"after")
    assert str(failed.value) == f"faulty://root/experiment/file: cannot be written: {fault.strerror or fault}"
    assert Faulty.asked == 1
    assert faulty.read("file") == b"before"


def test_half_a_write_is_written_whole_in_the_end_or_is_no_checkpoint(faulty: Store) -> None:
    Faulty.half, Faulty.faults = True, [ConnectionResetError("reset")] * 2
    checkpoints.save(faulty, "pgd-1", 1, 0, {"x": torch.ones(3)}, {})
    good = checkpoints.load_latest(faulty, "pgd-1")
    assert good is not None
    assert torch.equal(good.tensors["x"], torch.ones(3))
    Faulty.faults = [ConnectionResetError("reset")] * 1000
    with pytest.raises(StorageFailed):
        checkpoints.save(faulty, "pgd-1", 2, 0, {"x": torch.zeros(3)}, {})
    Faulty.faults = []
    latest = checkpoints.load_latest(faulty, "pgd-1")
    assert latest is not None
    assert latest.epoch == 1


def test_a_fault_of_our_own_is_not_hidden(faulty: Store) -> None:
    Faulty.faults = [TypeError("a mistake")]
    with pytest.raises(TypeError):
        faulty.read("file")


def test_pauses_grow_and_are_random(faulty: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        ranges.append((low, high))
        return 0.0

    monkeypatch.setattr(files.random, "uniform", uniform)
    Faulty.faults = [TimeoutError()] * 9
    faulty.read("file")
    assert ranges == [(0, 0.1 * 2**i) for i in range(7)] + [(0, 10.0)] * 2


def test_a_folder_that_vanishes_while_it_is_looked_at_is_empty(store: Store) -> None:
    assert (store.names("checkpoints"), store.read("gone"), store.size("gone")) == ([], None, None)
    store.remove("gone")


def test_a_full_disk_keeps_what_was_there_and_leaves_no_halves(small_disk: Path) -> None:
    store = Store(str(small_disk), "experiment")
    store.write("file", b"before")
    with pytest.raises(StorageFailed, match=r"experiment/file: cannot be written: No space left on device$"):
        store.write("file", b"x" * (2 << 20))
    assert store.read("file") == b"before"
    assert os.listdir(small_disk / "experiment") == ["file"]
    store.write("file", b"x" * (256 << 10))  # the half was given back


def test_a_read_only_disk_is_said(small_disk: Path) -> None:
    store = Store(str(small_disk), "experiment")
    store.check()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageFailed, match=r"preflight-\w+: cannot be written: Read-only file system$"):
        store.check()


def test_the_preflight_leaves_nothing(store: Store) -> None:
    store.check()
    assert os.listdir(store.root) == []


def _create(store: Store, number: int, go: object, won: object) -> None:
    go.wait()  # type: ignore[attr-defined]
    if store.create("lease", str(number).encode()):
        won.put(number)  # type: ignore[attr-defined]


def test_of_many_processes_that_create_a_file_one_succeeds(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    go, won = context.Event(), context.Queue()
    processes = [context.Process(target=_create, args=(store, i, go, won)) for i in range(4)]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join()
    winner = won.get(timeout=10)
    assert won.empty()
    assert store.read("lease") == str(winner).encode()
    assert store.names("") == ["lease"]


def test_what_a_killed_process_left_half_written_is_swept(store: Store) -> None:
    store.write("results/jobs/a.parquet", b"whole")
    half = Path(store.path("results/jobs/.b.parquet.7-ab.unfinished"))
    half.write_bytes(b"half")
    store.sweep()
    assert not half.exists()
    assert store.read("results/jobs/a.parquet") == b"whole"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:secret@bucket/runs", "s3://bucket/runs"),
        ("s3://bucket/runs?AWSAccessKeyId=secret", "s3://bucket/runs"),
        ("s3://bucket/runs#secret", "s3://bucket/runs"),
        ("https://host/runs;token=secret", "https://host/runs"),
        ("simplecache::s3://key:secret@bucket/runs", "s3://bucket/runs"),
    ],
)
def test_a_url_with_secrets_is_refused_and_they_are_not_repeated(url: str, shown: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        Store(url, "experiment")
    assert str(refused.value).startswith(f"--storage: '{shown}' with a password, a key or options cannot be used")
    assert "secret" not in str(refused.value)


def test_many_files_are_read_at_once_and_what_is_not_there_is_none(faulty: Store) -> None:
    reading: Callable[[list[str]], list[bytes | None]] = faulty.read_all
    assert reading(["file", "gone"]) == [b"before", None]
