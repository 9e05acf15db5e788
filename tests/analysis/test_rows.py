"""Every row of the paper's table 3: its group, its place, its size and cost, the paper's cells, and its look."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from analysis import Group, drawing, load, paper
from analysis.accuracies import equivalent_epsilon
from analysis.cost import costs
from analysis.figures import FigureData, draw
from analysis.formats import Table, text
from analysis.paper_tables import equivalents
from analysis.predictions import Predictions, read_predictions
from analysis.statistics import comparisons
from analysis.tables import accuracies, table3
from benchmarks.analysis import make_up
from dwf_cluster.defences import registry
from dwf_cluster.defences.registry import METHODS, ModelSpec, single
from dwf_cluster.defences.rows import PAPER_BACKBONES, rows
from dwf_cluster.defences.settings import DefenceSettings
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.registry import BACKBONES
from dwf_cluster.presets import build

PLAIN = [name for name in PAPER_BACKBONES if name not in ("resnet18", "densenet121")]
EXPERTS = ["experts.fgsm=1", "experts.pgd=1", "evaluation.beyond="]
ROWS = [*reversed(PLAIN), "advmoe", "soe", "controls", "resnet18-wide", "ensemble", "pgd-at", "fgsm-at"]


def _attribute(name: str) -> str:
    return f"recipe_{name.replace('-', '_')}"


def _plain(name: str) -> Callable[[DefenceSettings], tuple[ModelSpec, ...]]:
    return lambda settings: (replace(single(name, "standard", settings), backbone=name),)


def _wide(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    return (replace(single("resnet18-wide", "standard", settings), width=3 * settings.model.width),)


def _ensemble(settings: DefenceSettings) -> tuple[ModelSpec, ...]:
    members = [single(f"member-{i}", "pgd", settings, steps=(10,), fraction=0.5) for i in (1, 2)]
    whole = replace(members[0], name="ensemble", method="uniform", options=(), parents=("member-1", "member-2"))
    return (*members, whole)


@pytest.fixture(scope="module", autouse=True)
def _every_row() -> Iterator[None]:
    """Stand-ins for rows, so that neither their networks nor their methods have to exist."""
    module = sys.modules[__name__]
    stand_in = replace(
        BACKBONES["resnet18"], flops=lambda width, shape: 2e8, parameters=lambda width, channels, classes: 1_234_567
    )
    mixture = replace(METHODS["pgd"], group="mixture")
    recipes = {name: _plain(name) for name in [*PLAIN, "resnet18"]}
    recipes |= {name: lambda settings, name=name: (single(name, name, settings),) for name in ("soe", "advmoe")}
    recipes |= {"resnet18-wide": _wide, "ensemble": _ensemble}
    with (
        mock.patch.dict(BACKBONES, dict.fromkeys(PLAIN, stand_in)),
        mock.patch.dict(METHODS, {"soe": mixture, "advmoe": mixture}),
        mock.patch.dict(registry.DEFENCES, {name: f"{__name__}:{_attribute(name)}" for name in recipes}),
        mock.patch.dict(module.__dict__, {_attribute(name): function for name, function in recipes.items()}),
    ):
        yield


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return build("cifar10", 0, [*EXPERTS, f"baselines={','.join(ROWS)}"])


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory, experiment: Experiment) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    make_up(folder, experiment, 40)
    return folder


@pytest.fixture(scope="module")
def group(storage: Path) -> Group:
    return load(str(storage)).groups[0]


@pytest.fixture(scope="module")
def data(group: Group) -> FigureData:
    return FigureData(group, accuracies(group), Predictions({}, {}))


def test_rows_stand_in_the_papers_order_and_groups(group: Group) -> None:
    plain = [PLAIN[0], "benign", *PLAIN[1:]]  # the benign expert is the paper's ResNet-18
    assert group.sections == {
        "plain networks": tuple(plain),
        "adversarially trained": ("fgsm-at", "pgd-at"),
        "mixtures": ("soe", "advmoe", "mixture"),
        "controls": (
            *("resnet18-wide", "uniform", "joint-uniform", "ensemble"),
            *("joint-benign", "joint-fgsm-1", "joint-pgd-1"),
        ),
        "experts of mixture": ("fgsm-1", "pgd-1"),
        "experts of ensemble": ("member-1", "member-2"),
    }


def test_a_plain_resnet18_takes_the_place_of_the_benign_expert() -> None:
    experiment = build("cifar10", 0, [*EXPERTS, "baselines=resnet18"])
    groups = {heading: [spec.name for spec in specs] for heading, specs in rows(experiment.models).items()}
    assert groups["plain networks"] == ["resnet18"]
    assert groups["experts of mixture"] == ["benign", "fgsm-1", "pgd-1"]
    assert paper.names(experiment) == {"resnet18": "ResNet-18", "mixture": "DWF"}


def test_the_defended_model_is_the_last_of_its_group() -> None:
    experiment = build("cifar10", 0, ["defence=fgsm-at", "baselines=pgd-at"])
    groups = {heading: [spec.name for spec in specs] for heading, specs in rows(experiment.models).items()}
    assert groups == {"adversarially trained": ["pgd-at", "fgsm-at"]}


def test_a_defended_model_that_a_control_starts_from_stays_among_its_like() -> None:
    defended = build("cifar10", 0, ["defence=pgd-at", "baselines="]).defended
    control = replace(defended, name="mean", method="uniform", parents=("pgd-at",))
    assert rows([control, defended]) == {"adversarially trained": (defended,), "controls": (control,)}


def test_given_weights_of_another_width_are_no_control(experiment: Experiment) -> None:
    weights = replace(experiment.spec("benign"), name="mine", method="weights", width=16)
    groups = rows([weights, *experiment.models])
    assert groups["given weights"] == (weights,)


def test_an_expert_that_is_a_baseline_too_stays_among_its_like(experiment: Experiment) -> None:
    specs = experiment.models
    shared = tuple(replace(s, parents=("pgd-at", *s.parents)) if s.name == "ensemble" else s for s in specs)
    groups = rows(shared, experiment.baselines)
    assert [spec.name for spec in groups["adversarially trained"]] == ["fgsm-at", "pgd-at"]
    assert [spec.name for spec in groups["experts of ensemble"]] == ["member-1", "member-2"]


def test_every_row_of_the_paper_has_its_name(experiment: Experiment) -> None:
    names = paper.names(experiment)
    in_paper = set(paper.cells().model)
    assert set(names.values()) == in_paper
    assert names["benign"] == "ResNet-18"
    assert names["pgd-at"] == "ResNet-18 (PGD-AT)"  # not a member of the ensemble, which is trained alike
    assert names["densenet121-k12"] == "DenseNet-121"
    assert set(paper.RECIPES.values()) == in_paper


def test_a_mixture_of_other_backbones_is_not_the_papers() -> None:
    experiment = build("cifar10", 0, [*EXPERTS, "baselines=pgd-at", "model.backbone=vgg19"])
    assert paper.names(experiment) == {"benign": "VGG-19"}


def test_a_legend_has_the_papers_names(experiment: Experiment) -> None:
    names = paper.names(experiment)
    labels = [paper.legend(names, model) for model in ("vgg19", "benign", "fgsm-at", "mixture", "pgd-1")]
    assert labels == ["VGG-19", "ResNet-18 (benign)", "ResNet-18 (FGSM-AT)", "DWF (mixture)", "pgd-1"]


def test_the_papers_cells_stand_beside_every_row_that_it_has(group: Group, data: FigureData) -> None:
    beside = {row.model for row in data.measured[data.measured.paper.notna()].itertuples()}
    only_svhn = {"resnet34", "densenet121-k12"}
    assert beside == set(paper.names(group.experiment)) - only_svhn


def test_the_cost_of_a_model_is_that_of_all_it_starts_from(experiment: Experiment) -> None:
    found = costs(experiment)
    images, epochs = 50_000, experiment.experts.epochs
    benign, fgsm, pgd = (found[name].passes for name in ("benign", "fgsm-1", "pgd-1"))
    assert benign == epochs * images * 3
    assert fgsm == epochs * images * 5
    mixture = experiment.defended
    joint = mixture.training.epochs * images * METHODS["dwf"].passes(mixture)
    assert found["mixture"].passes == pytest.approx(joint + benign + fgsm + pgd)
    assert found["joint-uniform"].passes == found["joint-benign"].passes == found["mixture"].passes  # counted once
    assert found["uniform"].passes == pytest.approx(benign + fgsm + pgd)
    assert found["benign"].macs == BACKBONES["resnet18"].flops(64, (3, 32, 32)) / 2
    assert found["uniform"].parameters == 3 * found["benign"].parameters
    assert found["vgg19"].flops == pytest.approx(benign * 2e8)


def test_size_and_cost_stand_beside_the_accuracies(group: Group, data: FigureData) -> None:
    table = table3(group, data.measured, comparisons(group, read_predictions(group)))
    assert [" ".join(head) for head in table.heads[-4:]] == [
        *("parameters million", "MACs million", "passes million", "TFLOP training"),
    ]
    million_passes = group.experiment.experts.epochs * 0.05 * 3
    tera_flop = million_passes * 1e6 * 2e8 / 1e12
    assert dict(table.rows)["vgg19"][-4:] == ["1.23", "100", f"{million_passes:.3g}", f"{tera_flop:.0f}"]


@pytest.mark.parametrize(
    ("accuracy", "epsilon"), [(0.9, 0.0), (0.7, 0.01), (0.6, 0.015), (0.45, 0.025), (0.3, math.nan), (0.95, math.nan)]
)
def test_the_equivalent_epsilon_is_where_the_curve_falls_to_the_accuracy(accuracy: float, epsilon: float) -> None:
    curve = [(0.02, 0.5), (0.0, 0.9), (0.03, 0.4), (0.01, 0.7)]
    assert equivalent_epsilon(curve, accuracy) == pytest.approx(epsilon, nan_ok=True)


def test_the_equivalent_epsilon_of_an_accuracy_that_fgsm_leaves_twice_is_the_first() -> None:
    assert equivalent_epsilon([(0.0, 0.9), (0.01, 0.4), (0.02, 0.8), (0.03, 0.2)], 0.5) == pytest.approx(0.008)


def test_the_papers_equivalent_epsilons_are_those_of_its_cells(group: Group, data: FigureData) -> None:
    """The figures were computed by hand, from the paper's table: at PGD-50."""
    table = equivalents(group, data.measured)
    assert table is not None
    column = table.heads.index(("pgd", "50"))
    shown = {label: cells[column] for label, cells in table.rows}
    expected = {"ResNet-18 (PGD-AT)": 0.0226, "ResNet-18 (FGSM-AT)": 0.0249, "SoE": 0.0266, "DWF": 0.0486}
    for name, epsilon in expected.items():
        assert float(shown[f"paper: {name}"]) == pytest.approx(epsilon, abs=6e-5)
    assert table.groups[0] == "plain networks"
    labels = [label for label, _ in table.rows]
    assert labels[labels.index("soe") + 1] == "paper: SoE"


