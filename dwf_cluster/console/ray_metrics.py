"""Ray's metrics (Prometheus): the last epoch of each model, as gauges `ray_dwf_<column>`."""

from __future__ import annotations

from typing import Any

from dwf_cluster.cluster.events import Epoch, Event

COLUMNS = ("epoch", "loss", "clean_accuracy", "probe_pgd_accuracy", "images_per_second")
"""Columns of `metrics` that become gauges."""


class RayMetrics:
    """Sets Ray's gauges at each epoch. Ray shows them for as long as the run is connected."""

    def __init__(self) -> None:
        self._gauges: Any = None

    def __call__(self, event: Event) -> None:
        """Handle an event; only epochs have metrics."""
        if not isinstance(event, Epoch):
            return
        if self._gauges is None:
            self._gauges = _Gauges() if not _is_client() else _remote_gauges()
        values = {column: float(event.row[column]) for column in COLUMNS if event.row[column] is not None}
        tags = {"experiment": event.job.folder, "model": event.job.model}
        if _is_client():
            self._gauges.set.remote(values, tags)
        else:
            self._gauges.set(values, tags)


class _Gauges:
    """One gauge for each column."""

    def __init__(self) -> None:
        from ray.util.metrics import Gauge

        about = "of the last epoch of a model's training, as in the table metrics"
        self._gauges = {c: Gauge(f"dwf_{c}", f"{c} {about}", ("experiment", "model")) for c in COLUMNS}

    def set(self, values: dict[str, float], tags: dict[str, str]) -> None:
        """Set the gauges of a model."""
        for column, value in values.items():
            self._gauges[column].set(value, tags)


def _is_client() -> bool:
    """Whether this process is connected with `ray://`: then Ray exports no metrics of it."""
    import ray

    return bool(ray.util.client.ray.is_connected())


def _remote_gauges() -> Any:
    """Gauges in a process of the Ray cluster, an actor that ends with the run."""
    import ray

    return ray.remote(_Gauges).options(num_cpus=0, max_restarts=-1).remote()
