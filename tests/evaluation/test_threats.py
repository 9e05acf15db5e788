"""The threat model: every attack follows it; curves; targeted PGD. Each against the slow, obvious way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dwf_cluster.attacks.apgd import apgd
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import differentiate, predict, target_margin
from dwf_cluster.attacks.pgd import fgsm, pgd
from dwf_cluster.data.device import to_float
from dwf_cluster.data.sources import Images
from dwf_cluster.determinism import Draws
from dwf_cluster.evaluation.registry import SUITES, Column, columns, extra_names, threat_count
from dwf_cluster.evaluation.settings import Threat
from dwf_cluster.experiment import Experiment
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput

from ..conftest import TINY
from .test_run import EVERYTHING, _evaluated, _models

COUNT = 40
KEYS = ("model", "attack", "source", "norm", "epsilon", "steps")


@pytest.fixture
def images(images: Images) -> Images:
    """The labels are the attacked model's answers: every image can be fooled."""
    model = _models(build("digits", 0, EVERYTHING), images)["fgsm-1"].eval()
    return replace(images, y_test=predict(model, to_float(torch.tensor(images.x_test))).argmax(1).numpy())


def _by_column(rows: list[dict[str, Any]]) -> dict[tuple[Any, ...], list[int]]:
    """The predictions of each column, by its key."""
    predictions: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        predictions.setdefault(tuple(row[key] for key in KEYS), []).append(row["prediction"])
    return predictions


def _problem(experiment: Experiment, images: Images) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    model = _models(experiment, images)["fgsm-1"].eval()
    return model, to_float(torch.tensor(images.x_test)), torch.tensor(images.y_test)


def _generators(suite: str) -> list[torch.Generator]:
    return [Draws((0, "fgsm-1", suite, i)).generator("attack") for i in range(COUNT)]


def _correct(rows: list[dict[str, Any]], **wanted: Any) -> list[bool]:
    return [r["prediction"] == r["label"] for r in rows if all(r[key] == value for key, value in wanted.items())]


def test_several_epsilons_give_the_columns_that_each_gives_alone(images: Images) -> None:
    beyond = "evaluation.beyond=pgd_momentum,pgd_targeted,apgd,square,noise,pgd_l2,transfer"
    alone = [build("digits", 0, [*EVERYTHING, beyond, f"evaluation.epsilon={e}"]) for e in (0.05, 0.2)]
    both = build("digits", 0, [*EVERYTHING, beyond, "evaluation.epsilon=0.05,0.2"])
    for suite in ("paper", "pgd_momentum", "pgd_targeted", "apgd", "square", "noise", "pgd_l2"):
        expected: dict[tuple[Any, ...], list[int]] = {}
        for experiment in alone:
            expected |= _by_column(_evaluated(experiment, images, "fgsm-1", suite)[1])
        assert _by_column(_evaluated(both, images, "fgsm-1", suite)[1]) == expected
    assert [threat.step_size for threat in both.threats] == pytest.approx([0.01, 0.04])  # as 0.03 is to 0.15


@pytest.mark.parametrize(("norm", "epsilon", "step_size"), [("l2", 0.8, 0.3), ("l1", 4.0, 1.5)])
def test_the_papers_columns_are_attacks_in_the_ball_of_the_threat_model(
    images: Images, norm: Any, epsilon: float, step_size: float
) -> None:
    """A run for each column. FGSM stays L-infinity."""
    settings = [f"evaluation.norm={norm}", f"evaluation.epsilon={epsilon}", f"evaluation.step_size={step_size}"]
    experiment = build("digits", 0, [*EVERYTHING, "evaluation.beyond=noise", *settings])
    model, x, y = _problem(experiment, images)
    rows, predictions = _evaluated(experiment, images, "fgsm-1", "paper")
    ball, generators = Ball(norm, epsilon), _generators("paper")
    starts = [x, *(ball.random_point(x, generators) for _ in range(1, experiment.evaluation.restarts))]

    def right(attacked: torch.Tensor) -> torch.Tensor:
        return predict(model, attacked).argmax(1) == y

    def run(steps: int, start: torch.Tensor = x) -> list[torch.Tensor]:
        return [iterate.x for iterate in pgd(model, x, y, ball, step_size=step_size, steps=steps, start=start)]

    gradient, _, _ = differentiate(model, x, y)
    for row in rows:
        expected = {
            "clean": lambda row: right(x),
            "fgsm": lambda row: right(fgsm(x, gradient, row["epsilon"])),
            "pgd_restarts": lambda row: torch.stack([right(z) for s in starts for z in run(row["steps"], s)]).all(0),
        }.get(row["attack"], lambda row: right(run(row["steps"])[-1]))(row)
        wanted = {key: row[key] for key in ("attack", "epsilon", "steps")}
        assert _correct(predictions, **wanted) == expected.tolist(), row
        assert row["norm"] == {"clean": None, "fgsm": "linf"}.get(row["attack"], norm)
        assert row["perturbation"] <= (row["epsilon"] or 0) + 1e-5


