"""The store under faults: transient errors are retried, others are one line, and no file is half-written."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from botocore.parsers import ResponseParserError
from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import LockLost, StorageFailed, Store, checkpoints

from .. import PATIENCE
from ..conftest import RetryClock


class Faulty(MemoryFileSystem):
    """A file system that raises the given exceptions, then works."""

    protocol = "faulty"
    store: dict[str, object] = {}  # noqa: RUF012, as in the parent class
    pseudo_dirs = [""]  # noqa: RUF012
    faults: list[Exception] = []  # noqa: RUF012
    put_faults: list[Exception] = []  # noqa: RUF012, raised by writes only
    calls = 0
    half = False  # whether a failed write leaves half of the content

    @classmethod
    def _fault(cls) -> None:
        cls.calls += 1
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
        if self.put_faults:
            raise self.put_faults.pop(0)
        super().pipe_file(path, value, mode, **options)


@pytest.fixture
def faulty(retry_clock: RetryClock) -> Iterator[Store]:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    Faulty.faults, Faulty.put_faults, Faulty.calls, Faulty.store, Faulty.half = [], [], 0, {}, False
    store = Store("faulty://root", "experiment")
    store.write("file", b"before")
    Faulty.calls = 0
    yield store
    Faulty.faults = []


TRANSIENT = [
    TimeoutError(),
    ConnectionResetError("reset"),
    OSError(errno.EIO, "input/output error"),
    OSError(errno.EREMOTEIO, "We encountered an internal error"),  # 500, as s3fs raises it
    OSError(errno.EBUSY, "Please reduce your request rate"),  # 503
    OSError("502 Bad Gateway"),
    ResponseParserError("Unable to parse response (no element found: line 1, column 0), invalid XML received"),
]


@pytest.mark.parametrize("fault", TRANSIENT, ids=str)
def test_transient_errors_are_retried(faulty: Store, fault: Exception) -> None:
    Faulty.faults = [fault] * 3
    assert faulty.read("file") == b"before"
    Faulty.faults = [fault] * 2
    faulty.write("file", b"after")
    assert (faulty.read("file"), Faulty.calls) == (b"after", (3 + 1) + (2 + 1) + 1)


@pytest.mark.parametrize("fault", TRANSIENT, ids=str)
def test_persistent_transient_errors_fail_after_a_while(faulty: Store, fault: Exception) -> None:
    Faulty.faults = [fault] * 1000
    with pytest.raises(StorageFailed) as failed:
        faulty.read("file")
    assert str(failed.value).startswith("faulty://root/experiment/file: cannot be read: ")
    assert 3 < Faulty.calls < 1000


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
def test_other_errors_fail_at_once(faulty: Store, fault: OSError) -> None:
    Faulty.faults = [fault]
    with pytest.raises(StorageFailed) as failed:
        faulty.write("file", b"after")
    assert str(failed.value) == f"faulty://root/experiment/file: cannot be written: {fault.strerror or fault}"
    assert Faulty.calls == 1
    assert faulty.read("file") == b"before"


def test_an_interrupted_write_is_completed_or_leaves_no_checkpoint(faulty: Store) -> None:
    Faulty.half, Faulty.faults = True, [ConnectionResetError("reset")] * 2
    checkpoints.save(faulty, "pgd-1", 1, 0, {"x": torch.ones(3)}, {})
    saved = checkpoints.load_latest(faulty, "pgd-1")
    assert saved is not None
    assert torch.equal(saved.tensors["x"], torch.ones(3))
    Faulty.faults = [ConnectionResetError("reset")] * 1000
    with pytest.raises(StorageFailed):
        checkpoints.save(faulty, "pgd-1", 2, 0, {"x": torch.zeros(3)}, {})
    Faulty.faults = []
    latest = checkpoints.load_latest(faulty, "pgd-1")
    assert latest is not None
    assert latest.epoch == 1


def test_a_programming_error_is_not_hidden(faulty: Store) -> None:
    Faulty.faults = [TypeError("a mistake")]
    with pytest.raises(TypeError):
        faulty.read("file")


def test_pauses_between_attempts_grow_and_are_random(faulty: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        ranges.append((low, high))
        return 0.0

    monkeypatch.setattr(random, "uniform", uniform)
    Faulty.faults = [TimeoutError()] * 9
    faulty.read("file")
    assert ranges == [(0, 0.1 * 2**i) for i in range(7)] + [(0, 10.0)] * 2


def test_missing_files_and_folders_are_no_errors(store: Store) -> None:
    assert (store.names("checkpoints"), store.read("gone"), store.size("gone")) == ([], None, None)
    store.remove("gone")


def test_a_write_to_a_full_disk_keeps_the_old_file_and_leaves_no_other(small_disk: Path) -> None:
    store = Store(str(small_disk), "experiment")
    store.write("file", b"before")
    with pytest.raises(StorageFailed, match=r"experiment/file: cannot be written: No space left on device$"):
        store.write("file", b"x" * (2 << 20))
    assert store.read("file") == b"before"
    assert os.listdir(small_disk / "experiment") == ["file"]
    store.write("file", b"x" * (256 << 10))  # the space of the unfinished file was freed


def test_the_preflight_names_a_read_only_disk(small_disk: Path) -> None:
    store = Store(str(small_disk), "experiment")
    store.preflight()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageFailed, match=r"preflight-\w+: cannot be written: Read-only file system$"):
        store.preflight()


def test_the_preflight_leaves_no_file(store: Store) -> None:
    store.preflight()
    assert os.listdir(store.root) == []


class Overwriting(Faulty):
    """As s3fs 2024.2.0, and S3 servers that ignore If-None-Match."""

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **options: object) -> None:
        super().pipe_file(path, value, **options)


class WithoutMode(Faulty):
    """As file systems whose `pipe_file` has no mode."""

    def pipe_file(self, path: str, value: bytes) -> None:  # type: ignore[override]
        super().pipe_file(path, value)


class ChecksThenWrites(Faulty):
    """As fsspec's default `pipe_file`, for SFTP, SMB and others: two processes may both see no file."""

    pipe_file = AbstractFileSystem.pipe_file


