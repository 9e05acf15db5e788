"""`dwf run|status|evaluate|report`, also as `python -m dwf_cluster`, calls the functions of the other commands."""

from __future__ import annotations

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dwf_cluster.__main__ import COMMANDS, main

SCREEN = 24


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_dwf_alone_and_its_help_name_every_command_on_one_screen(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= SCREEN
    for name in COMMANDS:
        assert f"  {name} " in printed


@pytest.mark.parametrize("name", ["trian", "", "../run", "run\n", "x" * 500, "--local"])
def test_an_unknown_command_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name]) == 2
    message = capsys.readouterr().err
    assert message.endswith("is not a command: allowed are run, status, evaluate, report\n")
    assert message.startswith("error: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--local", "--colour"], "unrecognized arguments: --colour"),
        (["status", "gone"], "storage: 'gone' cannot be used: no experiments there"),
        (["evaluate", "--colour"], "the following arguments are required: --model"),
        (["report", "gone"], ""),
    ],
)
def test_each_command_answers_bad_input_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    assert capsys.readouterr().out.startswith("usage: ")


def test_a_package_that_is_not_installed_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "analysis"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "jinja2", None)  # importing it fails, as without the extra `analysis`
    assert main(["report", "runs"]) == 2
    assert capsys.readouterr().err == (
        "error: dwf report: the package jinja2 is not installed; install it with pip install 'dwf-cluster[analysis]'\n"
    )


def test_python_m_dwf_cluster_is_dwf(tmp_path: Path) -> None:
    """In a process of its own; the resume command names the module, which works without the script `dwf` too."""
    command = [sys.executable, "-m", "dwf_cluster", "run", "--fetch-data"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "digits: verified; data folder: data\n"


def test_the_script_dwf_calls_the_same_function() -> None:
    project = Path(__file__).parents[1].joinpath("pyproject.toml").read_text()
    (entry_point,) = re.findall(r'^dwf = "(.+)"$', project, re.MULTILINE)
    assert pkgutil.resolve_name(entry_point) is main
