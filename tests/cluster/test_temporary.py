"""Temporary folders: private, locked by their owners, below TMPDIR, with short paths for Ray's sockets."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import psutil
import pytest

from dwf_cluster.cluster import temporary
from dwf_cluster.settings import InvalidInput

from .. import PATIENCE
from ..process import command_line

HOLD = """
import sys
from dwf_cluster.cluster import temporary
with temporary.folder() as folder:
    temporary.write_token(folder, "c0ffee")
    print(folder, flush=True)
    sys.stdin.read()
"""

RAY = """
import sys
from pathlib import Path
from dwf_cluster.cluster.connect import local
from dwf_cluster.plan.resources import Resources
with local(Resources(1, 0)) as cluster:
    print(Path(cluster.token_file).parent, flush=True)
    sys.stdin.read()
"""


class Owner:
    """A process that owns a temporary folder until it is killed."""

    def __init__(self, program: str = HOLD) -> None:
        command = [sys.executable, "-c", program]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @cached_property
    def folder(self) -> Path:
        """Its folder, as soon as it is made."""
        assert self._process.stdout is not None
        return Path(self._process.stdout.readline().strip())

    @property
    def pid(self) -> int:
        """ID of the process."""
        return self._process.pid

    def kill(self) -> None:
        """Kill the process, so that it cannot remove its folder."""
        assert self.folder.is_dir()
        self._process.kill()
        self._process.communicate()

    def end(self) -> None:
        """Let the process end by itself."""
        self._process.communicate()


def _is_agent(process: psutil.Process) -> bool:
    return re.match("ray::.*Agent", command_line(process)) is not None


@pytest.fixture
def tmpdir(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("t")
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def test_a_folder_is_private_below_tmpdir_and_removed_at_the_end(tmpdir: Path) -> None:
    with temporary.folder() as folder:
        assert Path(folder).parent == tmpdir
        assert os.stat(folder).st_mode & 0o777 == 0o700
        assert os.listdir(folder) == []
    assert list(tmpdir.iterdir()) == []


def test_the_next_start_removes_folders_of_killed_owners_and_keeps_those_of_running_ones(tmpdir: Path) -> None:
    killed, running = Owner(), Owner()
    killed.kill()
    assert (killed.folder / "token").exists()
    assert (running.folder / "token").exists()
    with temporary.folder():
        assert not killed.folder.exists()
        assert (running.folder / "token").exists()
    running.end()
    assert list(tmpdir.iterdir()) == []


def test_links_files_and_folders_of_other_hosts_are_never_removed(tmpdir: Path) -> None:
    killed = Owner()
    killed.kill()
    elsewhere = tmpdir / "elsewhere"
    killed.folder.rename(elsewhere)
    killed.folder.symlink_to(elsewhere)
    file = Path(f"{killed.folder}_file")
    file.write_text("a file of such a name")
    other_host = tmpdir / killed.folder.name.replace(killed.folder.name[4:8], "host")
    other_host.mkdir()
    temporary.remove_abandoned(str(tmpdir))
    assert sorted(tmpdir.iterdir()) == sorted([elsewhere, killed.folder, file, other_host])
    assert (elsewhere / "token").read_text() == "c0ffee"


def test_the_folder_of_another_user_is_not_removed(tmpdir: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("giving a folder to another user needs root")
    killed = Owner()
    killed.kill()
    os.chown(killed.folder, 65534, 65534)
    temporary.remove_abandoned(str(tmpdir))
    assert (killed.folder / "token").exists()


def test_a_process_that_ray_left_running_is_killed_when_its_folder_is_removed(tmpdir: Path) -> None:
    killed = Owner()
    killed.kill()
    log = killed.folder / "agent.log"
    ray = "open('/proc/self/comm', 'w').write('ray::Agent')"
    codes = [
        f"import sys; log = open({str(log)!r}, 'w'); {named}; print(flush=True); sys.stdin.read()"
        for named in (ray, "pass")
    ]
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) for code in codes
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    temporary.remove_abandoned(str(tmpdir))
    agent, other = processes
    assert agent.wait(PATIENCE) < 0
    assert other.poll() is None  # a user who reads the log
    for process in processes:
        process.communicate()
    assert not killed.folder.exists()


def test_all_processes_and_files_of_a_killed_runs_ray_are_removed(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m,noexec", small_disk], check=True)
    link = Path("/tmp", secrets.token_hex(4))  # short enough for sockets
    link.symlink_to(small_disk)
    monkeypatch.setenv("TMPDIR", str(link))
    try:
        driver = Owner(RAY)
        (socket,) = driver.folder.glob("ray/session_2*/sockets/plasma_store")
        assert socket.is_socket()
        processes: list[psutil.Process] = []
        while not any(map(_is_agent, processes)):  # a process that changes its title sends no event
            processes = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        temporary.remove_abandoned(str(link))
        assert list(link.iterdir()) == []  # also what Ray's processes wrote to TMPDIR themselves
        _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
        assert alive == []
    finally:
        link.unlink()


def test_owners_that_start_at_the_same_time_keep_their_folders(tmpdir: Path) -> None:
    owners = [Owner() for _ in range(4)]
    for owner in owners:
        assert (owner.folder / "token").exists()
    for owner in owners:
        owner.end()
    assert list(tmpdir.iterdir()) == []


def test_a_long_tmpdir_is_used_for_files_but_not_for_sockets(
    tmpdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmpdir / ("long" * 20)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    with temporary.folder() as files:
        assert Path(files).parent == folder
    assert capsys.readouterr().err == ""
    with temporary.folder(for_sockets=True) as sockets:
        assert Path(sockets).parent == Path("/tmp")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: TMPDIR: '{folder}' is too long for Ray's sockets: allowed are ")
    assert line.endswith(" bytes; using /tmp")


def _is_missing(folder: Path) -> str:
    return f"{folder}/missing"


def _is_a_file(folder: Path) -> str:
    (folder / "file").write_text("not a folder")
    return f"{folder}/file"


def _is_small(folder: Path) -> str:
    return str(folder)


def _is_read_only(folder: Path) -> str:
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    return str(folder)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_is_missing, "No such file or directory"),
        (_is_a_file, "Not a directory"),
        (_is_small, "No space left on device"),
        (_is_read_only, "Read-only file system"),
    ],
)
def test_a_temporary_folder_that_cannot_be_used_is_bad_input(
    make: Callable[[Path], str], reason: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(small_disk)
    before = sorted(small_disk.iterdir())
    monkeypatch.setenv("TMPDIR", folder)
    with (
        pytest.raises(InvalidInput, match=f"^TMPDIR: '{folder}' cannot be used: {reason}; allowed is a folder with 8 "),
        temporary.folder(),
    ):
        pytest.fail("it was used")
    assert sorted(small_disk.iterdir()) == before