@pytest.mark.parametrize("kind", [Overwriting, WithoutMode, ChecksThenWrites])
def test_the_preflight_refuses_a_storage_without_exclusive_creation(faulty: Store, kind: type[Faulty]) -> None:
    fsspec.register_implementation("faulty", kind, clobber=True)
    with pytest.raises(InvalidInput) as refused:
        Store("faulty://root", "other").preflight()
    assert str(refused.value).startswith("--storage: 'faulty://root' cannot be used: it, or the library that opens it")
    assert "\n" not in str(refused.value)
    assert Store("faulty://root", "other").names("") == []


def test_the_preflight_accepts_a_storage_with_exclusive_creation(faulty: Store) -> None:
    faulty.preflight()
    assert faulty.names("") == ["file"]


def test_the_locks_are_read_before_each_attempt_to_put(
    faulty: Store, retry_clock: RetryClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt fails, another run takes over, and there is no second attempt."""
    old = Store(faulty.url, faulty.folder, run=1)
    old.write("file", b"its own")
    monkeypatch.setattr(retry_clock, "sleep", lambda seconds: faulty.create("lease/00002.json", b"another's"))
    Faulty.put_faults = [TimeoutError()]
    with pytest.raises(LockLost, match="taken over by run 2: run 1 writes nothing more"):
        old.write("file", b"late")
    for attempt in (lambda: old.create("new", b"late"), lambda: old.remove("file")):
        with pytest.raises(LockLost):
            attempt()
    assert faulty.read("file") == b"its own"
    assert faulty.names("") == ["file", "lease"]


NO_LINKS = [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS]


def _no_link(number: int, *_: object) -> None:
    raise OSError(number, os.strerror(number))


@pytest.mark.parametrize("number", NO_LINKS, ids=errno.errorcode.get)
def test_a_file_is_created_exclusively_without_hard_links(
    store: Store, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "link", functools.partial(_no_link, number))
    store.preflight()
    assert store.create("lease/00001.json", b"one")
    assert store.create("lease/00001.json", b"one")  # as if the answer to the first had been lost
    assert not store.create("lease/00001.json", b"two")
    assert store.read("lease/00001.json") == b"one"
    assert sorted(os.listdir(store.path("lease"))) == ["00001.json"]


def test_a_folder_in_place_of_a_file_is_an_error(store: Store) -> None:
    os.makedirs(store.path("status.json"))
    for attempt, participle in (
        (lambda: store.read("status.json"), "read"),
        (lambda: store.write("status.json", b"content"), "written"),
    ):
        with pytest.raises(StorageFailed, match=f"status.json: cannot be {participle}: Is a directory"):
            attempt()
    store.write("file", b"content")
    content, reason = store.read_all(["file", "status.json"])
    assert content == b"content"
    assert isinstance(reason, StorageFailed)


def _create(store: Store, number: int, links: bool, go: object, won: object) -> None:
    if not links:
        os.link = functools.partial(_no_link, errno.EPERM)  # in this process
    go.wait()  # type: ignore[attr-defined]
    if store.create("lease", str(number).encode()):
        won.put(number)  # type: ignore[attr-defined]


@pytest.mark.parametrize("links", [True, False])
def test_exactly_one_of_four_processes_creates_a_file(store: Store, links: bool) -> None:
    context = multiprocessing.get_context("spawn")
    go, won = context.Event(), context.Queue()
    processes = [context.Process(target=_create, args=(store, i, links, go, won)) for i in range(4)]
    for process in processes:
        process.start()
    go.set()
    for process in processes:
        process.join()
    winner = won.get(timeout=PATIENCE)
    assert won.empty()
    assert store.read("lease") == str(winner).encode()
    assert store.names("") == ["lease"]


def test_unfinished_files_of_killed_processes_are_removed(store: Store) -> None:
    store.write("results/jobs/a.parquet", b"whole")
    half = Path(store.path("results/jobs/.b.parquet.7-ab.unfinished"))
    half.write_bytes(b"half")
    store.remove_temporary()
    assert not half.exists()
    assert store.read("results/jobs/a.parquet") == b"whole"


def test_reading_many_files_gives_none_for_missing_ones(faulty: Store) -> None:
    assert faulty.read_all(["file", "gone"]) == [b"before", None]
