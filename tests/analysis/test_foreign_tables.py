"""Foreign, damaged or hostile tables are one line that names the table, the column and what is allowed."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from analysis import Group, figures, load, report, tables
from analysis.predictions import read_predictions
from dwf_cluster.presets import build
from dwf_cluster.settings import MAX_JSON_BYTES, InvalidInput
from dwf_cluster.store import tables as stored
from tests.analysis.conftest import Call

CLEAN = "evaluate-mixture-paper"
PREDICTIONS = "evaluate-mixture-paper-000000000"


@pytest.fixture
def folder(storage: Path, tmp_path: Path) -> Path:
    """A copy of the experiment on digits, in a storage of its own."""
    source = next(storage.glob("digits-*"))
    return Path(shutil.copytree(source, tmp_path / "runs" / source.name))


def _change(folder: Path, table: str, file: str, column: str, value: Any, row: int = 0) -> None:
    """Replace one value of a stored file; null and values of another type included."""
    path = folder / "results" / table / f"{file}.parquet"
    rows = pq.read_table(path)
    values = rows[column].to_pylist()
    values[row] = value
    position = rows.schema.get_field_index(column)
    pq.write_table(rows.set_column(position, column, pa.array(values, rows.schema.field(column).type)), path)


def _foreign(columns: dict[str, list[Any]]) -> bytes:
    content = io.BytesIO()
    pq.write_table(pa.table(columns), content)
    return content.getvalue()


def _line(call: Call, main: Callable[..., int], folder: Path, status: int = 2) -> str:
    code, _, err = call(main, folder)
    assert code == status, err
    (line,) = err.splitlines()
    assert line.isprintable()
    assert len(line) < 700
    return str(line).replace(str(folder), "DIGITS")


VALUES: list[tuple[str, str, str, Any, str]] = [
    ("evaluations", CLEAN, "accuracy", math.nan, "accuracy: 'nan' cannot be used: allowed is 0 to 1"),
    ("evaluations", CLEAN, "accuracy", None, "accuracy: null cannot be used"),
    ("evaluations", CLEAN, "accuracy", 7.0, "accuracy: '7.0' cannot be used: allowed is 0 to 1"),
    ("evaluations", CLEAN, "accuracy", math.inf, "accuracy: 'inf' cannot be used: allowed is 0 to 1"),
    ("evaluations", CLEAN, "accuracy_low", -0.5, "accuracy_low: '-0.5' cannot be used: allowed is 0 to 1"),
    ("evaluations", CLEAN, "examples", 0, "examples: '0' cannot be used: allowed is 1 to 360"),
    ("evaluations", CLEAN, "examples", -5, "examples: '-5' cannot be used: allowed is 1 to 360"),
    ("evaluations", CLEAN, "examples", None, "examples: null cannot be used"),
    ("evaluations", CLEAN, "examples", 2**63 - 1, "examples: '9223372036854775807' cannot be used"),
    ("evaluations", CLEAN, "correct", 101, "correct: '101' cannot be used: allowed is at most examples"),
    ("evaluations", CLEAN, "epsilon", math.nan, "epsilon: 'nan' cannot be used: allowed is 0 to 1000"),
    ("evaluations", CLEAN, "steps", -1, "steps: '-1' cannot be used"),
    (
        "evaluations",
        CLEAN,
        "model",
        "nobody",
        "model: 'nobody' cannot be used: allowed is benign, fgsm-1, pgd-1, mixture",
    ),
    ("evaluations", CLEAN, "model", None, "model: null cannot be used"),
    ("evaluations", CLEAN, "model", "\x1b[31m", "model: '\\\\x1b[31m' cannot be used"),
    ("evaluations", CLEAN, "source", "nobody", "source: 'nobody' cannot be used"),
    ("evaluations", CLEAN, "attack", None, "attack: null cannot be used"),
    ("evaluations", CLEAN, "seed", 3, "seed: '3' cannot be used: allowed is 0"),
    ("evaluations", CLEAN, "seed", None, "seed: 'None' cannot be used: allowed is 0"),
    ("predictions", PREDICTIONS, "example", 2**31, "example: '2147483648' cannot be used: allowed is 0 to 359"),
    ("predictions", PREDICTIONS, "example", 2**31 - 1, "example: '2147483647' cannot be used"),
    ("predictions", PREDICTIONS, "example", None, "example: null cannot be used"),
    ("predictions", PREDICTIONS, "example", -400, "example: '-400' cannot be used: allowed is 0 to 359"),
    ("predictions", PREDICTIONS, "label", None, "label: null cannot be used"),
    ("predictions", PREDICTIONS, "label", 10_000, "label: '10000' cannot be used: allowed is 0 to 9999"),
    ("predictions", PREDICTIONS, "prediction", None, "prediction: null cannot be used"),
    ("predictions", PREDICTIONS, "model", "nobody", "model: 'nobody' cannot be used"),
    ("predictions", PREDICTIONS, "gate", [1.0, 0.0], "gate: 2 weights cannot be used: mixture has 3 experts"),
    ("predictions", PREDICTIONS, "gate", [], "gate: 0 weights cannot be used: mixture has 3 experts"),
    ("predictions", PREDICTIONS, "gate", [1 / 6] * 6, "gate: 6 weights cannot be used: mixture has 3 experts"),
    ("predictions", PREDICTIONS, "gate", [math.nan, 0.5, 0.5], "gate: weights outside 0 to 1 cannot be used"),
    ("predictions", PREDICTIONS, "gate", [None, 0.5, 0.5], "gate: weights outside 0 to 1 cannot be used"),
    ("predictions", PREDICTIONS, "gate", [-1.0, 1.0, 1.0], "gate: weights outside 0 to 1 cannot be used"),
    ("metrics", "mixture", "loss", math.nan, "loss: 'nan' cannot be used"),
    ("metrics", "mixture", "loss", -math.inf, "loss: '-inf' cannot be used"),
    ("metrics", "mixture", "epoch", None, "epoch: null cannot be used"),
    ("metrics", "mixture", "epoch", 0, "epoch: '0' cannot be used: allowed is 1 to 1000000000"),
    ("metrics", "mixture", "clean_accuracy", 1.5, "clean_accuracy: '1.5' cannot be used: allowed is 0 to 1"),
    ("metrics", "mixture", "seconds", math.inf, "seconds: 'inf' cannot be used"),
    ("metrics", "mixture", "model", "nobody", "model: 'nobody' cannot be used"),
    ("checks", "evaluate-mixture-checks-000000000", "model", "nobody", "model: 'nobody' cannot be used"),
    ("checks", "evaluate-mixture-checks-000000000", "fired", None, "fired: null cannot be used"),
    ("checks", "evaluate-mixture-checks-000000000", "examples", 0, "examples: '0' cannot be used"),
    ("jobs", "joint", "gpus", math.nan, "gpus: 'nan' cannot be used: allowed is 0 to 1000000"),
    ("jobs", "joint", "seconds", -1.0, "seconds: '-1.0' cannot be used"),
    ("jobs", "joint", "stage", None, "stage: null cannot be used"),
]


@pytest.mark.parametrize(
    ("table", "file", "column", "value", "message"), VALUES, ids=lambda value: str(value)[:20] if value != "" else "-"
)
def test_a_value_that_no_run_writes_is_named(
    folder: Path, table: str, file: str, column: str, value: Any, message: str
) -> None:
    _change(folder, table, file, column, value)
    with pytest.raises(InvalidInput) as error:
        _ = getattr(load(str(folder)), table)
    assert str(error.value).startswith(f"{folder}: table {table} cannot be used: {message}")
    if table == "predictions":  # which are also read in batches
        with pytest.raises(InvalidInput, match="table predictions cannot be used"):
            read_predictions(load(str(folder)).groups[0])


def _main_that_reads(table: str) -> Callable[..., int]:
    return {"metrics": figures.main, "checks": report.main, "jobs": figures.main}.get(table, tables.main)


@pytest.mark.parametrize("table", ["evaluations", "predictions", "metrics", "checks", "jobs"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read: "),
        (b"PAR1" * 4, "cannot be read: "),
        (_foreign({"a": [1], "b": ["x"]}), "cannot be used: model: null cannot be used"),
        (_foreign({"seed": ["high"], "model": ["mixture"]}), "cannot be "),
        (_foreign({"model": [[1, 2]]}), "cannot be read: "),
        (_foreign({"model": [b"\xff\xfe"]}), "cannot be "),
    ],
    ids=["empty", "magic", "columns", "types", "list", "bytes"],
)
def test_a_foreign_file_in_any_table_is_one_line(
    folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch, table: str, content: bytes, message: str
) -> None:
    monkeypatch.chdir(folder.parent)
    (folder / "results" / table / "x.parquet").write_bytes(content)
    assert _line(call, _main_that_reads(table), folder).startswith(f"error: DIGITS: table {table} {message}")


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "directory": (lambda path: path.mkdir(), "it is a directory; allowed is a regular file"),
    "pipe": (os.mkfifo, "it is a pipe, a socket or a device; allowed is a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "it is a pipe, a socket or a device"),
    "dangling": (lambda path: path.symlink_to("gone"), "No such file or directory"),
}


@pytest.mark.parametrize("case", SPECIAL)
def test_a_path_that_is_not_a_regular_file_is_refused(folder: Path, call: Call, case: str) -> None:
    make, message = SPECIAL[case]
    path = folder / "results" / "evaluations" / "x.parquet"
    make(path)
    expected = f"error: DIGITS: table evaluations: '{path}' cannot be read: {message}".replace(str(folder), "DIGITS")
    assert _line(call, tables.main, folder).startswith(expected)


def test_a_damaged_page_is_one_line(folder: Path, call: Call) -> None:
    path = folder / "results" / "evaluations" / f"{CLEAN}.parquet"
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[4:-footer] = b"\xff" * (len(content) - footer - 4)
    path.write_bytes(content)
    assert "DIGITS: table evaluations cannot be read: " in _line(call, tables.main, folder, status=1)


def test_a_copied_file_is_refused(folder: Path, call: Call) -> None:
    path = folder / "results" / "evaluations" / f"{CLEAN}.parquet"
    shutil.copy(path, path.with_name(f"{CLEAN} (copy).parquet"))
    assert "cannot be used twice" in _line(call, tables.main, folder)


@pytest.mark.parametrize(
    ("table", "rows"),
    [("evaluations", stored.MAX_ROWS_ELSEWHERE + 1), ("predictions", stored.MAX_ROWS["predictions"] + 1)],
)
def test_a_file_with_too_many_rows_is_refused_before_they_are_read(
    folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch, table: str, rows: int
) -> None:
    monkeypatch.setitem(stored.MAX_ROWS, "predictions", 2_000_000)
    rows = min(rows, 2_000_001)
    path = folder / "results" / table / "x.parquet"
    pq.write_table(pa.table({"steps": np.zeros(rows, np.int64)}), path)
    assert path.stat().st_size < 100_000
    allowed = 2_000_000 if table == "predictions" else stored.MAX_ROWS_ELSEWHERE
    assert _line(call, tables.main, folder) == (
        f"error: DIGITS: table {table} cannot be read: {rows} rows, allowed are {allowed}"
    )


def test_a_file_that_is_too_large_decompressed_is_refused(
    folder: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "MAX_FILE_BYTES", 200)
    line = _line(call, tables.main, folder)
    assert "bytes decompressed, allowed are 200" in line


# --------------------------------------------------------------------------------------- experiment.json


def _with_field(opening: str, closing: str, depth: int) -> Callable[[Path], bytes]:
    """The experiment with an unknown field that is nested `depth` levels deep."""

    def content(folder: Path) -> bytes:
        fields = (folder / "experiment.json").read_text().rstrip().removesuffix("}")
        return (fields + ', "later": ' + opening * depth + "1" + closing * depth + "}").encode()

    return content


@pytest.mark.parametrize(
    "content",
    [
        lambda _: b"null",
        lambda _: b"7",
        lambda _: b"[" * 100_000,
        lambda _: b'{"a":' * 100_000,
        _with_field('{"a":', "}", 200),
        _with_field('{"a":', "}", 900),
        _with_field("[", "]", 200),
        _with_field("[", "]", 900),
        lambda folder: (folder / "experiment.json").read_text().encode("utf-16"),
        lambda folder: b"\xef\xbb\xbf" + (folder / "experiment.json").read_bytes(),
        lambda folder: (folder / "experiment.json").read_bytes().replace(b"digits", b"caf\xe9"),
        lambda folder: (folder / "experiment.json").read_bytes().replace(b'"digits"', b'"\\ud800"'),
        lambda folder: (folder / "experiment.json").read_bytes().replace(b'"digits"', b'"a\\u0000.npz"'),
        lambda folder: (folder / "experiment.json").read_bytes().replace(b'"seed": 0', b'"seed": NaN'),
        lambda folder: (folder / "experiment.json").read_bytes().replace(b'"seed": 0', b'"seed": ' + b"9" * 5000),
    ],
    ids=[
        "null",
        "number",
        "deep-list",
        "deep",
        "200",
        "900",
        "200-list",
        "900-list",
        "utf-16",
        "bom",
        "latin-1",
        "surrogate",
        "zero",
        "nan",
        "long",
    ],
)
def test_an_experiment_json_that_cannot_be_parsed_is_one_line(
    folder: Path, call: Call, content: Callable[[Path], bytes]
) -> None:
    (folder / "experiment.json").write_bytes(content(folder))
    assert _line(call, tables.main, folder).startswith("error: DIGITS/experiment.json: ")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.mkdir(), "Is a directory"),
        (os.mkfifo, "not a regular file"),
        (
            lambda path: path.write_bytes(b" " * (MAX_JSON_BYTES + 1)),
            f"{MAX_JSON_BYTES + 1} bytes of JSON, allowed are {MAX_JSON_BYTES}",
        ),
    ],
    ids=["directory", "pipe", "large"],
)
def test_an_experiment_json_that_cannot_be_read_is_one_line(
    folder: Path, call: Call, make: Callable[[Path], object], reason: str
) -> None:
    (folder / "experiment.json").unlink()
    make(folder / "experiment.json")
    assert _line(call, tables.main, folder, status=1) == f"failed: DIGITS/experiment.json: cannot be read: {reason}"
    assert _line(call, tables.main, folder.parent, status=1).endswith(reason)


def test_a_folder_without_experiment_json_is_not_an_experiment(folder: Path, call: Call) -> None:
    (folder / "experiment.json").unlink()
    (folder / "experiment.json").symlink_to("gone")
    assert "it holds no experiment.json" in _line(call, tables.main, folder.parent)


# ------------------------------------------------------------------------------------------ what is shown


def _two_groups(folder: Path, **unknown: object) -> tuple[Group, Group]:
    """The experiment, and a copy with settings that this version does not know."""
    fields = json.loads((folder / "experiment.json").read_text())
    other = Path(shutil.copytree(folder, folder.with_name("other")))
    (other / "experiment.json").write_text(json.dumps({**fields, **unknown}))
    first, second = load(str(folder.parent)).groups
    return first, second


def test_unknown_settings_are_escaped_in_titles(folder: Path) -> None:
    groups = _two_groups(folder, **{"\x1b]0;owned\x07": "\u202e\n" + "x" * 10_000})
    for group in groups:
        assert group.title.isprintable()
        assert len(group.title) < 300


def test_models_of_another_version_are_shown(folder: Path) -> None:
    fields = json.loads((folder / "experiment.json").read_text())
    (folder / "experiment.json").write_text(json.dumps({**fields, "router": "a field of a later version"}))
    _change(folder, "evaluations", "evaluate-benign-paper", "model", "later")
    (group,) = load(str(folder)).groups
    assert group.models == ("benign", "mixture", "fgsm-1", "pgd-1", "later")
    assert "later" in set(tables.accuracies(group).model)


def test_a_path_with_wildcards_is_read_literally(folder: Path, call: Call) -> None:
    odd = folder.parent.rename(folder.parent.with_name("runs[1]*"))
    (group,) = load(str(odd)).groups
    assert len(group.frame("evaluations")) == 4 * 17


def test_changed_settings_include_an_unknown_presets_name(tmp_path: Path) -> None:
    experiment = build("digits", 0, ["preset=mine", "experts.epochs=5"])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "experiment.json").write_text(experiment.to_json())
    (group,) = load(str(tmp_path)).groups
    assert dict(group.changed)["preset"] == "mine"
    assert dict(group.changed)["data.source"] == "digits"


def test_unchanged_tables_are_shown(folder: Path, call: Call) -> None:
    status, out, err = call(tables.main, folder)
    assert (status, err) == (0, "")
    assert "The paper has no figures for digits." in out
