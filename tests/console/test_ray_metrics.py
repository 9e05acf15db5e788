"""Gauges of Ray: each epoch sets them, and a failure is a warning. tests/pipeline/test_sweep.py reads them from Ray."""

from __future__ import annotations

from typing import Any

import pytest

from dwf_cluster.cluster.events import Ended, Epoch, Event, Listeners, Note
from dwf_cluster.console import ray_metrics
from dwf_cluster.console.ray_metrics import COLUMNS, RayMetrics
from dwf_cluster.data.registry import Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import EXPERTS, Job, jobs

ROW = dict.fromkeys(COLUMNS, 2)


@pytest.fixture
def job(tiny: Experiment) -> Job:
    return jobs(tiny, EXPERTS, Sizes(96, 40, (1, 8, 8)))[0]


class _Broken:
    def set(self, values: dict[str, float], tags: dict[str, str]) -> None:
        raise RuntimeError("no metrics agent")


class _Recorder:
    def __init__(self) -> None:
        self.calls: list[Any] = []

    def set(self, *arguments: Any) -> None:
        self.calls.append(arguments)


def test_each_epoch_sets_the_gauges_of_its_model(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    gauges = _Recorder()
    monkeypatch.setattr(ray_metrics, "_Gauges", lambda: gauges)
    metrics = RayMetrics()
    for event in (Epoch(job, ROW | {"loss": None}), Ended(job, "done")):
        metrics(event)
    values = {column: 2.0 for column in COLUMNS if column != "loss"}
    assert gauges.calls == [(values, {"experiment": job.folder, "model": job.model})]


def test_metrics_that_ray_does_not_take_are_one_warning(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_metrics, "_Gauges", _Broken)
    events: list[Event] = []
    emit = Listeners({"Ray's metrics": RayMetrics(), "progress": events.append})
    for epoch in (Epoch(job, ROW), Epoch(job, ROW)):
        emit(epoch)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert notes == ["warning: Ray's metrics: RuntimeError: no metrics agent; the run continues"]
