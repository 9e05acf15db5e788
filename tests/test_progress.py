"""What a person watches: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dwf_cluster.cluster.control import Claim
from dwf_cluster.cluster.ray import Ended, Started
from dwf_cluster.data.sources import Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan import Job, jobs
from dwf_cluster.progress import Progress
from dwf_cluster.store import Store, tables


def _epoch(store: Store, experiment: Experiment, job: Job, epoch: int) -> None:
    row = {"stage": job.stage, "model": job.model, "epoch": epoch, "loss": 0.5, "clean_accuracy": 0.9}
    row |= {"probe_pgd_accuracy": 0.25, "images_per_second": 321.0, "seconds": 61.0}
    before = tables.metrics_until(store, job.model, epoch - 1)
    tables.write(store, "metrics", job.model, tables.rows_of(experiment, [*before, row]))


@pytest.fixture
def experts(tiny: Experiment) -> list[Job]:
    return jobs(tiny, "experts", Sizes(96, 40, (1, 8, 8)))


def _progress(store: Store, experiment: Experiment, console: Console) -> Progress:
    return Progress({}, store.url, console)


def test_elsewhere_each_epoch_and_each_end_is_a_plain_line(store: Store, tiny: Experiment, experts: list[Job]) -> None:
    printed = io.StringIO()
    progress = _progress(store, tiny, Console(file=printed))
    with progress.watching(experts):
        progress.update(Started(experts[0]))
        progress.update(Claim((tiny.folder, "expert pgd-1"), 0, "n1", "H100 GPU-1", 0.5))
        progress.update(Claim((tiny.folder, "expert fgsm-1"), 0, "n1", "cpu", 0))
        _epoch(store, tiny, experts[0], 1)
        progress.update(None)
        progress.update(None)
        progress.update(Ended(experts[0], "done"))
        progress.update(Ended(experts[1], "failed", "NonFiniteLoss: the loss became nan"))
        progress.update(Ended(experts[2], "stopped"))
    assert printed.getvalue().splitlines() == [
        "expert pgd-1: worker 0 on n1: H100 GPU-1",
        "expert pgd-1: epoch 1/3, loss 0.500, clean 90.0%, PGD probe 25.0%, 321 images/s, 2:02 left",
        "expert pgd-1: done (1 of 3)",
        "expert fgsm-1: NonFiniteLoss: the loss became nan (2 of 3)",
        "expert benign: stopped (3 of 3)",
    ]


def test_what_a_job_noted_is_a_warning(store: Store, tiny: Experiment, experts: list[Job]) -> None:
    note = "damaged checkpoint 2 removed; used is 1\nrows are lost"
    tables.write(store, "jobs", experts[0].file, tables.rows_of(tiny, [{"state": "done", "note": note}]))
    printed = io.StringIO()
    progress = _progress(store, tiny, Console(file=printed))
    with progress.watching(experts):
        progress.update(Ended(experts[0], "done"))
    assert printed.getvalue().splitlines() == [
        "warning: damaged checkpoint 2 removed; used is 1",
        "warning: rows are lost",
        "expert pgd-1: done (1 of 3)",
    ]


def test_on_a_terminal_a_table_shows_state_epoch_accuracy_and_time_left(
    store: Store, tiny: Experiment, experts: list[Job]
) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, record=True)
    progress = _progress(store, tiny, console)
    with progress.watching(experts):
        progress.update(Started(experts[0]))
        _epoch(store, tiny, experts[0], 2)
        progress.update(None)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["expert", "pgd-1", "running", "2/3", "0.500", "90.0%", "25.0%", "321", "1:01"] in lines
    assert ["expert", "benign", "waiting", "0/3"] in lines


def test_what_an_interrupted_run_left_is_not_taken_for_this_runs(
    store: Store, tiny: Experiment, experts: list[Job]
) -> None:
    _epoch(store, tiny, experts[0], 1)
    printed = io.StringIO()
    progress = _progress(store, tiny, Console(file=printed))
    with progress.watching(experts):
        progress.update(Started(experts[0]))
        progress.update(None)
        assert printed.getvalue() == ""
        _epoch(store, tiny, experts[0], 2)
        progress.update(None)
    assert printed.getvalue().startswith("expert pgd-1: epoch 2/3")


def test_of_several_seeds_each_line_says_which(store: Store, tiny: Experiment) -> None:
    other = tiny.model_copy(update={"seed": 7})
    printed = io.StringIO()
    progress = Progress({e.folder: f"seed {e.seed}" for e in (tiny, other)}, store.url, Console(file=printed))
    found = jobs(other, "experts", Sizes(96, 40, (1, 8, 8)))
    with progress.watching(found):
        progress.update(Ended(found[0], "done"))
    assert printed.getvalue() == "seed 7 expert pgd-1: done (1 of 3)\n"
