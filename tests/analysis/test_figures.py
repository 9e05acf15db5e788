"""The figures show the numbers, and are files that others can use."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from analysis import Group, figures
from analysis.predictions import Predictions
from analysis.results import column_key
from analysis.tables import accuracies
from tests.analysis.conftest import Call


def test_every_figure_is_drawn_and_has_a_caption(cifar10: Group, measured: pd.DataFrame, found: Predictions) -> None:
    assert list(figures.of_group(cifar10, measured, found)) == list(figures.CAPTIONS)


def test_figure_6_is_every_models_accuracy_over_epsilon_with_bands(cifar10: Group, measured: pd.DataFrame) -> None:
    figure = figures.fgsm(cifar10, measured)
    assert figure is not None
    (axes,) = figure.axes
    lines = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines}
    assert set(lines) == {*cifar10.models, "paper's DWF"}
    rows = measured[(measured.model == "pgd-2") & measured.attack.isin(["clean", "fgsm"])]
    assert lines["pgd-2"][:, 0].tolist() == [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09]
    assert lines["pgd-2"][:, 1] == pytest.approx(100 * rows["mean"].to_numpy())
    assert lines["paper's DWF"][0, 1] == pytest.approx(91.19)
    assert len(axes.collections) == len(cifar10.models)
    ends = axes.collections[list(cifar10.models).index("pgd-2")].get_paths()[0].get_extents()
    top = 100 * (rows["mean"] + rows["std"]).max()
    assert ends.ymax == pytest.approx(top)


def test_figure_7_is_over_iterations_and_leaves_the_papers_bound_out(cifar10: Group, measured: pd.DataFrame) -> None:
    figure = figures.pgd(cifar10, measured)
    assert figure is not None
    lines = {line.get_label(): np.asarray(line.get_xydata()) for line in figure.axes[0].lines}
    assert set(lines) == set(cifar10.models)
    assert lines["mixture"][:, 0].tolist() == [10, 20, 30, 40, 50]


def test_one_seed_has_no_band(digits: Group) -> None:
    figure = figures.fgsm(digits, accuracies(digits))
    assert figure is not None
    assert len(figure.axes[0].collections) == 0


def test_the_gate_is_shown_with_its_weights_and_its_entropy(cifar10: Group, found: Predictions) -> None:
    figure = figures.gate_by_attack(cifar10, found)
    assert figure is not None
    weights, entropy = figure.axes
    shown = np.asarray(weights.images[0].get_array())
    assert shown.sum(axis=1) == pytest.approx(100, rel=1e-4)
    sums = found.gates[column_key(cifar10.columns[0])].sum()
    assert shown[0] == pytest.approx((100 * sums[list(cifar10.experts)] / sums.examples).to_numpy())
    assert entropy.patches[0].get_width() == pytest.approx(sums.entropy / sums.examples)


def test_the_gate_by_class_has_clean_images_and_the_longest_pgd(cifar10: Group, found: Predictions) -> None:
    figure = figures.gate_by_class(cifar10, found)
    assert figure is not None
    assert [axes.get_title().split(", ")[1] for axes in figure.axes] == ["clean", "pgd 50"]
    for axes in figure.axes:
        assert np.asarray(axes.images[0].get_array()).sum(axis=1) == pytest.approx(np.full(10, 100), rel=1e-4)


def test_the_transfer_matrix_has_the_models_own_pgd_on_its_diagonal(cifar10: Group, measured: pd.DataFrame) -> None:
    figure = figures.transfer(cifar10, measured)
    assert figure is not None
    matrix = np.asarray(figure.axes[0].images[0].get_array())
    own = measured[(measured.attack == "pgd") & (measured.steps == 50)].set_index("model")["mean"]
    assert np.diag(matrix) == pytest.approx(100 * own[list(cifar10.models)].to_numpy())
    moved = measured[(measured.attack == "transfer") & (measured.model == "benign") & (measured.source == "mixture")]
    assert matrix[0, -1] == pytest.approx(100 * moved["mean"].item())


def test_the_mixture_costs_what_its_experts_cost_too(cifar10: Group) -> None:
    hours = figures.hours_of_training(cifar10)
    assert hours.attrs["gpu"]
    alone = cifar10.frame("metrics").query("model == 'mixture'").seconds.sum() / 3 / 3600
    assert hours["mixture"] == pytest.approx(alone + hours[list(cifar10.experts)].sum())
    assert hours["pgd-at"] > 0


def test_what_was_not_measured_is_not_drawn(cifar10: Group, measured: pd.DataFrame) -> None:
    nothing = Predictions({}, {})
    clean = measured[measured.attack == "clean"]
    drawn = figures.of_group(cifar10, clean, nothing)
    assert set(drawn) == {"fgsm", "experts_and_mixture", "training"}


def test_colours_are_those_that_the_colour_blind_tell_apart() -> None:
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    assert set(figures.COLOURS.values()) <= okabe_ito
    assert len(set(figures.COLOURS.values())) == len(figures.COLOURS)


def test_the_same_figure_is_the_same_file(cifar10: Group, measured: pd.DataFrame) -> None:
    for kind in ("svg", "pdf", "png"):
        files = [io.BytesIO(), io.BytesIO()]
        for file in files:
            figures.write(figures.fgsm(cifar10, measured), file, kind)
        assert files[0].getvalue() == files[1].getvalue()


def test_the_command_writes_vector_and_png_of_each_group(storage: Path, tmp_path: Path, call: Call) -> None:
    status, printed, _ = call(figures.main, next(storage.glob("digits-*")), "--out", tmp_path / "drawn")
    assert status == 0
    paths = [Path(line) for line in printed.splitlines()]
    assert {path.suffix for path in paths} == {".pdf", ".svg", ".png"}
    assert {path.parent.name for path in paths} == {"digits"}
    assert all(path.stat().st_size > 5000 for path in paths)
    height, width, _ = imread(tmp_path / "drawn" / "digits" / "fgsm.png").shape
    assert (width, height) == (1950, 1020)  # 6.5 by 3.4 inches, 300 dots an inch
