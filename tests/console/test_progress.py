"""Progress on the console: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from dwf_cluster.cluster.control import Claim
from dwf_cluster.cluster.events import (
    Connected,
    Ended,
    Epoch,
    Event,
    Finished,
    Listeners,
    Note,
    Planned,
    Queued,
    Started,
)
from dwf_cluster.console import progress
from dwf_cluster.console.progress import Progress, TimeLeft
from dwf_cluster.data.registry import Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import EVALUATE, EXPERTS, JOINT, Job, jobs

SIZES = Sizes(96, 40, (1, 8, 8))


def _epoch(job: Job, epoch: int, is_replayed: bool = False, **changed: Any) -> Epoch:
    row = {"stage": job.stage, "model": job.model, "epoch": epoch, "loss": 0.5, "clean_accuracy": 0.9}
    row |= {"probe_pgd_accuracy": 0.25, "images_per_second": 321.0, "seconds": 61.0}
    return Epoch(job, row | changed, is_replayed)


@pytest.fixture
def experts(tiny: Experiment) -> list[Job]:
    return jobs(tiny, EXPERTS, SIZES)


def _lines(events: Iterable[Event], names: dict[str, str] | None = None) -> list[str]:
    """The lines that are printed without a terminal."""
    printed = io.StringIO()
    emit = Listeners({"progress": Progress(names or {}, Console(file=printed))})
    for event in events:
        emit(event)
    return printed.getvalue().splitlines()


def _on_terminal(events: Iterable[Event]) -> str:
    """The text on a terminal, up to the end of the jobs."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120, record=True)
    emit = Listeners({"progress": Progress({}, console)})
    for event in (*events, Finished()):
        emit(event)
    return console.export_text()


def test_the_plan_and_the_dashboard_are_lines(tiny: Experiment, experts: list[Job]) -> None:
    plan = Planned((EVALUATE, JOINT, EXPERTS), (*experts, *jobs(tiny, EVALUATE, SIZES)))
    evaluations = len(plan.jobs) - len(experts)
    assert _lines([plan, Connected("http://127.0.0.1:8265", "/tmp/token"), Connected("", "")]) == [
        f"experts: {len(experts)} to do",
        "joint: done already, skipped",
        f"evaluate: {evaluations} to do",
        "Ray dashboard: http://127.0.0.1:8265 (token authentication is on; paste what `cat /tmp/token` prints when it "
        "asks)",
    ]


def test_stages_that_were_not_selected_have_no_line(experts: list[Job]) -> None:
    assert _lines([Planned((EXPERTS,), tuple(experts))]) == [f"experts: {len(experts)} to do"]


def test_without_a_terminal_each_epoch_and_each_end_is_a_plain_line(tiny: Experiment, experts: list[Job]) -> None:
    pgd, fgsm, benign = experts
    events: list[Event] = [
        Queued(tuple(experts)),
        Started(pgd),
        Claim((tiny.folder, "expert pgd-1"), 0, "n1", "H100 GPU-1", 0.5, "H100", 7),
        Claim((tiny.folder, "expert fgsm-1"), 0, "n1", "cpu", 0, "cpu", 8),
        _epoch(pgd, 1),
        Ended(pgd, "done", seconds=1.23),
        Note("expert fgsm-1: a worker died; tried again"),
        Ended(fgsm, "failed", "NonFiniteLoss: the loss became nan"),
        Ended(benign, "stopped"),
        Finished(),
    ]
    assert _lines(events) == [
        "expert pgd-1: worker 0 on n1: H100 GPU-1 (process 7)",
        "expert pgd-1: epoch 1/3, loss 0.500, clean 90.0%, PGD probe 25.0%, 321 images/s, 2:02 left",
        "expert pgd-1: done in 1.2 s (1 of 3)",
        "expert fgsm-1: a worker died; tried again",
        "expert fgsm-1: NonFiniteLoss: the loss became nan (2 of 3)",
        "expert benign: stopped (3 of 3)",
    ]


def test_notes_of_a_job_are_warnings(experts: list[Job]) -> None:
    notes = ("damaged checkpoint 2 removed; used is 1", "rows are lost")
    assert _lines([Queued(tuple(experts)), Ended(experts[0], "done", notes=notes)]) == [
        "warning: damaged checkpoint 2 removed; used is 1",
        "warning: rows are lost",
        "expert pgd-1: done (1 of 3)",
    ]


