"""What a training tells Ray of its epochs."""

from __future__ import annotations

from typing import Any

import pytest
import ray.train

from dwf_cluster.cluster import tasks
from dwf_cluster.data.registry import Sizes
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import jobs


class _Broken:
    def set(self, value: float, tags: dict[str, str]) -> None:
        raise RuntimeError("no metrics agent")


def test_metrics_that_ray_does_not_take_are_a_warning(tiny: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr(tasks, "_gauges", lambda: {"epoch": _Broken()})
    monkeypatch.setattr(ray.train, "report", reported.append)
    job = jobs(tiny, "experts", Sizes(96, 40, (1, 8, 8)))[0]
    with pytest.warns(UserWarning, match="lack epochs of expert pgd-1: RuntimeError: no metrics agent"):
        tasks._report(job, {"epoch": 1})
    assert reported == [{"epoch": 1}]
