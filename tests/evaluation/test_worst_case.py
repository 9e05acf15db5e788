"""The worst case over a model's attacks: which count, how predictions are combined, when the merge writes it."""

from __future__ import annotations

import shutil
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dwf_cluster.data.registry import Sizes
from dwf_cluster.evaluation import merge
from dwf_cluster.evaluation.registry import CHECKS
from dwf_cluster.evaluation.settings import Threat
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline import stages
from dwf_cluster.plan.jobs import EVALUATE, jobs
from dwf_cluster.presets import build
from dwf_cluster.store import Store, tables

from ..conftest import TINY

THREAT = Threat(0.15, 0.04)
LARGER = Threat(0.3, 0.08)
WORST = "evaluate-benign-worst_case"
SIZES = Sizes(96, 40, (1, 8, 8))


def _row(attack: str, example: int, prediction: int, margin: float, **changed: Any) -> dict[str, Any]:
    """A row of `predictions`; the true label is 0."""
    row = {"model": "benign", "attack": attack, "norm": "linf", "epsilon": THREAT.epsilon, "example": example}
    return row | {"label": 0, "prediction": prediction, "margin": margin, "confidence": 0.5} | changed


def _combined(rows: list[dict[str, Any]], *threats: Threat) -> list[dict[str, Any]]:
    """The worst cases of `benign`, from files with these rows; shards have no perturbation."""
    predictions = tables.SCHEMAS["predictions"].empty_table().from_pylist(rows, schema=tables.SCHEMAS["predictions"])
    shards = tables.SCHEMAS["shards"].empty_table()
    _, worst = merge.worst_case_rows(shards, predictions, "benign", threats or (THREAT,))
    return worst


def test_an_image_has_the_first_attack_that_fools_it_else_the_smallest_margin() -> None:
    rows = [_row("clean", example, 0, 3.0, norm=None, epsilon=None) for example in range(2)]
    rows += [_row("pgd", 0, 4, -0.5, confidence=0.75), _row("pgd", 1, 0, 0.5, confidence=0.25)]
    rows += [_row("apgd", 0, 5, -2.0), _row("apgd", 1, 0, 1.0)]
    first, second = _combined(rows)
    assert (first["example"], first["prediction"], first["margin"], first["confidence"]) == (0, 4, -0.5, 0.75)
    assert (second["example"], second["prediction"], second["margin"], second["confidence"]) == (1, 0, 0.5, 0.25)
    assert {(row["attack"], row["norm"], row["epsilon"], row["steps"]) for row in (first, second)} == {
        ("worst_case", "linf", THREAT.epsilon, None)
    }


@pytest.mark.parametrize(
    "fooling",
    [
        {"epsilon": 0.1501},
        {"norm": "l2"},
        {"attack": "curve_epsilon"},
        {"attack": "expert_transfer_pgd-1", "source": "pgd-1"},
        {"attack": "corruption", "norm": None, "epsilon": None},
        {"model": "pgd-1"},
    ],
    ids=["larger-epsilon", "other-norm", "curve", "expert", "corruption", "other-model"],
)
def test_an_attack_outside_the_threat_model_does_not_count(fooling: dict[str, Any]) -> None:
    resisted = _row("clean", 0, 0, 3.0, norm=None, epsilon=None)
    (row,) = _combined([resisted, _row("pgd", 0, 7, -1.0) | fooling])
    assert (row["prediction"], row["margin"]) == (0, 3.0)


@pytest.mark.parametrize("attack", ["fgsm", "transfer", "noise"])
def test_a_weaker_attack_and_images_of_other_models_count(attack: str) -> None:
    (row,) = _combined([_row("pgd", 0, 0, 3.0), _row(attack, 0, 7, -1.0, epsilon=0.05, source="pgd-1")])
    assert (row["prediction"], row["source"]) == (7, None)


def test_each_threat_model_has_its_own_worst_case() -> None:
    rows = [_row("pgd", 0, 0, 3.0), _row("pgd", 0, 7, -1.0, epsilon=LARGER.epsilon)]
    smaller, larger = _combined(rows, THREAT, LARGER)
    assert (smaller["epsilon"], smaller["prediction"]) == (THREAT.epsilon, 0)
    assert (larger["epsilon"], larger["prediction"]) == (LARGER.epsilon, 7)


def test_an_attack_on_the_first_images_counts_for_these() -> None:
    rows = [*(_row("pgd", example, 0, 3.0) for example in range(3)), _row("autoattack", 0, 7, -1.0)]
    assert [row["prediction"] for row in _combined(rows)] == [7, 0, 0]


# -------------------------------------------------------------------------------------- written by the merge


