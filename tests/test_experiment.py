"""An Experiment is a frozen, validated value with a signature."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from dwf_cluster.experiment import PRESETS, Experiment, build, fields_of_an_experiment
from dwf_cluster.settings import InvalidInput

from .conftest import write_npz


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_a_round_trip_through_json(preset: str) -> None:
    experiment = build(preset)
    assert Experiment.from_json(experiment.to_json()) == experiment
    assert experiment.preset == preset


@pytest.mark.parametrize("preset", ["cifar10", "svhn"])
def test_the_papers_presets_have_the_papers_scale(preset: str) -> None:
    experiment = build(preset)
    assert experiment.model.width == 64
    assert [regime.name for regime in experiment.mixture_regimes] == [
        "benign",
        *(f"fgsm-{i}" for i in range(1, 5)),
        *(f"pgd-{i}" for i in range(1, 5)),
    ]
    assert experiment.fgsm.epsilons == (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)
    assert experiment.pgd.steps == (10, 20, 30, 40, 50)
    assert experiment.data.flip is (preset == "cifar10")


def test_the_papers_baselines_are_two_more_regimes_outside_the_mixture() -> None:
    experiment = build("cifar10")
    baselines = set(experiment.regimes) - set(experiment.mixture_regimes)
    assert {(r.name, r.attack, r.fraction) for r in baselines} == {("fgsm-at", "fgsm", 0.5), ("pgd-at", "pgd", 0.5)}


def test_it_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        build("digits").seed = 1  # type: ignore[misc]


def test_signature_follows_every_field_and_nothing_else() -> None:
    base = build("digits")
    assert build("digits", 0, ["experts.epochs=4"]).signature == base.signature
    signatures = {
        build("digits", seed, change).signature
        for seed, change in [(0, []), (1, []), (0, ["experts.epochs=5"]), (0, ["pgd.epsilon=0.1"])]
    }
    assert len(signatures) == 4
    assert base.folder == f"digits-seed0-{base.signature}"


def test_signature_of_own_images_follows_their_content_not_their_path(tmp_path: Path) -> None:
    here, there = write_npz(tmp_path / "a.npz"), tmp_path / "sub" / "a.npz"
    there.parent.mkdir()
    there.write_bytes(here.read_bytes())
    assert build(str(here)).signature == build(str(there)).signature
    write_npz(there, y_test=(np.arange(16) + 1) % 3)
    assert build(str(here)).signature != build(str(there)).signature


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("fgsm.epsilons=0.1,0.2", (0.1, 0.2)),
        ("fgsm.epsilons=[0.1,0.2]", (0.1, 0.2)),
        ("fgsm.epsilons=0.1", (0.1,)),
        ("pgd.steps=7", (7,)),
        ("data.train_examples=null", None),
        ("data.mean=null", None),
        ("baselines=fgsm-at,pgd-at", ("fgsm-at", "pgd-at")),
        ("experts.learning_rate=1", 1.0),
        ("data.source=cifar10", "cifar10"),
    ],
)
def test_set_reads_json_bare_words_and_numbers_with_commas(assignment: str, value: object) -> None:
    part: object = build("digits", 0, [assignment])
    for name in assignment.partition("=")[0].split("."):
        part = getattr(part, name)
    assert part == value


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("experts.epoch=5", "experts.epoch: no such field; did you mean experts.epochs?"),
        ("nonsense=1", "nonsense: no such field"),
        ("experts=3", "experts: no such field"),
        ("experts.epochs", "--set: 'experts.epochs' is not of the form"),
        ("experts.epochs=1.5", "experts.epochs: 1.5 cannot be used: Input should be a valid integer"),
        ("experts.epochs=0", "experts.epochs: 0 cannot be used: Input should be greater than or equal to 1"),
        ("experts.epochs=many", "experts.epochs: 'many' cannot be used"),
        ("experts.epochs=true", "experts.epochs: True cannot be used"),
        ("experts.momentum=1", "experts.momentum: 1 cannot be used: Input should be less than 1"),
        ("pgd.epsilon=NaN", "pgd.epsilon: nan cannot be used"),
        ("pgd.epsilon=1e999", "pgd.epsilon: inf cannot be used"),
        ("pgd.epsilon=1.5", "pgd.epsilon: 1.5 cannot be used: Input should be less than or equal to 1"),
        ("fgsm.epsilons=[]", "fgsm.epsilons: [] cannot be used"),
        ("fgsm.epsilons=a,b", "fgsm.epsilons.0: 'a' cannot be used"),
        ("pgd.steps=3,0", "pgd.steps.1: 0 cannot be used"),
        ("data.flip=1", "data.flip: 1 cannot be used"),
        ("data.source=mnist", "data.source: 'mnist' cannot be used: one of digits, fashion-mnist"),
        ("data.source=gone.npz", "data.source: 'gone.npz' cannot be read: No such file"),
        ("data.mean=0.1,0.2", "data: mean and std need the same number of channels"),
        ("baselines=trades", "baselines.0: 'trades' cannot be used: Input should be 'fgsm-at' or 'pgd-at'"),
        ("preset=../../etc", "preset: '../../etc' cannot be used"),
        ("seed=-1", "seed: -1 cannot be used"),
    ],
)
def test_a_bad_value_is_answered_with_field_value_and_what_is_allowed(assignment: str, message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        build("digits", None, [assignment])
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_mixture_needs_an_expert() -> None:
    with pytest.raises(InvalidInput, match="at least one expert"):
        build("digits", 0, ["experts.benign=0", "experts.fgsm=0", "experts.pgd=0"])


def test_an_unknown_field_in_json_is_named() -> None:
    fields = json.loads(build("digits").to_json())
    fields["experts"]["colour"] = "red"
    with pytest.raises(InvalidInput, match=r"^experts\.colour: no such field"):
        Experiment.from_json(json.dumps(fields))


def test_every_field_says_what_it_means() -> None:
    assert [field.name for field in fields_of_an_experiment() if not field.meaning] == []


def test_fields_that_came_later_leave_the_signatures_of_before(tmp_path: Path) -> None:
    """Results of the first version are found by its signature."""
    assert build("digits").folder == "digits-seed0-ce2d226613"
    for changed in ("gate.kind=hard", "joint.freeze_experts=true"):
        assert build("digits", 0, [changed]).signature != build("digits").signature


def test_an_experts_signature_follows_what_trains_it() -> None:
    def changed(*assignments: str) -> set[str]:
        both = "baselines=fgsm-at,pgd-at"
        base, other = build("digits", None, [both]), build("digits", None, [both, *assignments])
        return {
            regime.name
            for regime in base.regimes
            if base.expert_signature(regime.name) != other.expert_signature(regime.name)
        }

    every = {regime.name for regime in build("digits", 0, ["baselines=fgsm-at,pgd-at"]).regimes}
    pgd, fgsm = ({f"{kind}-{n}" for n in range(1, 5)} for kind in ("pgd", "fgsm"))
    assert changed("pgd.steps=3") == pgd
    assert changed("fgsm.epsilons=0.1") == fgsm
    for nothing in ("joint.epochs=3", "gate.hidden=5", "experts.benign=1", "preset=other", "checkpoint_minutes=1"):
        assert changed(nothing) == set()
    for all_of_them in ("seed=3", "experts.epochs=9", "model.width=16", "data.flip=true", "pgd.step_size=0.1"):
        assert changed(all_of_them) == every
    assert changed("evaluation.probe_steps=3") == every  # the probe is in their rows of metrics
    assert changed("evaluation.restarts=9") == set()
    assert len({build("digits").expert_signature(name) for name in ("fgsm-1", "fgsm-2", "pgd-1")}) == 3
