"""The figures show the measured numbers, and are files for papers and pages."""

from __future__ import annotations

import colorsys
import functools
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from analysis import Group, drawing, figures, load, report, tables
from analysis.columns import column_key
from analysis.figures import FigureData, draw
from analysis.predictions import Predictions, read_predictions
from analysis.tables import accuracies
from analysis.training_figures import hours_of_training
from benchmarks.analysis import make_up
from dwf_cluster.defences import registry
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.defences.settings import DefenceSettings
from dwf_cluster.presets import build
from tests.analysis.conftest import CURVES, Call

NOTHING = Predictions({}, {})

OF_EXPERTS = {"gate_and_accuracy", "expert_transfer", "dropped_expert"}
"""Figures of the suite `experts`."""

OF_ANSWERS = {"class_accuracy", "confusion", "reliability"}
"""Figures of the defended model's answers."""


@pytest.fixture(scope="session")
def digits_data(digits: Group) -> FigureData:
    return FigureData(digits, accuracies(digits), read_predictions(digits))


def test_every_figure_is_drawn_and_has_a_caption(data: FigureData) -> None:
    assert list(figures.draw_all(data)) == list(figures.FIGURES)
    assert all(entry.caption.endswith(".") for entry in figures.FIGURES.values())


def test_figure_6_shows_accuracy_over_epsilon_with_bands(cifar10: Group, data: FigureData) -> None:
    figure = draw("fgsm", data)
    assert figure is not None
    (axes,) = figure.axes
    lines = {str(line.get_label()): np.asarray(line.get_xydata()) for line in axes.lines}
    named = {"benign": "ResNet-18 (benign)", "mixture": "DWF (mixture)"}
    named |= {"fgsm-at": "ResNet-18 (FGSM-AT)", "pgd-at": "ResNet-18 (PGD-AT)"}
    assert set(lines) == {*(named.get(model, model) for model in cifar10.models), "paper's DWF"}
    measured = data.measured
    rows = measured[(measured.model == "pgd-2") & measured.attack.isin(["clean", "fgsm"])]
    assert lines["pgd-2"][:, 0].tolist() == [0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09]
    assert lines["pgd-2"][:, 1] == pytest.approx(100 * rows["mean"].to_numpy())
    assert lines["paper's DWF"][0, 1] == pytest.approx(91.19)
    assert len(axes.collections) == len(cifar10.models)
    ends = axes.collections[list(cifar10.models).index("pgd-2")].get_paths()[0].get_extents()
    top = 100 * (rows["mean"] + rows["std"]).max()
    assert ends.ymax == pytest.approx(top)


def test_figure_7_shows_accuracy_over_iterations_without_the_papers(cifar10: Group, data: FigureData) -> None:
    figure = draw("pgd", data)
    assert figure is not None
    lines = {line.get_label(): np.asarray(line.get_xydata()) for line in figure.axes[0].lines}
    assert len(lines) == len(cifar10.models)
    assert lines["DWF (mixture)"][:, 0].tolist() == [10, 20, 30, 40, 50]


def test_the_curves_show_each_model_over_epsilon_steps_and_starts(cifar10: Group, data: FigureData) -> None:
    epsilon = cifar10.experiment.threat.epsilon
    expected = {
        "curve_epsilon": [[epsilon / 4, epsilon, 4 * epsilon, 1.0]] * 2,  # PGD and APGD
        "curve_steps": [[1, 2, 5, 10, 20]],
        "curve_restarts": [[1, 2, 3]],
    }
    for name, panels in expected.items():
        figure = draw(name, data)
        assert figure is not None
        for axes, attack, x in zip(figure.axes, (name, "curve_apgd"), panels, strict=False):
            lines = {line.get_label(): np.asarray(line.get_xydata()) for line in axes.lines}
            assert set(lines) >= set(cifar10.models)
            assert lines["mixture"][:, 0].tolist() == pytest.approx(x)
            rows = data.measured[(data.measured.model == "mixture") & (data.measured.attack == attack)]
            assert lines["mixture"][:, 1] == pytest.approx(100 * rows["mean"].to_numpy())
    assert not any(column.attack.startswith("curve") for column in cifar10.columns)


def test_one_seed_has_no_band(digits_data: FigureData) -> None:
    figure = draw("fgsm", digits_data)
    assert figure is not None
    assert len(figure.axes[0].collections) == 0