def test_a_random_start_moves_every_pgd_column_and_leaves_fgsm(images: Images) -> None:
    experiment = build("digits", 0, [*EVERYTHING, "evaluation.beyond=pgd_cw", "evaluation.random_start=true"])
    model, x, y = _problem(experiment, images)
    ball, step_size = Ball("linf", experiment.threat.epsilon), experiment.threat.step_size
    start = ball.random_point(x, _generators("paper"))
    *_, last = pgd(model, x, y, ball, step_size=step_size, steps=3, start=start)
    rows, predictions = _evaluated(experiment, images, "fgsm-1", "paper")
    assert _correct(predictions, attack="pgd", steps=3) == (predict(model, last.x).argmax(1) == y).tolist()
    plain = build("digits", 0, [*EVERYTHING, "evaluation.beyond=pgd_cw"])
    from_images, unmoved = _evaluated(plain, images, "fgsm-1", "paper")
    for attack in ("clean", "fgsm"):
        assert _correct(predictions, attack=attack) == _correct(unmoved, attack=attack)
    margins = [[r["margin"] for r in each if r["attack"] == "pgd"] for each in (predictions, unmoved)]
    assert margins[0] != margins[1]
    assert sum(r["gradients"] for r in rows) >= sum(r["gradients"] for r in from_images)


def test_targeted_pgd_is_one_run_for_each_other_label(images: Images) -> None:
    experiment = build("digits", 0, [*EVERYTHING, "evaluation.targets=9", "evaluation.epsilon=0.03"])
    model, x, y = _problem(experiment, images)
    ball, step_size = Ball("linf", 0.03), experiment.threat.step_size
    robust = predict(model, x).argmax(1) == y
    for shift in range(1, 10):
        run = pgd(model, x, y, ball, step_size=step_size, steps=3, objective=target_margin, target=(y + shift) % 10)
        for iterate in run:
            robust &= predict(model, iterate.x).argmax(1) == y
    _, predictions = _evaluated(experiment, images, "fgsm-1", "pgd_targeted")
    assert _correct(predictions) == robust.tolist()
    one = build("digits", 0, [*EVERYTHING, "evaluation.targets=1", "evaluation.epsilon=0.03"])
    (only_the_likeliest,), _ = _evaluated(one, images, "fgsm-1", "pgd_targeted")
    assert int(robust.sum()) < only_the_likeliest["correct"] < COUNT


CURVES = [*EVERYTHING, "evaluation.beyond=curves", "evaluation.curve_multiples=0.2,0.5,1,4", "evaluation.apgd_steps=12"]


