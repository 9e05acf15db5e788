"""The example notebook's cells run, in order, in one kernel's worth of names, on a storage called ./runs."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

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
            if isinstance(last, ast.Expr):  # what a notebook shows
                shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
            else:
                exec(compile(ast.Module([last], []), "cell", "exec"), names)
    assert shown[0] == [("cifar10", (0, 1, 2)), ("digits", (0,))]
    frames, drawn = ([each for each in shown if isinstance(each, kind)] for kind in (pd.DataFrame, Figure))
    assert [frame.empty for frame in frames] == [False, False, False]
    assert len(drawn) == 2
