"""The tables of a run: accuracies, the transfer matrix, signs of gradient masking, measured speeds in the plan."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dwf_cluster.console.tables import plan, result_table, show, sweep_tables, transfer_table, warnings
from dwf_cluster.data.registry import Sizes
from dwf_cluster.evaluation.registry import CHECKS, columns, transfer_column, worst_case_column
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import jobs
from dwf_cluster.plan.resources import Resources
from dwf_cluster.presets import build
from dwf_cluster.store import Store, tables

from ..conftest import TINY


def _printed(table: Table) -> list[str]:
    console = Console(file=io.StringIO(), width=300)
    show(console, table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def _write_evaluations(store: Store, experiment: Experiment) -> None:
    """Rows for each model and column: accuracy 0.1 for the first model, 0.2 for the second, ..."""
    evaluation, threat = experiment.evaluation, experiment.threat
    rows = []
    for number, spec in enumerate(experiment.models, 1):
        accuracy = 0.1 * number
        for suite in experiment.suites(spec):
            listed = columns(evaluation, experiment.threats, suite) if suite != CHECKS else []
            rows += [{"model": spec.name, **c.settings, "examples": 40, "accuracy": accuracy} for c in listed]
        made_on = transfer_column(evaluation, threat, spec.name)
        others = [name for name in experiment.names if name != spec.name]
        rows += [{"model": name, **made_on.settings, "examples": 40, "accuracy": accuracy} for name in others]
    tables.write(store, "evaluations", "all", rows)


def test_the_result_table_has_models_down_columns_across_and_blanks_for_columns_of_other_models(
    store: Store, tiny: Experiment
) -> None:
    _write_evaluations(store, tiny)
    lines = _printed(result_table(tiny, store))
    assert lines[0].strip() == "Accuracy in percent, 40 test images"
    assert lines[2].split() == ["clean", *["fgsm"] * 9, *["pgd"] * 2, "restarts", "adaptive", "gate", "expert", "noise"]
    benign, mixture = (next(line.split() for line in lines if line.split()[:1] == [m]) for m in ("benign", "mixture"))
    with_gate = 17
    without_gate = with_gate - len(("gate", "expert"))
    assert mixture == ["mixture", *["40.0"] * with_gate]
    assert benign == ["benign", *["10.0"] * without_gate]
    models = [line.split()[0] for line in lines if line.split() and line.split()[0] in tiny.names]
    assert models == ["benign", "mixture", "fgsm-1", "pgd-1"]


def test_the_worst_case_is_the_last_column_and_its_images_are_counted(store: Store, tiny: Experiment) -> None:
    _write_evaluations(store, tiny)
    row = {"model": "mixture", **worst_case_column(tiny.threat).settings, "examples": 40, "accuracy": 0.125}
    tables.write(store, "evaluations", "another", [row])
    lines = _printed(result_table(tiny, store))
    assert lines[2].split()[-1] == "worst_case"
    assert next(line.split() for line in lines if line.split()[:1] == ["mixture"])[-1] == "12.5"


def test_a_table_says_below_it_which_accuracies_are_upper_bounds_and_what_autoattack_was_run_on(
    tmp_path: Path, tiny: Experiment
) -> None:
    assert tiny.column_notes == ()
    experiment = build("digits", 0, [*TINY, "gate.kind=hard", "evaluation.autoattack_examples=16"])
    store = experiment.store(str(tmp_path))
    _write_evaluations(store, experiment)
    printed = " ".join(" ".join(_printed(result_table(experiment, store))).split())
    assert "mixture: gives each image to one expert." in printed
    assert "their accuracies are upper bounds" in printed
    assert "autoattack: the first 16 test images" in printed


def test_the_result_table_has_the_column_of_a_baseline_that_selects_one_expert(tmp_path: Path) -> None:
    experiment = build("digits", 0, [*TINY, "evaluation.beyond=", "baselines=soe"])
    store = experiment.store(str(tmp_path))
    _write_evaluations(store, experiment)
    lines = _printed(result_table(experiment, store))
    assert lines[2].split()[-1] == "route"
    soe, mixture = (next(line.split() for line in lines if line.split()[:1] == [m]) for m in ("soe", "mixture"))
    assert len(soe) == len(mixture) + 1


def test_the_transfer_table_has_the_model_that_images_were_made_on_across(store: Store, tiny: Experiment) -> None:
    _write_evaluations(store, tiny)
    lines = [line.split() for line in _printed(transfer_table(tiny, store, tiny.threat)) if line.strip()]
    assert lines[1] == ["model", *tiny.names]
    assert ["mixture", "10.0", "20.0", "30.0"] in lines


def test_each_sign_of_masking_is_a_warning_and_the_last_line_has_their_number(store: Store, tiny: Experiment) -> None:
    check = {"check": "black_box", "value": 0.0, "limit": 0.05, "fired": False, "examples": 8, "meaning": "fine"}
    checks: list[dict[str, Any]] = [{**check, "model": model} for model in tiny.names]
    tables.write(store, "checks", "all", checks)
    assert warnings(tiny, store) == ["signs of gradient masking: none in 4 checks of 4 models on 8 images"]
    checks[2] |= {"value": 0.5, "fired": True, "meaning": "a black-box attack fools 50.0%"}
    tables.write(store, "checks", "all", checks)
    assert warnings(tiny, store) == [
        "warning: pgd-1, black_box: a black-box attack fools 50.0%",
        "signs of gradient masking: 1 in 4 checks of 4 models on 8 images",
    ]


def test_a_mean_over_a_part_of_the_seeds_says_so() -> None:
    def row(kind: str, seed: int, state: str, clean: float | None) -> dict[str, object]:
        return {"gate.kind": kind, "seed": seed, "state": state, "clean": clean}

    complete = [row("soft", seed, "done", 0.5 + 0.1 * seed) for seed in (0, 1)]
    partial = [row("hard", seed, "done", 0.5 + 0.1 * seed) for seed in (0, 1)] + [row("hard", 2, "stopped early", None)]
    fields = ["gate.kind", "seed"]
    lines = _printed(sweep_tables([*complete, *partial], fields)[1])
    assert [line.split() for line in lines if line.strip().startswith(("soft", "hard"))] == [
        ["soft", "2", "of", "2", "55.0", "±", "7.1"],
        ["hard", "2", "of", "3", "(55.0", "±", "7.1)"],
    ]
    assert " ".join(" ".join(lines).split()).endswith("the mean leaves seeds out; do not compare it with the others")
    assert not any("parentheses" in line for line in _printed(sweep_tables(complete, fields)[1]))
    lacking = [
        {**row("soft", seed, "done", 0.5), "worst_case": worst} for seed, worst in ((0, 0.5), (1, None), (2, 0.6))
    ]
    (line,) = (line for line in _printed(sweep_tables(lacking, fields)[1]) if line.strip().startswith("soft"))
    assert line.split() == ["soft", "3", "of", "3", "50.0", "±", "0.0", "(55.0", "±", "7.1)"]


def test_the_number_of_checks_that_could_fire_follows_where_every_row_says_it(store: Store, tiny: Experiment) -> None:
    check = {"check": "restarts", "value": 0.0, "limit": 0.1, "fired": False, "meaning": "fine", "examples": 8}
    checks = [{**check, "model": model, "could_fire": model != "benign"} for model in tiny.names]
    checks.append({**check, "model": "benign", "check": "stronger", "could_fire": False, "examples": 40})
    tables.write(store, "checks", "all", checks)
    told = "signs of gradient masking: none in 5 checks of 4 models on 8 and 40 images"
    assert warnings(tiny, store) == [f"{told}; 3 of them could fire"]
    tables.write(store, "checks", "all", [*checks, {**check, "model": "pgd-1"}])  # as earlier versions did
    assert warnings(tiny, store) == [told.replace("5 checks", "6 checks")]


def test_the_plan_takes_the_speed_of_each_stage_from_finished_jobs(store: Store, tiny: Experiment) -> None:
    sizes, resources = Sizes(96, 40, (1, 8, 8)), Resources(cpus=1, gpus=0)
    experts = jobs(tiny, "experts", sizes)
    before = plan([tiny], {}, experts, sizes, resources, store.url)[1]
    assert re.fullmatch(
        "speed of experts: 0.025 TFLOP/s a CPU, estimate for a core at the demo's width, .*, not measured", before[2]
    )
    for job in experts[:2]:
        row = {"stage": "experts", "task": job.name, "state": "done", "attempts": 1, "seconds": 10.0}
        tables.write(store, "jobs", job.file, [row])
    _, lines = plan([tiny], {}, experts, sizes, resources, store.url)
    speed = (experts[0].flop + experts[1].flop) / 20
    total = sum(job.flop for job in experts) / speed
    assert lines[0] == f"makespan: 0:00:{total:02.0f}"
    assert lines[2].endswith("measured on finished jobs")


def test_the_plan_adds_up_passes_of_equal_networks_and_operations_of_all(store: Store) -> None:
    sizes, resources = Sizes(96, 40, (1, 8, 8)), Resources(cpus=1, gpus=0)
    for baselines, passes_are_added in (("pgd-at", True), ("pgd-at,resnet18-wide", False)):
        experiment = build("digits", 0, [*TINY, f"baselines={baselines}"])
        trainings = jobs(experiment, "experts", sizes)
        table, _ = plan([experiment], {}, trainings, sizes, resources, store.url)
        passes, tera = (list(column.cells)[-1] for column in table.columns[-2:])
        assert passes == (f"{sum(job.cost for job in trainings) / 1e6:.3f}" if passes_are_added else "")
        assert float(str(tera)) == round(sum(job.flop for job in trainings) / 1e12, 3) > 0
