"""An Experiment is a frozen, validated value with a signature."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from dwf_cluster.defences.registry import METHODS, recipe_names
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.registry import BACKBONES
from dwf_cluster.presets import PRESETS, build, fields_of_an_experiment
from dwf_cluster.settings import InvalidInput

from .conftest import TINY, write_npz


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_a_round_trip_through_json(preset: str) -> None:
    experiment = build(preset)
    assert Experiment.from_json(experiment.to_json()) == experiment
    assert experiment.preset == preset


@pytest.mark.parametrize("preset", ["cifar10", "svhn"])
def test_the_papers_presets_have_the_papers_scale(preset: str) -> None:
    experiment = build(preset)
    assert experiment.model.width == 64
    assert list(experiment.defended.parents) == [
        "benign",
        *(f"fgsm-{i}" for i in range(1, 5)),
        *(f"pgd-{i}" for i in range(1, 5)),
    ]
    assert experiment.fgsm.epsilons == (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)
    assert experiment.pgd.steps == (10, 20, 30, 40, 50)
    assert experiment.data.flip is (preset == "cifar10")


def test_the_papers_baselines_are_two_more_models_outside_the_mixture() -> None:
    experiment = build("cifar10")
    experts = experiment.defended.parents
    assert experiment.names == (*experts, "fgsm-at", "pgd-at", "mixture")
    baselines = [experiment.spec(name) for name in ("fgsm-at", "pgd-at")]
    assert [(spec.name, spec.method, spec.option("fraction")) for spec in baselines] == [
        ("fgsm-at", "fgsm", 0.5),
        ("pgd-at", "pgd", 0.5),
    ]
    assert baselines[0].option("epsilons") == (experiment.pgd.epsilon,)
    assert baselines[1].option("steps") == (10,)


def test_every_defence_and_every_method_without_parents_can_be_a_baseline_or_the_defence() -> None:
    # `controls` trains nothing, and `pgd-ensemble` several models.
    others = ("dwf", "controls", "pgd-ensemble", *BACKBONES)
    names = [name for name in recipe_names() if name not in others]
    with_recipes = ["fgsm-at", "pgd-at", "pgd-at-matched", "advmoe", "advmoe-wide", "free", "resnet18-wide"]
    methods = ["standard", "fgsm", "pgd", "trades", "fgsm-rs", "n-fgsm", "random-at", "soe"]
    assert names == [*with_recipes, *methods]
    experiment = build("digits", 0, [f"baselines={','.join(names)}"])
    assert experiment.names == (
        "benign",
        *(f"{kind}-{n}" for kind in ("fgsm", "pgd") for n in range(1, 5)),
        *names,
        "mixture",
    )
    for name in names:
        spec = experiment.spec(name)
        training = experiment.experts.of_a_model
        epochs = spec.training.epochs if name in ("pgd-at-matched", "resnet18-wide", "free") else training.epochs
        assert (spec.parents, spec.training) == ((), training.model_copy(update={"epochs": epochs}))
        alone = build("digits", 0, [f"defence={name}"])
        assert alone.models == (alone.defended,) == (spec,)


def test_a_whole_defence_can_be_the_baseline_of_another() -> None:
    experiment = build("digits", 0, [*TINY, "defence=pgd-at", "baselines=dwf"])
    assert experiment.names == ("benign", "fgsm-1", "pgd-1", "mixture", "pgd-at")
    assert experiment.defended.name == "pgd-at"


@pytest.mark.parametrize(
    ("assignments", "name"),
    [
        (["baselines=pgd-at,pgd-at"], "pgd-at"),
        (["defence=pgd", "baselines=pgd"], "pgd"),
        (["baselines=dwf"], "benign"),
    ],
)
def test_two_models_of_the_same_name_are_refused(assignments: list[str], name: str) -> None:
    with pytest.raises(InvalidInput) as error:
        build("digits", 0, assignments)
    assert str(error.value) == f"experiment: defence and baselines give two models the name {name!r}: allowed is one"


def test_a_method_that_needs_parents_is_refused_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "merge", METHODS["dwf"])  # type: ignore[arg-type]
    for field in ("defence", "baselines.0"):
        with pytest.raises(InvalidInput) as error:
            build("digits", 0, [f"{field.removesuffix('.0')}=merge"])
        assert str(error.value) == (f"{field}: 'merge' cannot be used: allowed are {', '.join(recipe_names())}")


def test_an_experiment_cannot_be_changed() -> None:
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
        ("baselines=nonsense", "baselines.0: 'nonsense' cannot be used: allowed are dwf, fgsm-at, pgd-at"),
        ("preset=../../etc", "preset: '../../etc' cannot be used"),
        ("seed=-1", "seed: -1 cannot be used"),
    ],
)
def test_the_error_for_a_bad_value_names_field_value_and_allowed_values(assignment: str, message: str) -> None:
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


def test_every_field_has_a_description() -> None:
    assert [field.name for field in fields_of_an_experiment() if not field.meaning] == []


SIGNATURES = [
    ("digits", 0, [], "ce2d226613"),
    ("fashion-mnist", 0, [], "37a9b88532"),
    ("cifar10", 0, [], "8fad623896"),
    ("svhn", 0, [], "e4503d464c"),
    ("digits", 3, [], "8966b66b8a"),
    ("digits", 3, ["checkpoint_minutes=1"], "8966b66b8a"),
    ("digits", 3, ["gate.kind=soft", "joint.freeze_experts=false", "defence=dwf"], "8966b66b8a"),
    ("digits", 3, ["gate.kind=hard"], "be45a8a4af"),
    ("digits", 3, ["joint.freeze_experts=true"], "8422670cb2"),
    ("digits", 3, ["experts.epochs=5"], "ebc58ceab0"),
    ("digits", 3, ["baselines=fgsm-at"], "0fde7255d9"),
    ("digits", 3, ["baselines=pgd-at,fgsm-at"], "d902bd5a1f"),
    ("cifar10", 3, ["baselines=[]"], "37945b98d1"),
    ("digits", 3, ["pgd.epsilon=0.1", "fgsm.epsilons=0.1,0.2"], "f4ce82a63a"),
    ("cifar10", 3, ["model.width=16", "data.train_examples=1000"], "d56160a427"),
    ("digits", 3, ["evaluation.beyond=pgd_gate,autoattack,noise", "evaluation.restarts=2"], "fe54c7f6af"),
    ("svhn", 3, ["joint.accumulation=4", "gate.hidden=64"], "4aa8788a16"),
    ("digits", 3, ["data.mean=null", "data.padding=2", "experts.momentum=0.5"], "68b8237e40"),
]
"""As computed by version 7b2e8cc: finished experiments are found by their signatures."""


@pytest.mark.parametrize(("preset", "seed", "assignments", "signature"), SIGNATURES)
def test_signatures_are_those_of_earlier_versions(
    preset: str, seed: int, assignments: list[str], signature: str
) -> None:
    assert build(preset, seed, assignments).folder == f"{preset}-seed{seed}-{signature}"


def test_fields_that_were_added_later_change_the_signature_if_they_are_set() -> None:
    changes = ([], ["gate.kind=hard"], ["joint.freeze_experts=true"], ["defence=pgd-at"])
    assert len({build("digits", 0, change).signature for change in changes}) == len(changes)


def test_a_models_signature_follows_the_settings_that_train_it() -> None:
    both = "baselines=fgsm-at,pgd-at"

    def changed(*assignments: str) -> set[str]:
        base, other = build("digits", None, [both]), build("digits", None, [both, *assignments])
        names = (spec.name for spec in base.models if not spec.parents)
        return {name for name in names if base.model_signature(name) != other.model_signature(name)}

    every = {spec.name for spec in build("digits", 0, [both]).models if not spec.parents}
    pgd, fgsm = ({f"{kind}-{n}" for n in range(1, 5)} for kind in ("pgd", "fgsm"))
    assert changed("pgd.steps=3") == pgd
    assert changed("fgsm.epsilons=0.1") == fgsm
    for nothing in ("joint.epochs=3", "gate.hidden=5", "experts.benign=1", "preset=other", "checkpoint_minutes=1"):
        assert changed(nothing) == set()
    for all_models in ("seed=3", "experts.epochs=9", "model.width=16", "data.flip=true", "pgd.step_size=0.1"):
        assert changed(all_models) == every
    assert changed("evaluation.probe_steps=3") == every  # the probe is in their rows of metrics
    assert changed("evaluation.restarts=9") == set()
    assert len({build("digits").model_signature(name) for name in ("fgsm-1", "fgsm-2", "pgd-1")}) == 3


ASSUMED = {
    "advmoe.router_learning_rate",
    "advmoe.router",
    "advmoe.router_objective",
    "baselines",
    "data.padding",
    "data.mean",
    "data.std",
    "data.crop_padding",
    "data.flip",
    "gate.hidden",
    "gate.learning_rate",
    "gate.weight_decay",
    "fgsm.epsilons",
    "fgsm.draw",
    "pgd.epsilon",
    "pgd.step_size",
    "pgd.step_sizes",
    "pgd.random_start",
    *(
        f"{stage}.{name}"
        for stage in ("experts", "joint")
        for name in (
            "epochs",
            "learning_rate",
            "batch_size",
            "weight_decay",
            "momentum",
            "attack_batchnorm",
            "keep",
            "precision",
        )
    ),
    "evaluation.random_start",
    "evaluation.restarts",
    "evaluation.targets",
    "evaluation.corruption_severities",
    "evaluation.curve_multiples",
}
"""Fields whose value the paper's text does not show or does not decide, and those that our columns add."""


def test_every_field_that_the_paper_leaves_open_says_so_in_the_same_words() -> None:
    meanings = {field.name: field.meaning for field in fields_of_an_experiment()}
    assert {name for name, meaning in meanings.items() if "Our assumption: " in meaning} == ASSUMED
    assert {name for name, meaning in meanings.items() if "assum" in meaning.lower()} == ASSUMED


def test_a_users_own_model_keeps_the_name_that_earlier_versions_have_stored() -> None:
    own = build("digits", 0, ["defence=own-model"])
    stored = own.to_json()
    assert json.loads(stored)["defence"] == "given"
    assert Experiment.from_json(stored) == own
    assert own.folder == "digits-seed0-c577b18833"
    assert own.defended.method == "own-model"
    assert "own-model" not in recipe_names()
