"""What a run prints at its end: accuracies, the transfer_column matrix, signs of masking."""

from __future__ import annotations

import io

from rich.console import Console
from rich.table import Table

from dwf_cluster.console.tables import plan, result_table, show, transfer_table, warnings
from dwf_cluster.data.registry import Sizes
from dwf_cluster.evaluation.registry import columns, suite_names, transfer_column
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import jobs
from dwf_cluster.plan.resources import Resources
from dwf_cluster.store import Store, tables

MODELS = ("benign", "fgsm-1", "pgd-1", "mixture")


def _printed(table: Table) -> list[str]:
    console = Console(file=io.StringIO(), width=300)
    show(console, table)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined,no-any-return]


def _evaluated(store: Store, tiny: Experiment) -> None:
    rows = []
    for place, model in enumerate(MODELS):
        accuracy = 0.1 * (place + 1)
        for family in suite_names(tiny, model)[:-1]:
            rows += [
                {"model": model, **c.settings, "examples": 40, "accuracy": accuracy} for c in columns(tiny, family)
            ]
        made = transfer_column(tiny, model)
        others = [other for other in MODELS if other != model]
        rows += [{"model": other, **made.settings, "examples": 40, "accuracy": accuracy} for other in others]
    tables.write(store, "evaluations", "all", rows)


def test_a_row_a_model_and_a_column_an_attack_blank_where_it_does_not_apply(store: Store, tiny: Experiment) -> None:
    _evaluated(store, tiny)
    lines = _printed(result_table(tiny, store))
    assert lines[0].strip() == "Accuracy in percent, 40 test images"
    assert lines[2].split() == ["clean", *["fgsm"] * 9, *["pgd"] * 2, "restarts", "adaptive", "gate", "expert", "noise"]
    benign, mixture = (next(line.split() for line in lines if line.split()[:1] == [m]) for m in ("benign", "mixture"))
    assert mixture == ["mixture", *["40.0"] * 17]
    assert benign == ["benign", *["10.0"] * 15]


def test_the_transfer_matrix_has_where_it_was_made_across(store: Store, tiny: Experiment) -> None:
    _evaluated(store, tiny)
    lines = [line.split() for line in _printed(transfer_table(tiny, store)) if line.strip()]
    assert lines[1] == ["model", *MODELS]
    assert lines[-1] == ["mixture", "10.0", "20.0", "30.0"]


def test_signs_of_masking_are_warnings_and_their_number_is_said(store: Store, tiny: Experiment) -> None:
    sign = {"model": "pgd-1", "check": "black_box", "value": 0.0, "limit": 0.05, "fired": False, "examples": 8}
    signs = [{**sign, "model": model, "meaning": "fine"} for model in MODELS]
    tables.write(store, "checks", "all", signs)
    assert warnings(tiny, store) == ["signs of gradient masking: none in 4 checks of 4 models on 8 images"]
    signs[2] |= {"value": 0.5, "fired": True, "meaning": "a black-box attack fools 50.0%"}
    tables.write(store, "checks", "all", signs)
    assert warnings(tiny, store) == [
        "warning: pgd-1, black_box: a black-box attack fools 50.0%",
        "signs of gradient masking: 1 in 4 checks of 4 models on 8 images",
    ]


def test_the_plan_takes_the_speed_of_each_stage_from_jobs_that_are_done(store: Store, tiny: Experiment) -> None:
    sizes, resources = Sizes(96, 40, (1, 8, 8)), Resources(cpus=1, gpus=0)
    experts = jobs(tiny, "experts", sizes)
    before = plan([tiny], {}, experts, sizes, resources, store.url)[1]
    assert before[2] == "speed of experts: 0.025 TFLOP/s a CPU, estimate for a core at the demo's width, not measured"
    for job in experts[:2]:
        row = {"stage": "experts", "state": "done", "attempts": 1, "seconds": 10.0}
        tables.write(store, "jobs", job.file, [row])
    _, lines = plan([tiny], {}, experts, sizes, resources, store.url)
    speed = (experts[0].cost + experts[1].cost) / 20
    total = sum(job.cost for job in experts) / speed
    assert lines[0] == f"makespan: 0:00:{total:02.0f}"
    assert lines[2].endswith("measured on finished jobs")
