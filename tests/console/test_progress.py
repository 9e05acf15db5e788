"""What a person watches: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import threading
from collections.abc import Mapping
from typing import Any

import pytest
from rich.console import Console

from dwf_cluster.cluster.control import Claim
from dwf_cluster.cluster.events import Ended, Started
from dwf_cluster.console.progress import Progress
from dwf_cluster.data.registry import Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import Job, jobs
from dwf_cluster.store import Store, tables

from .. import PATIENCE


def _epoch(store: Store, experiment: Experiment, job: Job, epoch: int) -> None:
    row = {"stage": job.stage, "model": job.model, "epoch": epoch, "loss": 0.5, "clean_accuracy": 0.9}
    row |= {"probe_pgd_accuracy": 0.25, "images_per_second": 321.0, "seconds": 61.0}
    before = tables.metrics_until(store, job.model, epoch - 1) if epoch > 1 else []
    tables.write(store, "metrics", job.model, [*before, row])


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
        progress.update(Claim((tiny.folder, "expert pgd-1"), 0, "n1", "H100 GPU-1", 0.5, "H100", 7))
        progress.update(Claim((tiny.folder, "expert fgsm-1"), 0, "n1", "cpu", 0, "cpu", 8))
        _epoch(store, tiny, experts[0], 1)
        progress.update(None)
        progress.update(None)
        progress.update(Ended(experts[0], "done"))
        progress.update(Ended(experts[1], "failed", "NonFiniteLoss: the loss became nan"))
        progress.update(Ended(experts[2], "stopped"))
    assert printed.getvalue().splitlines() == [
        "expert pgd-1: worker 0 on n1: H100 GPU-1 (process 7)",
        "expert pgd-1: epoch 1/3, loss 0.500, clean 90.0%, PGD probe 25.0%, 321 images/s, 2:02 left",
        "expert pgd-1: done (1 of 3)",
        "expert fgsm-1: NonFiniteLoss: the loss became nan (2 of 3)",
        "expert benign: stopped (3 of 3)",
    ]


def test_what_a_job_noted_is_a_warning(store: Store, tiny: Experiment, experts: list[Job]) -> None:
    note = "damaged checkpoint 2 removed; resuming from 1\nrows are lost"
    tables.write(store, "jobs", experts[0].file, [{"state": "done", "note": note}])
    printed = io.StringIO()
    progress = _progress(store, tiny, Console(file=printed))
    with progress.watching(experts):
        progress.update(Ended(experts[0], "done"))
    assert printed.getvalue().splitlines() == [
        "warning: damaged checkpoint 2 removed; resuming from 1",
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
        _epoch(store, tiny, experts[0], 2)
        progress.update(Ended(experts[0], "done"))
    assert [line.split(",")[0] for line in printed.getvalue().splitlines()] == [
        "expert pgd-1: epoch 2/3",
        "expert pgd-1: done (1 of 3)",
    ]


def test_of_several_seeds_each_line_says_which(store: Store, tiny: Experiment) -> None:
    other = tiny.model_copy(update={"seed": 7})
    printed = io.StringIO()
    progress = Progress({e.folder: f"seed {e.seed}" for e in (tiny, other)}, store.url, Console(file=printed))
    found = jobs(other, "experts", Sizes(96, 40, (1, 8, 8)))
    with progress.watching(found):
        progress.update(Ended(found[0], "done"))
    assert printed.getvalue() == "seed 7 expert pgd-1: done (1 of 3)\n"


def test_a_store_that_answers_slowly_does_not_hold_up_the_run(
    store: Store, tiny: Experiment, experts: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, reads = threading.Event(), 0
    read = tables.read

    def wait(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        assert answers.wait(PATIENCE)
        return read(*arguments)

    printed = io.StringIO()
    progress = _progress(store, tiny, Console(file=printed))
    with progress.watching(experts):
        monkeypatch.setattr(tables, "read", wait)
        progress.update(Started(experts[0]))
        for _ in range(100):  # a minute and a half
            progress.update(None)
        _epoch(store, tiny, experts[0], 1)
        progress.update(Ended(experts[0], "done"))
        assert printed.getvalue() == ""
        answers.set()
    assert [line.split(",")[0] for line in printed.getvalue().splitlines()] == [
        "expert pgd-1: epoch 1/3",
        "expert pgd-1: done (1 of 3)",
    ]
    looks = 2  # that begun and that asked for meanwhile
    assert reads <= looks + 2  # and metrics and the job's row at its end


def test_a_store_that_cannot_be_read_is_one_warning_and_every_end_is_still_told(
    store: Store, tiny: Experiment, experts: list[Job]
) -> None:
    printed = io.StringIO()
    progress = _progress(store, tiny, Console(file=printed))
    store.write("results/metrics/pgd-1.parquet", b"damaged")
    store.write("results/metrics/fgsm-1.parquet", b"damaged")
    with progress.watching(experts):
        for job in experts:
            progress.update(Started(job))
        progress.update(None)
        for job in experts:
            progress.update(Ended(job, "done"))
    first, *others = printed.getvalue().splitlines()
    assert first.startswith(f"warning: progress: expert pgd-1: {store.path('results/metrics/pgd-1.parquet')}: not the")
    assert first.endswith("; the run goes on")
    assert others == [
        "expert pgd-1: done (1 of 3)",
        "expert fgsm-1: done (2 of 3)",
        "expert benign: done (3 of 3)",
    ]


@pytest.mark.parametrize("terminal", [False, True])
def test_metrics_with_missing_values_are_a_warning(
    terminal: bool, store: Store, tiny: Experiment, experts: list[Job]
) -> None:
    row = {"stage": "experts", "model": "pgd-1", "epoch": 1, "loss": None, "seconds": float("nan")}
    tables.write(store, "metrics", "pgd-1", [row])
    console = Console(file=io.StringIO(), force_terminal=terminal, width=200, record=True)
    progress = _progress(store, tiny, console)
    with progress.watching(experts):
        progress.update(Ended(experts[0], "done"))
    text = console.export_text()
    assert "warning: progress: expert pgd-1: TypeError: " in text
    assert text.count("warning") == 1


def test_who_listens_and_fails_is_a_warning(store: Store, tiny: Experiment, experts: list[Job]) -> None:
    def fail(folder: str, row: Mapping[str, Any]) -> None:
        raise RuntimeError("no more paper")

    printed = io.StringIO()
    progress = _progress(store, tiny, Console(file=printed))
    progress.heard = fail
    with progress.watching(experts):
        _epoch(store, tiny, experts[0], 1)
        progress.update(Ended(experts[0], "done"))
    assert printed.getvalue().splitlines() == [
        "warning: progress: expert pgd-1: RuntimeError: no more paper; the run goes on",
        "expert pgd-1: done (1 of 3)",
    ]
