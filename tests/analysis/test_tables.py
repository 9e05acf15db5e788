"""Table 3: numbers, bold cells, the paper's cells, and every format."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import Group, paper
from analysis.columns import column_key
from analysis.formats import FORMATS, Table, latex, markdown, text
from analysis.tables import (
    accuracies,
    against_defended,
    beside_paper,
    best,
    beyond,
    main,
    table3,
)
from tests.analysis.conftest import EXAMPLES, Call


@pytest.fixture(scope="session")
def table(cifar10: Group, measured: pd.DataFrame, tests: pd.DataFrame) -> Table:
    return table3(cifar10, measured, tests)


def test_mean_and_std_are_over_seeds(cifar10: Group, measured: pd.DataFrame) -> None:
    rows = cifar10.frame("evaluations")
    pgd = rows[(rows.attack == "pgd") & (rows.steps == 20)].groupby("model", observed=True).accuracy
    shown = measured[(measured.attack == "pgd") & (measured.steps == 20)].set_index("model")
    for model in cifar10.models:
        assert shown.loc[model, "mean"] == pytest.approx(pgd.mean()[model])
        assert shown.loc[model, "std"] == pytest.approx(pgd.std()[model])
        assert shown.loc[model, "low"] < shown.loc[model, "mean"] < shown.loc[model, "high"]
    assert set(shown.seeds) == {3}
    assert set(shown.examples) == {EXAMPLES}


def test_table_3_has_a_row_for_each_model_and_the_papers_17_columns(cifar10: Group, table: Table) -> None:
    assert [label for label, _ in table.rows] == ["benign", "fgsm-1", "pgd-1", "pgd-2", "fgsm-at", "pgd-at", "mixture"]
    heads = ["clean", *["fgsm"] * 9, *["pgd"] * 5, "restarts", "adaptive"]
    assert [above for above, _ in table.heads] == heads
    assert all(re.fullmatch(r"\d+\.\d ± \d+\.\d", cell) for _, cells in table.rows for cell in cells)


def test_one_seed_has_no_std(digits: Group) -> None:
    rows = table3(digits, accuracies(digits), pd.DataFrame(columns=["attack", "source", "epsilon", "steps"])).rows
    assert all(re.fullmatch(r"\d+\.\d", cell) for _, cells in rows for cell in cells)


def _tests(p_second: float) -> pd.DataFrame:
    """The mixture ahead of two others on clean images, with these p-values."""
    rows = [("a", "mixture", -0.2, 0.001), ("b", "mixture", -0.1, p_second), ("a", "b", -0.1, 0.001)]
    frame = pd.DataFrame(rows, columns=["model", "other", "difference", "p_holm"])
    return frame.assign(attack="clean", source=None, epsilon=np.nan, steps=np.nan)


def test_a_model_is_best_if_it_is_significantly_ahead_of_every_other() -> None:
    assert best(_tests(0.049)) == {("mixture", ("clean", None, None, None))}
    assert best(_tests(0.051)) == set()


def test_the_highest_cell_is_not_bold_without_tests(
    cifar10: Group, measured: pd.DataFrame, tests: pd.DataFrame
) -> None:
    assert table3(cifar10, measured, tests).bold
    undecided = table3(cifar10, measured, tests.assign(p_holm=1.0))
    assert not undecided.bold
    assert any(note.startswith("No cell is bold") for note in undecided.notes)
    assert "**" not in markdown(undecided).replace(f"**{undecided.title}**", "")


def test_bold_cells_are_those_with_significant_tests(cifar10: Group, table: Table, tests: pd.DataFrame) -> None:
    proven = best(tests)
    labels = [label for label, _ in table.rows]
    assert {(labels[i], column_key(cifar10.paper_columns[j])) for i, j in table.bold} == {
        cell for cell in proven if cell[1][0] not in ("pgd_gate", "noise", "transfer")
    }


def test_the_papers_cells_are_shown_with_the_difference(cifar10: Group, measured: pd.DataFrame) -> None:
    beside = beside_paper(cifar10, measured)
    assert beside is not None
    assert [label for label, _ in beside.rows[-3:]] == ["mixture", "paper: DWF", "difference"]
    ours, published, difference = (cells for _, cells in beside.rows[-3:])
    assert published[0] == "91.2 ± 0.4"
    assert published[-1] == "64.3 ± 1.1"
    for our_cell, paper_cell, signed in zip(ours, published, difference, strict=True):
        expected = float(our_cell.split()[0]) - float(paper_cell.split()[0])
        assert float(signed) == pytest.approx(expected, abs=0.15)


def test_the_table_warns_against_comparing_pgd_columns(cifar10: Group, measured: pd.DataFrame) -> None:
    beside = beside_paper(cifar10, measured)
    assert beside is not None
    (warning,) = (note for note in beside.notes if note.startswith("Warning"))
    assert "37 to 48 %" in warning  # VGG-19's, ..., DenseNet-169's, not those of SoE
    assert "0.03137" in warning


def test_a_data_set_that_the_paper_lacks_is_named(digits: Group) -> None:
    assert beside_paper(digits, accuracies(digits)) is None
    assert paper.why_not_compared(digits) == "The paper has no figures for digits."


def test_models_are_matched_with_the_papers_by_their_training(cifar10: Group) -> None:
    expected = {
        "benign": "ResNet-18",
        "fgsm-at": "ResNet-18 (FGSM-AT)",
        "pgd-at": "ResNet-18 (PGD-AT)",
        "mixture": "DWF",
    }
    assert paper.names(cifar10.experiment) == expected


def test_the_papers_table_is_complete_and_has_our_models() -> None:
    cells = paper.cells()
    assert len(cells) == 17 * cells.groupby(["dataset", "model"]).ngroups
    assert set(paper.RECIPES.values()) <= set(cells.model[cells.dataset == "CIFAR-10"])


def test_the_defended_model_is_compared_with_each_other_model(cifar10: Group, tests: pd.DataFrame) -> None:
    differences = against_defended(cifar10, tests)
    assert differences is not None
    (row,) = tests[(tests.attack == "clean") & (tests.model == "benign") & (tests.other == "mixture")].itertuples()
    assert differences.heads[0] == ("benign", "")
    label, cells = differences.rows[0]
    assert label == "clean"
    shown = [float(part) for part in re.findall(r"[+-][\d.]+", cells[0])]
    assert shown == pytest.approx([-100 * row.difference, -100 * row.high, -100 * row.low], abs=0.051)
    assert ((0, 0) in differences.bold) == (row.p_holm < 0.05)


def test_columns_beyond_the_paper_have_a_table(cifar10: Group, measured: pd.DataFrame, tests: pd.DataFrame) -> None:
    other = beyond(cifar10, measured, tests)
    assert other is not None
    assert other.heads == [("gate", "100"), ("noise", "")]
    assert [[bool(cell) for cell in cells] for _, cells in other.rows] == [[False, True]] * 6 + [[True, True]]


def test_models_without_a_cell_have_no_row(cifar10: Group, measured: pd.DataFrame, tests: pd.DataFrame) -> None:
    other = beyond(cifar10, measured[measured.attack != "noise"], tests)
    assert other is not None
    assert [label for label, _ in other.rows] == ["mixture"]


def test_text_columns_are_aligned(table: Table) -> None:
    lines = text(table).splitlines()
    widths = {len(line) for line in lines[1:3]} | {
        len(line) for line in lines if line.startswith(("benign", "mixture", "─"))
    }
    assert len(widths) == 1


def test_markdown_has_a_cell_for_each_head(table: Table) -> None:
    rows = [line for line in markdown(table).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(table.rows)
    assert {row.count("|") for row in rows} == {len(table.heads) + 2}


def test_latex_is_booktabs_with_a_cell_for_each_column(table: Table) -> None:
    source = latex(table)
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in source
    (spec,) = re.findall(r"\\begin{tabular}{(\w+)}", source)
    rows = [line for line in source.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 2 + len(table.rows)
    for row in rows:
        spanned = sum(int(n) - 1 for n in re.findall(r"\\multicolumn{(\d+)}", row))
        assert row.count("&") + spanned == len(spec) - 1
    assert source.count("{") == source.count("}")
    assert not re.search(r"(?<!\\)[%_#]", source.replace("{%\n", "{\n"))  # all escaped
    assert r"$\pm$" in source
    assert "±" not in source


@pytest.mark.parametrize("form", [*FORMATS, "csv"])
def test_the_command_prints_every_group_in_every_format(storage: Path, call: Call, form: str) -> None:
    status, printed, _ = call(main, storage, "--format", form)
    assert status == 0
    if form == "csv":
        frame = pd.read_csv(io.StringIO(printed))
        assert set(frame.group) == {"cifar10", "digits"}
        mixture = frame[(frame.model == "mixture") & (frame.group == "cifar10") & (frame.attack == "clean")]
        assert mixture.paper.item() == pytest.approx(0.9119)
    else:
        assert printed.count("the paper's table 3") == 2
        assert "The paper has no figures for digits." in printed
        assert "Warning: do not compare the PGD columns" in printed
