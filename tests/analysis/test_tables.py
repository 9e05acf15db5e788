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
from analysis.predictions import Predictions, read_predictions
from analysis.statistics import comparisons
from analysis.tables import (
    INCOMPLETE,
    accuracies,
    against_defended,
    beside_paper,
    beyond,
    bold_cells,
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
    assert [label for label, _ in table.rows] == ["benign", "fgsm-at", "pgd-at", "mixture", "fgsm-1", "pgd-1", "pgd-2"]
    assert table.groups == {0: "plain networks", 1: "adversarially trained", 3: "mixtures", 4: "experts of mixture"}
    heads = ["clean", *["fgsm"] * 9, *["pgd"] * 5, "restarts", "adaptive"]
    sizes = ["parameters", "MACs", "passes", "TFLOP"]
    assert [above for above, _ in table.heads if not above.startswith("worst")] == [*heads, *sizes]
    assert all(re.fullmatch(r"\d+\.\d ± \d+\.\d", cell) for _, cells in table.rows for cell in cells[:-4])


def test_one_seed_has_no_std_and_speaks_of_trained_models(digits: Group) -> None:
    tests = comparisons(digits, read_predictions(digits))
    shown = table3(digits, accuracies(digits), tests)
    assert all(re.fullmatch(r"\d+\.\d", cell) for _, cells in shown.rows for cell in cells[:-4])
    assert any("these trained models, not about the method" in note for note in shown.notes)


def _family(*differences: tuple[str, float, float]) -> pd.DataFrame:
    """The mixture minus each rival on clean images: name, difference, corrected p."""
    frame = pd.DataFrame(differences, columns=["other", "difference", "p_corrected"])
    clean = {"attack": "clean", "source": None, "norm": None, "epsilon": np.nan, "steps": np.nan}
    return frame.assign(model="mixture", primary=True, incomplete=frame.difference.isna(), seeds=3, **clean)


CLEAN = ("clean", None, None, None, None)


def test_the_defended_model_is_bold_if_it_is_ahead_of_every_rival() -> None:
    assert bold_cells(_family(("a", 0.2, 0.001), ("b", 0.1, 0.049))) == {("mixture", CLEAN)}
    assert bold_cells(_family(("a", 0.2, 0.001), ("b", 0.1, 0.051))) == set()
    assert bold_cells(_family(("a", 0.2, 0.001), ("b", np.nan, 1.0))) == set()  # incomplete


def test_a_rival_is_bold_if_it_is_ahead_of_the_defended_model() -> None:
    assert bold_cells(_family(("a", -0.2, 0.001), ("b", 0.1, 0.001))) == {("a", CLEAN)}


def test_one_seed_makes_no_cell_bold() -> None:
    assert bold_cells(_family(("a", 0.2, 0.001), ("b", -0.2, 0.001)).assign(seeds=1)) == set()


def test_an_exploratory_column_is_never_bold() -> None:
    explored = _family(("a", 0.2, 0.001)).assign(primary=False, p_corrected=np.nan)
    assert bold_cells(explored) == set()


def test_the_highest_cell_is_not_bold_without_tests(
    cifar10: Group, measured: pd.DataFrame, tests: pd.DataFrame
) -> None:
    established = tests.assign(difference=0.1, p_corrected=tests.p_corrected.where(tests.p_corrected.isna(), 0.001))
    bold = table3(cifar10, measured, established)
    assert len(bold.bold) == 2  # the mixture, on clean images and in the worst case
    assert any(note.startswith("Bold: in clean and") for note in bold.notes)
    undecided = table3(cifar10, measured, tests.assign(p_corrected=1.0))
    assert not undecided.bold
    assert any(note.startswith("No cell is bold") for note in undecided.notes)
    assert "**" not in markdown(undecided).replace(f"**{undecided.title}**", "")


def test_every_table_of_accuracies_states_its_rule(
    cifar10: Group, measured: pd.DataFrame, tests: pd.DataFrame, table: Table
) -> None:
    rule = " ".join(table.notes)
    assert "over seeds and images, corrected over 12 comparisons" in rule
    assert "exploratory" in rule
    other = beyond(cifar10, measured, tests)
    assert other is not None
    assert "No cell can be bold: these columns are exploratory." in other.notes


def test_a_rival_without_all_results_is_incomplete(cifar10: Group, predictions: Predictions) -> None:
    clean = column_key(cifar10.columns[0])
    cut = predictions.correct["benign", clean].copy()
    cut[1, 7] = -1
    tests = comparisons(cifar10, Predictions(dict(predictions.correct) | {("benign", clean): cut}, predictions.gates))
    measured = accuracies(cifar10)
    is_cut = (measured.model == "benign") & (measured.attack == "clean")
    without = table3(cifar10, measured[~is_cut], tests)
    column = without.heads.index(("clean", ""))
    assert without.rows[0][1][column] == INCOMPLETE
    assert any("no claim is made against: benign (clean)" in note for note in without.notes)
    partial = table3(cifar10, measured.assign(seeds=measured.seeds.where(~is_cut, 2)), tests)
    assert partial.rows[0][1][column].endswith(" (2/3)")
    differences = against_defended(cifar10, tests)
    assert differences is not None
    assert differences.rows[0][1][0] == INCOMPLETE


def test_the_papers_cells_are_shown_with_the_difference(cifar10: Group, measured: pd.DataFrame) -> None:
    beside = beside_paper(cifar10, measured)
    assert beside is not None
    assert [label for label, _ in beside.rows[-3:]] == ["mixture", "paper: DWF", "difference"]
    ours, published, difference = (cells for _, cells in beside.rows[-3:])
    assert published[0] == "91.2 ± 0.4"
    assert published[-1] == "64.3 ± 1.1"
    for head, our_cell, paper_cell, signed in zip(beside.heads, ours, published, difference, strict=True):
        if head[0] in ("clean", "fgsm"):
            expected = float(our_cell.split()[0]) - float(paper_cell.split()[0])
            assert float(signed) == pytest.approx(expected, abs=0.15)
        else:  # PGD, which the table says not to compare
            assert signed == ""


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
    assert set(paper.RECIPES.values()) == set(cells.model)


def test_the_defended_model_is_compared_with_each_other_model(cifar10: Group, tests: pd.DataFrame) -> None:
    differences = against_defended(cifar10, tests)
    assert differences is not None
    (row,) = tests[(tests.attack == "clean") & (tests.model == "mixture") & (tests.other == "benign")].itertuples()
    assert differences.heads[0] == ("benign", "")
    label, cells = differences.rows[0]
    assert label == "clean"
    shown = [float(part) for part in re.findall(r"[+-][\d.]+", cells[0])]
    assert shown == pytest.approx([100 * row.difference, 100 * row.low, 100 * row.high], abs=0.051)
    assert ((0, 0) in differences.bold) == (row.p_corrected < 0.05)
    assert {i for i, _ in differences.bold} <= {0, 1}  # above the line
    assert differences.lines == {2}


def test_columns_beyond_the_paper_have_a_table(cifar10: Group, measured: pd.DataFrame, tests: pd.DataFrame) -> None:
    other = beyond(cifar10, measured, tests)
    assert other is not None
    assert other.heads == [("gate", "100"), ("noise", ""), ("autoattack", "")]
    measured_by_gate = {label for label, cells in other.rows if cells[0]}
    assert measured_by_gate == {"mixture"}
    assert all(all(cells[1:]) for _, cells in other.rows)


def test_models_and_columns_without_a_cell_are_left_out(
    cifar10: Group, measured: pd.DataFrame, tests: pd.DataFrame
) -> None:
    other = beyond(cifar10, measured[~measured.attack.isin(["noise", "autoattack"])], tests)
    assert other is not None
    assert other.heads == [("gate", "100")]
    assert [label for label, _ in other.rows] == ["mixture"]


def test_text_columns_are_aligned(table: Table) -> None:
    lines = text(table).splitlines()
    widths = {len(line) for line in lines[1:3]} | {
        len(line) for line in lines if line.startswith(("benign", "mixture", "─"))
    }
    assert len(widths) == 1


def test_markdown_has_a_cell_for_each_head(table: Table) -> None:
    rows = [line for line in markdown(table).splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(table.groups) + len(table.rows)
    assert [row.strip("| ") for row in rows if row.startswith("| *")] == [f"*{h}*" for h in table.groups.values()]
    assert {row.count("|") for row in rows} == {len(table.heads) + 2}


def test_latex_is_booktabs_with_a_cell_for_each_column(table: Table) -> None:
    source = latex(table)
    for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
        assert rule in source
    (spec,) = re.findall(r"\\begin{tabular}{(\w+)}", source)
    rows = [line for line in source.splitlines() if line.endswith(r"\\")]
    assert len(rows) == 2 + len(table.groups) + len(table.rows)
    assert r"\textit{adversarially trained}" in source
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
