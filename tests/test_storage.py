"""A store in S3 behaves as a folder does: on a real server with real authentication, also when it is interrupted."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pandas as pd
import psutil
import pytest

from dwf_cluster import status
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import LockLost, StorageFailed, Store, lock

from . import PATIENCE
from .conftest import ARGUMENTS, RetryClock, assert_same
from .process import Launch
from .s3 import S3


@pytest.fixture(scope="module")
def server() -> Iterator[S3]:
    server = S3()
    server.start()
    yield server
    server.remove()


@pytest.fixture
def s3(server: S3, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of a store on the server, with its credentials and endpoint in the environment."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.filesystem("s3").clear_instance_cache()
    return f"s3://{server.BUCKET}/some/prefix"


def test_a_run_on_s3_with_a_server_restart_gives_the_rows_of_a_run_in_a_folder(
    s3: str, server: S3, launch: Launch, two_worker_run: Path
) -> None:
    """With two workers in the joint stage, so that Ray Train writes to the store too."""
    other = Store(s3, "digits-seed9-0123456789")
    other.write("results/metrics/pgd-1.parquet", b"another experiment's")

    def restart_server(driver: psutil.Process, line: str) -> None:
        processes = [driver, *driver.children(recursive=True)]
        _assert_no_secret(server, processes)
        server.stop()
        server.start()

    arguments = ["--storage", s3, "--joint-workers", "2", *ARGUMENTS]
    printed: list[str] = []
    code, stderr = launch.run_and_act_at("^expert pgd-1: epoch 1/3", restart_server, *arguments, later_lines=printed)
    assert code == 0, stderr
    assert os.listdir(launch.folder) == []
    root = printed[-1]
    assert re.fullmatch(rf"{s3}/digits-seed0-[0-9a-f]{{10}}", root)
    assert_same(root, str(two_worker_run))
    (command,) = (line for line in printed if line.startswith("read them: "))
    frame = eval(command.removeprefix("read them: import pandas; "), {"pandas": pd})
    assert len(frame) == len(pd.read_parquet(two_worker_run / "results" / "evaluations"))
    again = launch(*arguments)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[:3] == [f"{s}: done already, skipped" for s in ("experts", "joint", "evaluate")]
    (row,) = (line for line in status.lines(s3) if line.startswith("digits-seed0"))
    evaluations = int((pd.read_parquet(two_worker_run / "results" / "jobs").stage == "evaluate").sum())
    assert row.split()[1:5] == ["done", "3/3", "1/1", f"{evaluations}/{evaluations}"]
    assert other.names("") == ["results"]
    for path in fsspec.filesystem("s3").find(s3):
        content = fsspec.filesystem("s3").cat_file(path)
        assert server.secret.encode() not in content
        assert server.key.encode() not in content


def _assert_no_secret(server: S3, processes: list[psutil.Process]) -> None:
    """Assert that the secret is neither in a command line nor in a file of Ray (logs, dashboard, environments)."""
    folders = set()
    for process in processes:
        arguments = process.cmdline()
        assert server.secret not in " ".join(arguments)
        folders |= {match[0] for argument in arguments if (match := re.search(r"/tmp/dwf-\w+", argument))}
    (folder,) = folders
    for path in Path(folder).rglob("*"):
        if path.is_file():
            assert server.secret.encode() not in path.read_bytes(), path


@pytest.mark.interruptions
def test_a_full_disk_ends_the_run_and_it_resumes_with_more_space(
    small_disk: Path, launch: Launch, reference_run: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    arguments = ["--storage", str(small_disk), *ARGUMENTS]
    full = launch(*arguments)
    assert full.returncode == 1
    lines = full.stderr.splitlines()
    match = re.match(rf"failed: .*{small_disk}/(\S+): cannot be written: No space left on device(?:; (.+))?$", lines[0])
    assert match, full.stderr
    name, log = match.groups()
    if log is None:  # the driver met the full disk before a job did, and has no log
        assert name.endswith("/status.json")
    elif log != "no log: the job could not write it":  # there may have been space for it
        assert Path(log.removeprefix("log: ")).read_text().startswith("Traceback")
    assert lines[-1].startswith(f"resume: python -m dwf_cluster.launch --storage {small_disk}")
    assert "Traceback" not in full.stderr
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    again = launch(*arguments)
    assert again.returncode == 0, again.stderr
    assert_same(again.stdout.splitlines()[-1], str(reference_run[0]))


def test_wrong_credentials_end_a_run_before_its_first_job(
    s3: str, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    result = launch("--storage", s3, *ARGUMENTS)
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    assert first.startswith(f"failed: {s3}/digits-seed0-")
    assert "cannot be listed: The request signature we calculated does not match" in first
    assert second.startswith("resume: python -m dwf_cluster.launch --storage s3://")
    assert "wrong" not in result.stderr


def test_missing_credentials_end_a_run_before_its_first_job(
    s3: str, launch: Launch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(launch.folder))
    result = launch("--storage", s3, *ARGUMENTS)
    assert result.returncode == 1
    assert re.match(r"failed: s3://\S+: cannot be listed: Unable to locate credentials\nresume: ", result.stderr)


def test_a_write_to_a_stopped_server_fails_and_names_the_file(s3: str, server: S3, retry_clock: RetryClock) -> None:
    store = Store(s3, "digits-seed8-0123456789")
    store.write("file", b"before")
    server.stop()
    try:
        with pytest.raises(StorageFailed, match=r"/file: cannot be written: Could not connect to the endpoint"):
            store.write("file", b"after")
    finally:
        server.start()
    assert store.read("file") == b"before"


def test_a_store_on_s3_does_what_a_folder_does(s3: str) -> None:
    store = Store(s3, "digits-seed7-0123456789")
    store.preflight()
    assert store.names("") == []
    assert (store.read("gone"), store.size("gone"), store.names("gone")) == (None, None, [])
    store.write("a/b/file", b"content")
    assert (store.names("a"), store.names("a/b"), store.size("a/b/file")) == (["b"], ["file"], 7)
    assert store.create("lease/00001.json", b"one")
    assert store.create("lease/00001.json", b"one")  # as if the answer to the first had been lost
    assert not store.create("lease/00001.json", b"two")
    assert store.read_all(["a/b/file", "gone"]) == [b"content", None]
    assert store.read_all([]) == store.read_ends([], 4) == []
    store.write("a/b/empty", b"")
    names = ["a/b/file", "gone", "a/b/empty"]
    assert store.read_ends(names, 3) == [b"ent", None, b""]
    assert store.read_ends(names, 100) == [b"content", None, b""]
    store.remove("a/b/empty")
    store.remove("a")
    store.remove("a")
    assert (store.read("a/b/file"), store.names("a/b")) == (None, [])
    acquired = lock.acquire(Store(s3, "digits-seed6-0123456789"))
    assert lock.is_locked(acquired.store)


def _acquire(store: Store, host: str, go: Any, answers: Any, end: Any) -> None:
    go.wait()
    try:
        answers.put((host, lock.acquire(store).number))
    except lock.ExperimentLocked as error:
        answers.put((host, str(error)))
    end.wait()  # alive until all have answered


def test_exactly_one_of_four_simultaneous_processes_acquires_the_lock(s3: str) -> None:
    context = multiprocessing.get_context("spawn")
    go, answers, end = context.Event(), context.Queue(), context.Event()
    store = Store(s3, "digits-seed5-0123456789")
    processes = [context.Process(target=_acquire, args=(store, f"n{i}", go, answers, end)) for i in range(4)]
    for process in processes:
        process.start()
    go.set()
    results = dict(answers.get(timeout=PATIENCE) for _ in processes)
    end.set()
    for process in processes:
        process.join()
    assert list(results.values()).count(1) == 1
    assert sum("is being run by" in str(result) for result in results.values()) == 3
    assert store.names("lease") == ["00001.json"]


def test_a_replaced_run_can_neither_write_nor_create_nor_remove(s3: str) -> None:
    store = Store(s3, "digits-seed4-0123456789")
    old = lock.acquire(store).store
    old.write("results/jobs/a.parquet", b"before")
    store.create("lease/00002.json", b"another's")
    for attempt in (
        lambda: old.write("results/jobs/a.parquet", b"after"),
        lambda: old.create("results/jobs/b.parquet", b"after"),
        lambda: old.remove("results"),
    ):
        with pytest.raises(LockLost, match="taken over by run 2: run 1 writes nothing more"):
            attempt()
    assert store.read("results/jobs/a.parquet") == b"before"
    assert store.names("results/jobs") == ["a.parquet"]


def test_the_preflight_refuses_a_server_that_ignores_if_none_match(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulated by requests without that header, as older versions of s3fs send."""
    store = Store(s3, "digits-seed3-0123456789")
    pipe_file = store.files.pipe_file
    monkeypatch.setattr(store.files, "pipe_file", lambda path, value, mode="": pipe_file(path, value))
    with pytest.raises(InvalidInput, match="does not refuse to create a file that exists"):
        store.preflight()
    assert store.names("") == []