EXPERIMENT = build("digits", 0, [*TINY, "evaluation.epsilon=0.1,0.2"])


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with made-up results of every attack, not merged."""
    folder = tmp_path_factory.mktemp("filled")
    _fill(EXPERIMENT.store(str(folder)), EXPERIMENT)
    return folder


@pytest.fixture
def experiment() -> Experiment:
    return EXPERIMENT


@pytest.fixture
def store(filled: Path, tmp_path: Path) -> Store:
    shutil.copytree(filled, tmp_path / "runs")
    return EXPERIMENT.store(str(tmp_path / "runs"))


def _fill(store: Store, experiment: Experiment) -> None:
    """Made-up results of every attack: model, attack and image decide whether it fools."""
    for job in jobs(experiment, EVALUATE, SIZES):
        if job.suite == CHECKS:
            continue
        models = experiment.names if job.tests_transfer else (job.model,)
        shards, predictions = [], []
        for model in models:
            kind = "transfer" if model != job.model else str(job.suite)
            source = job.model if model != job.model else None
            for epsilon in (0.05, 0.1, 0.2, 0.3):
                key = {"model": model, "attack": kind, "source": source, "norm": "linf", "epsilon": epsilon}
                examples = range(job.first, job.stop)
                fooled = [zlib.crc32(f"{model} {kind} {source} {epsilon} {e}".encode()) % 17 == 0 for e in examples]
                predictions += [
                    {**key, "example": e, "label": 1, "prediction": 1 + f, "margin": 0.5 - f, "confidence": 0.5}
                    for e, f in zip(examples, fooled, strict=True)
                ]
                counts = {"examples": len(fooled), "correct": fooled.count(False), "perturbation": epsilon}
                shards.append(
                    {**key, "family": job.suite, "first": job.first, **counts, "gradients": 1, "seconds": 1.0}
                )
        tables.write(store, "predictions", job.file, predictions)
        tables.write(store, "shards", job.file, shards)


def _merge(store: Store, experiment: Experiment) -> None:
    stages._merge({experiment: store}, SIZES)


def _worst(store: Store) -> pd.DataFrame:
    frame = tables.read(store, "evaluations").to_pandas()
    return frame[frame.attack == "worst_case"].set_index(["model", "epsilon"]).sort_index()


def test_the_merge_writes_the_slow_ways_worst_case_of_every_model_and_threat_model(
    store: Store, experiment: Experiment
) -> None:
    _merge(store, experiment)
    predictions = tables.read(store, "predictions").to_pandas()
    worst = _worst(store)
    assert len(worst) == len(experiment.names) * len(experiment.threats)
    for (model, epsilon), row in worst.iterrows():
        own = predictions[(predictions.model == model) & (predictions.attack != "worst_case")]
        within = own[own.epsilon <= epsilon]
        assert "transfer" in set(within.attack)
        robust = (within.label == within.prediction).groupby(within.example).all()
        assert (row.correct, row.examples, row.accuracy) == (robust.sum(), 40, robust.mean())
        assert 0 < row.correct < 40
        assert (row.perturbation, row.gradients, row.seconds) == (epsilon, 0, 0.0)
        stored = predictions[(predictions.model == model) & (predictions.attack == "worst_case")]
        stored = stored[stored.epsilon == epsilon].sort_values("example")
        assert (stored.prediction == stored.label).tolist() == robust.sort_index().tolist()


def test_the_worst_case_waits_for_images_that_are_made_on_other_models(store: Store, experiment: Experiment) -> None:
    tables.remove(store, "shards", "evaluate-pgd-1-paper-000000024")
    _merge(store, experiment)
    assert _worst(store).empty


def test_an_attack_that_will_run_again_removes_the_worst_cases_that_it_counts_for(
    store: Store, experiment: Experiment
) -> None:
    _merge(store, experiment)
    pending = [job for job in jobs(experiment, EVALUATE, SIZES) if job.model == "mixture"]
    gate = [job for job in pending if job.suite == "pgd_gate"]
    assert stages._stale_files(gate) == {"evaluate-mixture-pgd_gate", "evaluate-mixture-worst_case"}
    assert not stages._stale_files(job for job in pending if job.suite == CHECKS)
    transferred = stages._stale_files(job for job in pending if job.suite == "paper")
    assert transferred == {"evaluate-mixture-paper", *(f"evaluate-{name}-worst_case" for name in experiment.names)}
    merge.forget(store, transferred)
    assert not any(
        "worst_case" in file for table in ("evaluations", "predictions") for file in tables.files(store, table)
    )
    before = tables.read(store, "evaluations")
    _merge(store, experiment)
    assert len(_worst(store)) == 2 * len(experiment.names)
    assert len(tables.read(store, "evaluations")) > len(before)


@pytest.mark.parametrize("table", ["evaluations", "predictions"])
def test_a_merge_that_was_killed_between_its_writes_is_completed(
    store: Store, experiment: Experiment, table: str
) -> None:
    _merge(store, experiment)
    expected = _worst(store)
    tables.remove(store, table, WORST)
    unmerged = merge.unmerged(store, stages._shards(experiment, SIZES), stages._worst_cases(experiment, SIZES))
    assert unmerged == [WORST]
    _merge(store, experiment)
    pd.testing.assert_frame_equal(_worst(store), expected)
    assert WORST in tables.files(store, "predictions")


def test_a_shared_models_worst_case_is_computed_for_the_experiment_that_copies_it(
    store: Store, experiment: Experiment, tmp_path: Path
) -> None:
    other = build("digits", 0, [*TINY, "evaluation.epsilon=0.1,0.2", "joint.epochs=1"])
    copied = other.store(str(tmp_path / "runs"))
    for table in ("predictions", "shards"):
        for file in tables.files(store, table):
            tables.copy(store, copied, table, file)
    _merge(copied, other)
    _merge(store, experiment)
    assert set(_worst(copied).experiment) == {other.signature}
    assert _worst(copied).correct.tolist() == _worst(store).correct.tolist()