def test_the_heading_of_a_group_is_in_the_rule_above_it() -> None:
    table = Table("title", [("clean", "")], [("a", ["1"]), ("b", ["2"])], groups={0: "first", 1: "second"})
    lines = text(table).splitlines()
    assert [line.strip("─ ").split() for line in lines[2:]] == [["first"], ["a", "1"], ["second"], ["b", "2"], []]
    assert len({len(line) for line in lines[1:]}) == 1


def test_every_method_has_a_colour_of_its_own() -> None:
    assert len({drawing.method_colour(method) for method in METHODS}) == len(METHODS)


def test_rows_of_one_method_share_a_colour_whatever_their_names(group: Group) -> None:
    colours = drawing.model_colours(group)
    grey = [colours[name] for name in (*PLAIN, "benign")]
    assert all(len(set(re.findall("..", colour[1:]))) == 1 for colour in grey)  # shades of black
    assert len(set(grey)) == len(grey)
    assert colours["mixture"] == drawing.DEFENDED
    assert len({colours[name] for name in ("soe", "advmoe", "mixture", "benign", "pgd-at", "fgsm-at")}) == 6


@pytest.mark.parametrize("name", ["fgsm", "pgd"])
def test_many_rows_have_a_panel_for_each_group_with_the_defended_model_in_each(
    group: Group, data: FigureData, name: str
) -> None:
    figure = draw(name, data)
    assert figure is not None
    assert len(figure.axes) == len(group.sections)
    for axes, (heading, models) in zip(figure.axes, group.sections.items(), strict=True):
        labels = {str(line.get_label()) for line in axes.lines} - {"paper's DWF"}
        assert axes.get_title().endswith(heading)
        assert labels == {paper.legend(paper.names(group.experiment), model) for model in {*models, "mixture"}}


def test_the_figure_of_compute_shows_every_row_at_its_cost(group: Group, data: FigureData) -> None:
    figure = draw("compute", data)
    assert figure is not None
    found = costs(group.experiment)
    points = {str(line.get_label()): line for line in figure.axes[0].containers}
    assert set(points) == {paper.legend(paper.names(group.experiment), model) for model in group.models}
    (x,) = np.asarray(points["DWF (mixture)"][0].get_xdata())
    assert x == pytest.approx(found["mixture"].flops / 1e12)