class _Answers(BaseHTTPRequestHandler):
    """Responds to every request with one status and error code of S3."""

    protocol_version = "HTTP/1.1"  # clients wait for "100 Continue"
    status, code = 503, "SlowDown"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = f"<Error><Code>{self.code}</Code><Message>as the server has it</Message></Error>".encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = _answer  # noqa: N815, its parent's names

    def log_message(self, *arguments: object) -> None:
        """Print nothing."""


@pytest.mark.parametrize(
    ("code", "name", "retried"),
    [(503, "SlowDown", True), (500, "InternalError", True), (403, "ExpiredToken", False), (403, "AccessDenied", False)],
)
def test_answers_of_s3_servers_are_retried_or_fail_at_once(
    s3: str, retry_clock: RetryClock, monkeypatch: pytest.MonkeyPatch, code: int, name: str, retried: bool
) -> None:
    monkeypatch.setattr(_Answers, "status", code)
    monkeypatch.setattr(_Answers, "code", name)
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as faulty:
        threading.Thread(target=faulty.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{faulty.server_port}")
        fsspec.filesystem("s3").clear_instance_cache()
        with pytest.raises(StorageFailed, match="experiment/file: cannot be written: as the server has it"):
            Store("s3://bucket", "experiment").write("file", b"content")
        faulty.shutdown()
    assert bool(retry_clock.now) is retried
