"""Events of running jobs: epochs, seconds and notes come from the store, and a bad store ends no run."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

from dwf_cluster.cluster.events import Ended, Epoch, Event, Finished, Note, Queued, Started
from dwf_cluster.data.registry import Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline.epochs import JobEvents
from dwf_cluster.plan.jobs import EXPERTS, Job, deduplicate, jobs
from dwf_cluster.store import Store, tables

from .. import PATIENCE

SIZES = Sizes(96, 40, (1, 8, 8))


def _train_epoch(store: Store, job: Job, epoch: int) -> None:
    before = tables.metrics_until(store, job.model, epoch - 1) if epoch > 1 else []
    tables.write(store, "metrics", job.model, [*before, {"stage": job.stage, "model": job.model, "epoch": epoch}])


@pytest.fixture
def experts(tiny: Experiment) -> list[Job]:
    return jobs(tiny, EXPERTS, SIZES)


def _following(store: Store, listed: Sequence[Job], events: list[Event]) -> AbstractContextManager[JobEvents]:
    stores = {job.folder: Store(store.url, job.folder) for job in listed}
    return JobEvents(stores, lambda job: job.name, events.append).following(listed)


def test_each_new_epoch_of_a_running_training_is_one_event(store: Store, experts: list[Job]) -> None:
    job, events = experts[0], list[Event]()
    with _following(store, experts, events) as job_events:
        job_events.update(Started(job))
        _train_epoch(store, job, 1)
        job_events.update(None)
        job_events.update(None)
        job_events.update(Ended(job, "done"))
    queued, started, epoch, ended, finished = events
    assert (queued, started, finished) == (Queued(tuple(experts)), Started(job), Finished())
    assert isinstance(epoch, Epoch)
    assert (epoch.job, epoch.row["epoch"], epoch.is_replayed) == (job, 1, False)
    assert ended == Ended(job, "done")


def test_a_plan_that_cannot_be_made_is_a_warning_and_the_jobs_are_followed(store: Store, experts: list[Job]) -> None:
    def plan() -> dict[Job, float]:
        raise OSError("a damaged table")

    events = list[Event]()
    with JobEvents({}, lambda job: job.name, events.append).following(experts[:0], plan):
        pass
    assert events == [Note("warning: progress: OSError: a damaged table; the run continues"), Queued(()), Finished()]


def test_an_ended_job_has_the_seconds_and_notes_of_its_row(store: Store, experts: list[Job]) -> None:
    note = "damaged checkpoint 2 removed; used is 1\nrows are lost"
    tables.write(store, "jobs", experts[0].file, [{"state": "done", "seconds": 1.5, "note": note}])
    events: list[Event] = []
    with _following(store, experts, events) as job_events:
        job_events.update(Ended(experts[0], "done"))
    assert Ended(experts[0], "done", seconds=1.5, notes=tuple(note.splitlines())) in events


def test_epochs_of_an_earlier_run_are_replayed(store: Store, experts: list[Job]) -> None:
    _train_epoch(store, experts[0], 1)
    events: list[Event] = []
    with _following(store, experts, events) as job_events:
        _train_epoch(store, experts[0], 2)
        job_events.update(Ended(experts[0], "done"))
    epochs = [(event.row["epoch"], event.is_replayed) for event in events if isinstance(event, Epoch)]
    assert epochs == [(1, True), (2, False)]


def test_epochs_of_a_copied_training_are_replayed(store: Store, tiny: Experiment) -> None:
    other = tiny.model_copy(update={"joint": tiny.joint.model_copy(update={"epochs": 5})})
    listed = deduplicate([job for e in (tiny, other) for job in jobs(e, EXPERTS, SIZES)])
    copy = listed[-1]
    assert copy.copy_of == tiny.folder
    events: list[Event] = []
    with _following(store, listed, events) as job_events:
        _train_epoch(other.store(store.url), copy, 1)
        job_events.update(Ended(copy, "done"))
    assert [event.is_replayed for event in events if isinstance(event, Epoch)] == [True]


def test_a_slow_store_does_not_hold_up_the_run(
    store: Store, experts: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers, reads = threading.Event(), 0
    read = tables.read

    def wait(*arguments: Any) -> Any:
        nonlocal reads
        reads += 1
        assert answers.wait(PATIENCE)
        return read(*arguments)

    job, events = experts[0], list[Event]()
    with _following(store, experts, events) as job_events:
        monkeypatch.setattr(tables, "read", wait)
        job_events.update(Started(job))
        for _ in range(100):  # a minute and a half
            job_events.update(None)
        _train_epoch(store, job, 1)
        job_events.update(Ended(job, "done"))
        assert not [event for event in events if isinstance(event, Epoch | Ended)]
        answers.set()
    assert [type(event) for event in events] == [Queued, Started, Epoch, Ended, Finished]
    looks = 2  # the one that had begun, and the one that was requested meanwhile
    assert reads <= looks + 2  # at the job's end: its metrics and its row


def test_an_unreadable_store_is_one_warning_and_every_end_is_still_reported(store: Store, experts: list[Job]) -> None:
    store.write("results/metrics/pgd-1.parquet", b"damaged")
    store.write("results/metrics/fgsm-1.parquet", b"damaged")
    events: list[Event] = []
    with _following(store, experts, events) as job_events:
        for job in experts:
            job_events.update(Started(job))
        job_events.update(None)
        for job in experts:
            job_events.update(Ended(job, "done"))
    (note,) = (event for event in events if isinstance(event, Note))
    path = store.path("results/metrics/pgd-1.parquet")
    assert note.text.startswith(f"warning: progress: expert pgd-1: {path}: not the")
    assert note.text.endswith("; the run continues")
    assert [event for event in events if isinstance(event, Ended)] == [Ended(job, "done") for job in experts]


def test_a_run_that_fails_still_reports_the_end_of_its_jobs(store: Store, experts: list[Job]) -> None:
    events: list[Event] = []
    with pytest.raises(KeyboardInterrupt), _following(store, experts, events):
        raise KeyboardInterrupt
    assert events[-1] == Finished()