def test_the_curves_are_the_runs_that_they_are_named_after(images: Images) -> None:
    settings = [*CURVES, "evaluation.curve_steps=12", "evaluation.curve_restarts=3", "evaluation.restart_steps=20"]
    experiment = build("digits", 0, [*settings, "evaluation.epsilon=0.03"])
    model, x, y = _problem(experiment, images)
    threat, generators = experiment.threat, _generators("curves")
    rows, predictions = _evaluated(experiment, images, "fgsm-1", "curves")
    clean = predict(model, x).argmax(1) == y

    robust = clean.clone()  # of PGD: in every ball up to this one
    epsilons = [0.006, 0.015, 0.03, 0.12, 1.0]
    assert [row["epsilon"] for row in rows if row["attack"] == "curve_epsilon"] == pytest.approx(epsilons)
    for row in (row for row in rows if row["attack"] == "curve_epsilon"):
        ball, step_size = Ball("linf", row["epsilon"]), threat.step_size * row["epsilon"] / threat.epsilon
        for iterate in pgd(model, x, y, ball, step_size=step_size, steps=20):
            robust &= predict(model, iterate.x).argmax(1) == y
        assert _correct(predictions, attack="curve_epsilon", epsilon=row["epsilon"]) == robust.tolist()

    robust = clean.clone()
    for row in (row for row in rows if row["attack"] == "curve_apgd"):
        index = robust.nonzero().squeeze(1)  # draws only where the suite draws
        rest = [generators[i] for i in index.tolist()]
        ball = Ball("linf", row["epsilon"])
        for iterate in apgd(model, x[index], y[index], ball, rest, steps=12) if rest else ():
            part = index[iterate.index]
            robust[part] &= predict(model, iterate.x).argmax(1) == y[part]
        assert _correct(predictions, attack="curve_apgd", epsilon=row["epsilon"]) == robust.tolist()
    for attack in ("curve_epsilon", "curve_apgd"):
        assert sum(_correct(predictions, attack=attack, epsilon=1.0)) == 0  # the ball has every image

    ball = Ball("linf", threat.epsilon)
    iterates = list(pgd(model, x, y, ball, step_size=threat.step_size, steps=12))
    assert [row["steps"] for row in rows if row["attack"] == "curve_steps"] == [1, 2, 5, 10, 12]
    for steps in (1, 2, 5, 10, 12):
        expected = predict(model, iterates[steps].x).argmax(1) == y
        assert _correct(predictions, attack="curve_steps", steps=steps) == expected.tolist()

    robust = clean.clone()
    for starts in (1, 2, 3):
        index = robust.nonzero().squeeze(1)
        start = x[index] if starts == 1 else ball.random_point(x[index], [generators[i] for i in index.tolist()])
        for iterate in pgd(model, x[index], y[index], ball, step_size=threat.step_size, steps=20, start=start):
            robust[index] &= predict(model, iterate.x).argmax(1) == y[index]
        assert _correct(predictions, attack="curve_restarts", steps=20 * starts) == robust.tolist()
    assert 0 < int(robust.sum()) < int(clean.sum())


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_suite_without_the_norm_is_refused_and_every_other_one_has_columns_of_it(norm: str) -> None:
    for suite in extra_names():
        assignments = [f"evaluation.norm={norm}", f"evaluation.beyond={suite}"]
        if suite != "transfer" and not SUITES[suite].own_threat and norm not in SUITES[suite].norms:
            with pytest.raises(InvalidInput, match=rf"^evaluation\.beyond: '{suite}' .*norm={norm} are pgd_gate.*$"):
                build("digits", 0, assignments)
            continue
        experiment = build("digits", 0, assignments)
        if suite != "transfer" and not SUITES[suite].own_threat:
            listed = columns(experiment.evaluation, experiment.threats, suite)
            # The columns of `experts` have names of experts, which the settings do not know; corruptions have no norm.
            expected = {"experts": set(), "corruptions": {None}}.get(suite, {norm})
            assert {column.norm for column in listed} == expected, suite


def test_an_l_infinity_radius_above_1_is_refused() -> None:
    for field in ("epsilon", "step_size"):
        with pytest.raises(InvalidInput, match=rf"^evaluation\.{field}: 8 .* up to 1"):
            build("digits", 0, [f"evaluation.{field}=8"])
    assert build("digits", 0, ["evaluation.norm=l1", "evaluation.epsilon=8"]).threat == Threat(8.0, 8 / 12, "l1")


def test_titles_have_the_epsilon_only_where_it_varies() -> None:
    one = build("digits", 0, [*TINY, "evaluation.epsilon=0.1"])
    assert not any("@" in column.title for column in one.columns)
    two = build("digits", 0, [*TINY, "evaluation.epsilon=0.1,0.10001", "evaluation.beyond=pgd_l2"])
    titles = [column.title.replace("\n", " ") for column in two.columns]
    assert len(set(titles)) == len(titles)
    assert {"pgd 2 @0.1", "pgd 2 @0.10001", "restarts 2x2 @0.1", "fgsm 0.03", "l2 2", "clean "} <= set(titles)
    assert not any(column.attack.startswith("curve") for column in build("digits", 0, CURVES).columns)


def test_a_suite_is_counted_once_for_each_threat_model_that_it_attacks_under() -> None:
    experiment = build("digits", 0, ["evaluation.epsilon=0.1,0.2,0.3"])
    counts = {name: threat_count(experiment.evaluation, experiment.threats, name) for name in SUITES}
    once = {"pgd_l2", "pgd_l1", "apgd_l2", "curves", "corruptions", "experts", "checks"}
    assert {name for name, number in counts.items() if number == 1} == once
    assert {number for name, number in counts.items() if name not in once} == {3}
    assert columns(experiment.evaluation, experiment.threats, "noise") == [
        Column("noise", epsilon=epsilon) for epsilon in (0.1, 0.2, 0.3)
    ]
