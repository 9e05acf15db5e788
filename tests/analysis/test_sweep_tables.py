"""The settings of a sweep: one column a threat model, means that leave seeds out, paired tests between settings."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from analysis import load
from analysis.formats import Table
from analysis.predictions import read_predictions
from analysis.statistics import paired
from analysis.sweep_tables import Setting, differences, overview, setting_tables
from analysis.tables import accuracies
from benchmarks.analysis import make_up
from dwf_cluster.presets import build

FEW = [
    "experts.fgsm=1",
    "experts.pgd=1",
    "evaluation.beyond=pgd_route",
    "evaluation.fgsm_epsilons=0.1",
    "evaluation.pgd_steps=5",
]
EXAMPLES = 60
VARIED = ("gate.kind=hard", "gate.kind=soft", "gate.kind=soft joint.epochs=2", "pgd.epsilon=0.1", "model.width=64")

Settings = dict[str, Setting]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Settings by their assignments, with seeds 0 and 1; that with two joint epochs has seed 0 only."""
    settings = {}
    folder = tmp_path_factory.mktemp("settings")
    for varied in VARIED:
        for seed in (0,) if "joint" in varied else (0, 1):
            make_up(folder / varied, build("digits", seed, [*FEW, *varied.split()]), EXAMPLES)
        (group,) = load(str(folder / varied)).groups
        settings[varied] = Setting.of(replace(group, title=varied), accuracies(group), read_predictions(group))
    return settings


def _with_worst_case(setting: Setting, share: float) -> Setting:
    """The setting with this share of images that withstand every attack, the same images with all seeds."""
    seeds = len(setting.group.seeds)
    worst = np.tile(np.arange(EXAMPLES) < share * EXAMPLES, (seeds, 1)).astype(np.int8)
    return replace(setting, correct={"clean": setting.correct["clean"], "worst_case": worst})


def _cells(table: Table | None) -> dict[str, list[str]]:
    assert table is not None
    return {label: list(cells) for label, cells in table.rows}


def test_settings_are_compared_on_the_same_seeds_and_images(settings: Settings) -> None:
    hard, soft = (
        _with_worst_case(settings[f"gate.kind={kind}"], share) for kind, share in (("hard", 0.1), ("soft", 0.9))
    )
    table = differences([hard, soft])
    clean = paired(hard.correct["clean"], soft.correct["clean"])
    ((label, (shown, worst)),) = _cells(table).items()
    assert label == "gate.kind=hard minus gate.kind=soft"
    numbers = (clean.difference, clean.low, clean.high)
    assert [float(part) for part in shown.replace(",", "").replace("[", "").replace("]", "").split()] == pytest.approx(
        [100 * number for number in numbers], abs=0.051
    )
    assert worst.startswith("-80.0 [")
    assert table is not None
    assert (0, 1) in table.bold
    assert "after Holm over 2 comparisons" in table.notes[0]


def test_a_setting_that_lacks_a_seed_is_incomplete_and_counts_in_the_correction(settings: Settings) -> None:
    table = differences([settings["gate.kind=soft"], settings["gate.kind=soft joint.epochs=2"]])
    assert list(_cells(table).values()) == [["incomplete", "incomplete"]]
    assert table is not None
    assert not table.bold
    assert "over 2 comparisons" in table.notes[0]
    assert any(note.startswith("Incomplete: ") for note in table.notes)


def test_an_image_that_was_not_tested_makes_a_pair_incomplete(settings: Settings) -> None:
    hard, soft = settings["gate.kind=hard"], settings["gate.kind=soft"]
    part = soft.correct["clean"].copy()
    part[1, 7] = -1
    (cells,) = _cells(differences([hard, replace(soft, correct={**soft.correct, "clean": part})])).values()
    assert cells[0] == "incomplete"


