"""The cells of the example notebook run in order, and the examples of the documentation give our numbers."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from analysis import Group
from analysis.columns import each
from analysis.tables import accuracies
from tests.analysis.conftest import ROOT


def test_every_cell_of_the_example_runs(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").symlink_to(storage)
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "analysis" / "example.ipynb").read_text())["cells"]
    names: dict[str, object] = {}
    shown = []
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            *body, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            if isinstance(last, ast.Expr):  # a notebook shows its value
                shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
            else:
                exec(compile(ast.Module([last], []), "cell", "exec"), names)
    assert shown[0] == [("cifar10", (0, 1, 2)), ("digits", (0,))]
    frames, drawn = ([value for value in shown if isinstance(value, kind)] for kind in (pd.DataFrame, Figure))
    assert [frame.empty for frame in frames] == [False, False, False]
    assert len(drawn) == 2


@pytest.mark.parametrize("library", ["duckdb", "polars"])
def test_duckdb_and_polars_give_the_same_numbers(
    library: str, storage: Path, cifar10: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    (tmp_path / "runs").mkdir()
    for run in cifar10.runs:
        (tmp_path / "runs" / Path(run.path).name).symlink_to(run.path)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(rf"```python\n(import {library}\b.*?)```", (ROOT / "docs" / "analysis.md").read_text(), re.S)
    imported, shown = ast.parse(block).body
    assert isinstance(shown, ast.Expr)
    names: dict[str, object] = {}
    exec(compile(ast.Module([imported], []), "docs", "exec"), names)
    result = eval(compile(ast.Expression(shown.value), "docs", "eval"), names)
    frame = result.df() if library == "duckdb" else pd.DataFrame(result.to_dicts())
    for row in each(accuracies(cifar10).query("attack == 'pgd'")):
        rows = frame[(frame.model == row.model) & (frame.steps == row.steps)]
        if library == "duckdb":
            rows = rows[rows.attack == "pgd"]
            assert (rows["mean"].item(), rows["std"].item()) == pytest.approx((row.mean, row.std))
        else:
            assert (rows.accuracy.mean(), rows.accuracy.std()) == pytest.approx((row.mean, row.std))