def test_the_gate_figure_shows_weights_and_entropy(cifar10: Group, data: FigureData) -> None:
    figure = draw("gate_by_attack", data)
    assert figure is not None
    weights, entropy = figure.axes
    shown = np.asarray(weights.images[0].get_array())
    assert shown.sum(axis=1) == pytest.approx(100, rel=1e-4)
    sums = data.predictions.gates[column_key(cifar10.columns[0])].sum()
    assert shown[0] == pytest.approx((100 * sums[list(cifar10.experts)] / sums.examples).to_numpy())
    assert entropy.patches[0].get_width() == pytest.approx(sums.entropy / sums.examples)


def test_the_gate_by_class_shows_clean_images_and_the_longest_pgd(data: FigureData) -> None:
    figure = draw("gate_by_class", data)
    assert figure is not None
    assert [axes.get_title().split(", ")[1] for axes in figure.axes] == ["clean", "pgd 50"]
    for axes in figure.axes:
        assert np.asarray(axes.images[0].get_array()).sum(axis=1) == pytest.approx(np.full(10, 100), rel=1e-4)


def test_the_transfer_matrix_has_each_models_own_pgd_on_its_diagonal(cifar10: Group, data: FigureData) -> None:
    figure = draw("transfer", data)
    assert figure is not None
    matrix = np.asarray(figure.axes[0].images[0].get_array())
    measured = data.measured
    own = measured[(measured.attack == "pgd") & (measured.steps == 50)].set_index("model")["mean"]
    assert np.diag(matrix) == pytest.approx(100 * own[list(cifar10.models)].to_numpy())
    moved = measured[(measured.attack == "transfer") & (measured.model == "benign") & (measured.source == "mixture")]
    assert matrix[0, cifar10.models.index("mixture")] == pytest.approx(100 * moved["mean"].item())


def test_hours_of_the_mixture_include_those_of_its_experts(cifar10: Group) -> None:
    hours = hours_of_training(cifar10)
    assert hours.attrs["gpu"]
    alone = cifar10.frame("metrics").query("model == 'mixture'").seconds.sum() / 3 / 3600
    assert hours["mixture"] == pytest.approx(alone + hours[list(cifar10.experts)].sum())
    assert hours["pgd-at"] > 0


def test_figures_without_results_are_not_drawn(cifar10: Group, measured: pd.DataFrame) -> None:
    drawn = figures.draw_all(FigureData(cifar10, measured[measured.attack == "clean"], NOTHING))
    assert set(drawn) == {"fgsm", "experts_and_mixture", "training"}


def test_colour_blind_readers_can_distinguish_the_colours() -> None:
    okabe_ito = {"#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"}
    tol_muted = {"#332288", "#117733", "#999933", "#882255", "#44AA99", "#AA4499", "#CC6677", "#DDCC77"}
    colours = [*drawing.PALETTE, drawing.DEFENDED]
    assert set(colours) <= okabe_ito | tol_muted
    assert len(set(colours)) == len(colours)


def test_a_method_has_a_colour_and_a_kind_a_shade_of_it(cifar10: Group, data: FigureData) -> None:
    colours = drawing.model_colours(cifar10)
    assert colours["benign"] == drawing.method_colour("standard")
    assert colours["fgsm-at"] == drawing.method_colour("fgsm")
    assert colours["pgd-at"] == drawing.method_colour("pgd")
    assert colours["mixture"] == drawing.method_colour("dwf") == drawing.DEFENDED
    assert colours["pgd-1"] == colours["pgd-2"] != colours["pgd-at"]
    assert _hue(colours["pgd-1"]) == pytest.approx(_hue(colours["pgd-at"]), abs=0.01)
    first, second = data.styles["pgd-1"], data.styles["pgd-2"]
    assert first["linestyle"] != second["linestyle"]
    assert first["marker"] != second["marker"]


def _hue(colour: str) -> float:
    hue, _, _ = colorsys.rgb_to_hsv(*to_rgb(colour))
    return hue


def test_the_colour_of_a_model_does_not_depend_on_other_rows(cifar10: Group, digits: Group) -> None:
    assert len(cifar10.models) != len(digits.models)
    for model in ("benign", "mixture"):
        assert drawing.model_colours(cifar10)[model] == drawing.model_colours(digits)[model]


def _model(settings: DefenceSettings, name: str, fraction: float) -> tuple[ModelSpec, ...]:
    return (registry.single(name, "fgsm", settings, fraction=fraction),)


