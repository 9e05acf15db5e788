"""`--help`, `--help-fields`, and what a typing mistake may import."""

from __future__ import annotations

import subprocess
import sys

import pytest

from dwf_cluster.launch import main
from dwf_cluster.presets import PRESETS, fields_of_an_experiment
from dwf_cluster.settings import FieldDescription

SCREEN = 43
"""Lines of a terminal of 80 columns."""


def test_help_shows_every_preset_and_fits_on_two_screens(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for preset in PRESETS:
        assert f"  {preset} " in text
    assert "--help-fields" in text
    assert len(text.splitlines()) <= 2 * SCREEN


def _described(field: FieldDescription) -> str:
    return f"  {field.name} ({field.type}; {field.default})\n      {field.meaning}\n"


def test_help_fields_describes_every_field_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help-fields"]) == 0
    text = capsys.readouterr().out
    for field in fields_of_an_experiment():
        assert _described(field) in text


def test_help_fields_of_a_part_describes_the_fields_of_this_part_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help-fields", "experts"]) == 0
    text = capsys.readouterr().out
    for field in fields_of_an_experiment():
        assert (_described(field) in text) == field.name.startswith("experts.")


@pytest.mark.parametrize("name", ["seed", "gate.kind"])
def test_help_fields_of_one_field_describes_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (field,) = (field for field in fields_of_an_experiment() if field.name == name)
    assert main(["--help-fields", name]) == 0
    heading, *description = capsys.readouterr().out.splitlines(keepends=True)
    assert heading.startswith("fields for --set")
    assert "".join(description) == _described(field)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("launch:main", ["--help"]),
        ("launch:main", ["--help-fields"]),
        ("launch:main", ["--local", "--set", "experts.epoch=5"]),
        ("launch:main", ["--local", "--nodes", "2"]),
        ("__main__:main", ["--help"]),
        ("__main__:main", ["run", "--local", "--set", "experts.epoch=5"]),
        ("__main__:main", ["trian"]),
    ],
)
def test_help_and_a_typing_mistake_import_neither_torch_nor_ray(function: str, arguments: list[str]) -> None:
    program = (
        f"import pkgutil, sys; main = pkgutil.resolve_name('dwf_cluster.{function}')\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "sys.exit(sorted({'torch', 'ray', 'pyarrow', 'numpy'} & set(sys.modules)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