def test_a_hard_gate_without_worst_case_is_compared_on_clean_images_only(settings: Settings) -> None:
    """As in results of a version without `worst_case`."""
    hard, soft = (
        replace(setting, correct={"clean": setting.correct["clean"], "pgd_restarts": setting.correct["clean"]})
        for setting in (settings["gate.kind=hard"], settings["gate.kind=soft"])
    )
    table = differences([hard, soft])
    ((clean, attacked),) = _cells(table).values()
    assert attacked == "upper bound"
    assert clean.endswith("]")
    assert table is not None
    assert "over 1 comparisons" in table.notes[0]


def test_settings_under_different_threat_models_are_compared_on_clean_images_only(settings: Settings) -> None:
    table = differences([settings["gate.kind=soft"], settings["pgd.epsilon=0.1"]])
    ((clean, attacked),) = _cells(table).values()
    assert attacked == "other attack"
    assert clean.endswith("]")
    assert table is not None
    assert "over 1 comparisons" in table.notes[0]
    assert "evaluation.epsilon" in table.notes[-1]


def test_worst_cases_over_different_attacks_are_not_compared(settings: Settings) -> None:
    """At width 64 AutoAttack is one of the attacks, whatever the settings of the evaluation."""
    narrow, wide = (_with_worst_case(settings[name], 0.5) for name in ("gate.kind=soft", "model.width=64"))
    table = differences([narrow, wide])
    ((clean, worst),) = _cells(table).values()
    assert (clean[-1], worst) == ("]", "other attack")
    assert table is not None
    assert "evaluation.beyond" in table.notes[-1]


def test_no_difference_of_settings_with_one_seed_is_bold(settings: Settings) -> None:
    one, other = (
        replace(s, group=replace(s.group, runs=s.group.runs[:1]), correct={k: v[:1] for k, v in s.correct.items()})
        for s in (
            _with_worst_case(settings[f"gate.kind={kind}"], share) for kind, share in (("hard", 0.1), ("soft", 0.9))
        )
    )
    table = differences([one, other])
    assert table is not None
    assert not table.bold


def test_accuracies_under_different_threat_models_have_columns_of_their_own(settings: Settings) -> None:
    table = overview([settings["gate.kind=soft"], settings["pgd.epsilon=0.1"]])
    assert [below for above, below in table.heads if above == "pgd"] == ["longest @0.1", "longest @0.15"]
    pgd = [i for i, (above, _) in enumerate(table.heads) if above == "pgd"]
    shown = {label: [bool(cells[i]) for i in pgd] for label, cells in _cells(table).items()}
    assert shown == {"gate.kind=soft": [False, True], "pgd.epsilon=0.1": [True, False]}


def test_a_mean_that_leaves_seeds_out_says_so(settings: Settings, tmp_path: Path) -> None:
    for seed in (0, 1):
        folder = make_up(tmp_path, build("digits", seed, FEW), EXAMPLES)
    shutil.rmtree(folder / "results" / "evaluations")
    (group,) = load(str(tmp_path)).groups
    partial = Setting.of(group, accuracies(group), read_predictions(group))
    table = overview([partial, settings["pgd.epsilon=0.1"]])
    assert _cells(table)["digits"][1].endswith(" (1/2)")
    assert not _cells(table)["pgd.epsilon=0.1"][1].endswith(")")
    assert any("the mean leaves seeds out" in note for note in table.notes)


def test_the_columns_of_a_hard_gate_that_are_upper_bounds_are_named(settings: Settings) -> None:
    soft, other, hard = (settings[name] for name in ("gate.kind=soft", "pgd.epsilon=0.1", "gate.kind=hard"))
    (note,) = (note for note in overview([soft, hard]).notes if note.startswith("Upper bounds"))
    assert "gate.kind=hard," in note
    assert "gate.kind=soft" not in note
    assert not any(note.startswith("Upper bounds") for note in overview([soft, other]).notes)


def test_a_single_setting_has_no_tables(settings: Settings) -> None:
    assert setting_tables([settings["gate.kind=soft"]]) == []