def test_more_kinds_than_colours_differ_in_dashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"kind-{i}" for i in range(9)]
    for i, name in enumerate(names):
        recipe = functools.partial(_model, name=name, fraction=0.1 + i / 20)
        monkeypatch.setattr(sys.modules[__name__], f"recipe_{i}", recipe, raising=False)
        monkeypatch.setattr(registry, "DEFENCES", {**registry.DEFENCES, name: f"{__name__}:recipe_{i}"})
    experiment = build("digits", 0, ["experts.fgsm=1", "experts.pgd=0", f"baselines={','.join(names)}"])
    make_up(tmp_path, experiment, 40)
    (group,) = load(str(tmp_path)).groups
    data = FigureData(group, accuracies(group), read_predictions(group))
    looks = [(style["color"], style["linestyle"], style["marker"]) for style in data.styles.values()]
    assert len(set(looks)) == len(group.models) == 2 + 9 + 1
    assert "training" in figures.draw_all(data)


def test_models_of_another_version_are_drawn_in_grey_and_have_rows(tmp_path: Path, call: Call) -> None:
    """An experiment whose baselines this version does not know: neither figures nor tables nor the report fail."""
    experiment = build("cifar10", 0, ["experts.fgsm=1", "experts.pgd=0", "evaluation.beyond=transfer,curves", *CURVES])
    folder = make_up(tmp_path, experiment, 100)
    fields = json.loads((folder / "experiment.json").read_text())
    (folder / "experiment.json").write_text(json.dumps({**fields, "baselines": ["fgsm-at", "later"]}))
    for path in folder.glob("results/*/*.parquet"):
        rows = pq.read_table(path)
        for i, name in enumerate(rows.column_names):
            if name in ("model", "source"):
                values = ["later" if value == "pgd-at" else value for value in rows[name].to_pylist()]
                rows = rows.set_column(i, rows.schema.field(i), pa.array(values, pa.string()))
        pq.write_table(rows, path)
    (group,) = load(str(tmp_path)).groups
    assert group.models == ("benign", "fgsm-at", "mixture", "fgsm-1", "later")
    data = FigureData(group, accuracies(group), read_predictions(group))
    assert data.styles["later"]["color"] == drawing.UNDESCRIBED
    assert set(figures.draw_all(data)) == set(figures.FIGURES) - OF_EXPERTS
    figure = draw("fgsm", data)
    assert figure is not None
    assert "later" in {line.get_label() for line in figure.axes[0].lines}
    status, printed, _ = call(tables.main, tmp_path)
    assert status == 0
    first_table = printed[: printed.index("test images;")].splitlines()[3:]
    assert [line.split()[0] for line in first_table if not line.startswith("─")][: len(group.models)] == list(
        group.models
    )
    assert call(report.main, tmp_path, "--out", tmp_path / "report.html")[0] == 0


def test_a_defended_model_without_a_gate_has_every_other_figure(tmp_path: Path, call: Call) -> None:
    """The defence is one model without parents, and the mixture a baseline."""
    make_up(tmp_path, build("digits", 0, ["defence=pgd-at", "baselines=dwf", "experts.fgsm=1", "experts.pgd=0"]), 50)
    (group,) = load(str(tmp_path)).groups
    assert (group.defended, group.experts) == ("pgd-at", ())
    drawn = figures.draw_all(FigureData(group, accuracies(group), read_predictions(group)))
    assert set(drawn) == {"fgsm", "pgd", "clean_and_robust", "training", "cost", "compute"} | OF_ANSWERS
    assert call(report.main, tmp_path, "--out", tmp_path / "report.html")[0] == 0


def test_a_users_own_model_has_a_report(tmp_path: Path, call: Call) -> None:
    """The tables of `dwf evaluate`: one model that was not trained, so that there are no metrics and no jobs."""
    folder = make_up(tmp_path, build("digits", 0, ["defence=own-model", "evaluation.beyond="]), 50)
    for table in ("metrics", "jobs"):
        shutil.rmtree(folder / "results" / table)
    (group,) = load(str(tmp_path)).groups
    drawn = figures.draw_all(FigureData(group, accuracies(group), read_predictions(group)))
    assert set(drawn) == {"fgsm", "pgd", "clean_and_robust"} | OF_ANSWERS
    status, printed, _ = call(tables.main, tmp_path)
    assert status == 0
    assert "parameters" not in printed  # of a network that no ModelSpec describes
    assert call(report.main, tmp_path, "--out", tmp_path / "report.html")[0] == 0


def test_the_same_figure_is_the_same_file(data: FigureData) -> None:
    for kind in ("svg", "pdf", "png"):
        files = [io.BytesIO(), io.BytesIO()]
        for file in files:
            figure = draw("fgsm", data)
            assert figure is not None
            figures.write(figure, file, kind)
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