def test_copied_trainings_are_lines_and_copied_evaluations_are_not(tiny: Experiment, experts: list[Job]) -> None:
    training, evaluation = (replace(job, copy_of="other") for job in (experts[0], jobs(tiny, EVALUATE, SIZES)[0]))
    assert _lines([Queued((training, evaluation)), Ended(training, "done"), Ended(evaluation, "done")]) == [
        "expert pgd-1: copied from other (1 of 2)"
    ]


def test_replayed_epochs_are_not_printed(experts: list[Job]) -> None:
    pgd = experts[0]
    lines = _lines([Queued(tuple(experts)), _epoch(pgd, 1, is_replayed=True), _epoch(pgd, 2), Ended(pgd, "done")])
    assert [line.split(",")[0] for line in lines] == ["expert pgd-1: epoch 2/3", "expert pgd-1: done (1 of 3)"]


def test_with_several_seeds_each_line_names_its_seed(tiny: Experiment) -> None:
    other = tiny.model_copy(update={"seed": 7})
    listed = jobs(other, EXPERTS, SIZES)
    names = {experiment.folder: f"seed {experiment.seed}" for experiment in (tiny, other)}
    assert _lines([Queued(tuple(listed)), Ended(listed[0], "done")], names) == ["seed 7 expert pgd-1: done (1 of 3)"]


def test_on_a_terminal_a_table_shows_state_epoch_accuracy_and_time_left(experts: list[Job]) -> None:
    text = _on_terminal([Queued(tuple(experts)), Started(experts[0]), _epoch(experts[0], 2)])
    lines = [line.split() for line in text.splitlines()]
    assert ["expert", "pgd-1", "running", "2/3", "0.500", "90.0%", "25.0%", "321", "1:01"] in lines
    assert ["expert", "benign", "waiting", "0/3"] in lines
    assert "epoch 2/3" not in text


@pytest.mark.parametrize("is_terminal", [False, True])
def test_metrics_with_missing_values_are_a_warning(is_terminal: bool, experts: list[Job]) -> None:
    events = [Queued(tuple(experts)), _epoch(experts[0], 1, loss=None), Ended(experts[0], "done")]
    text = _on_terminal(events) if is_terminal else "\n".join(_lines(events))
    assert "warning: progress: TypeError: " in text
    assert text.count("warning") == 1


# ------------------------------------------------------------------------------------------ total time left


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def planned(experts: list[Job]) -> dict[Job, float]:
    """Three trainings of equal length."""
    return dict.fromkeys(experts, 300.0)


def test_before_any_work_is_done_the_time_left_is_the_planned_one(planned: dict[Job, float], clock: _Clock) -> None:
    estimate = TimeLeft(planned)
    clock.now += 60
    assert estimate.seconds == sum(planned.values())
    assert estimate.basis == "as planned; see --dry-run"
    assert TimeLeft({}).seconds is None


def test_the_remaining_work_takes_as_long_as_the_work_so_far(planned: dict[Job, float], clock: _Clock) -> None:
    estimate, equal = TimeLeft(planned), list(planned)
    clock.now += 60
    estimate.ended(equal[0])
    assert estimate.seconds == pytest.approx(2 * 60)
    estimate.trained(equal[1], epoch=1, is_replayed=False)  # of three: 400 of 900 are done
    assert estimate.seconds == pytest.approx(60 * 500 / 400)
    for job in equal[1:]:
        estimate.ended(job)
    assert estimate.seconds == 0


def test_replayed_epochs_are_work_that_no_longer_remains_and_took_no_time(
    planned: dict[Job, float], clock: _Clock
) -> None:
    estimate, equal = TimeLeft(planned), list(planned)
    estimate.trained(equal[0], epoch=2, is_replayed=True)  # of three
    assert estimate.seconds == sum(planned.values()) - 200
    clock.now += 10
    estimate.ended(equal[0])
    assert estimate.seconds == pytest.approx(10 * 600 / 100)


def test_the_table_shows_the_time_left_and_marks_it_as_an_estimate(planned: dict[Job, float], clock: _Clock) -> None:
    equal = list(planned)
    console = Console(file=io.StringIO(), width=120, record=True)
    show = Progress({}, console)
    show(Queued(tuple(equal), planned))
    clock.now += 65
    show(Ended(equal[0], "done"))
    console.print(show._table())
    assert "1 of 3 done, about 2:10 left (estimated from the work done so far)" in console.export_text()
