"""Trials on Ray Tune. A trial holds neither CPU nor GPU: only the jobs that it starts do.

Importing this module imports Ray Tune, which takes seconds.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler

from dwf_cluster.cluster import failures, temporary

REDUCTION, GRACE = 2, 0.25
"""ASHA: one in `REDUCTION` of the trials that reach a rung continues; the first rung is at `GRACE` of all epochs."""

METRIC, TIME = "probe_pgd_accuracy", "epoch"
"""ASHA compares trials by the `METRIC` of their reports at equal `TIME`; it ignores reports without these."""

OUTCOMES = "outcomes"
"""The key that only the last report of a trial has."""

Report = Callable[[Mapping[str, Any]], None]
Work = Callable[[str, Report, Callable[[], bool]], Mapping[str, Any]]
"""(trial, report, stopping) -> last report, which has `OUTCOMES`. Runs in the trial's process."""


def rungs(epochs: int) -> list[int]:
    """The epochs after which ASHA compares trials that train at most this many epochs, rising, without the last."""
    first = _grace(epochs)
    return [first * REDUCTION**k for k in range(epochs) if first * REDUCTION**k < epochs]


def _grace(epochs: int) -> int:
    return max(1, round(GRACE * epochs))


def run_trials(
    names: Sequence[str],
    work: Work,
    *,
    concurrent: int,
    asha_epochs: int | None,
    on_report: Callable[[str, Mapping[str, Any]], None],
    on_end: Callable[[str, Mapping[str, Any] | None, str], None],
    on_step: Callable[[], None],
) -> None:
    """Run trials to their ends.

    Args:
        names: of the trials.
        work: what each trial does.
        concurrent: how many trials run at once.
        asha_epochs: if ASHA is to stop trials early, the most epochs that one trains. None: no trial is stopped early.
        on_report: called with the trial and each of its reports.
        on_end: called with each trial that has ended, its last report (None if it was stopped early or failed), and
            why it failed.
        on_step: called at each step of Tune.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # the caller stops trials
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"  # not every report has a metric
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the new output prints at any verbosity
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # the caller prints what users need
    with temporary.folder() as folder:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(_Trial, work=work), _resources()),
            param_space={"trial": tune.grid_search(list(names))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=concurrent,
                scheduler=_asha(asha_epochs) if asha_epochs else None,
                trial_name_creator=lambda trial: trial.config["trial"],
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                verbose=0,
                callbacks=[_Callback(on_report, on_end, on_step)],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                # For trials whose process died.
                failure_config=tune.FailureConfig(max_failures=failures.WORKER_DIED.retries),
            ),
        ).fit()


class _Trial(tune.Trainable):  # type: ignore[misc]
    """Runs `work` in a thread, and gives Tune one of its reports a step."""

    def setup(self, config: dict[str, Any], work: Work) -> None:
        self._reports: queue.Queue[Any] = queue.Queue()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run_work, args=(config["trial"], work), daemon=True)
        self._thread.start()

    def __repr__(self) -> str:  # its name in the dashboard
        return str(self.config["trial"])

    def _run_work(self, name: str, work: Work) -> None:
        try:
            self._reports.put({**work(name, self._reports.put, self._over.is_set), "done": True})
        except BaseException as error:
            self._reports.put(error)

    def step(self) -> Any:
        report = self._reports.get()
        if isinstance(report, BaseException):
            raise report
        return report

    def cleanup(self) -> None:
        self._over.set()
        self._thread.join()


class _Callback(tune.Callback):  # type: ignore[misc]
    """Passes the events of Tune to the functions of `run_trials`."""

    def __init__(
        self,
        on_report: Callable[[str, Mapping[str, Any]], None],
        on_end: Callable[[str, Mapping[str, Any] | None, str], None],
        on_step: Callable[[], None],
    ) -> None:
        self._on_report, self._on_end, self._on_step = on_report, on_end, on_step

    def __reduce__(self) -> tuple[Any, ...]:
        return tune.Callback, ()  # in Tune's own files, which are never read

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        self._on_step()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if OUTCOMES not in result:
            self._on_report(trial.config["trial"], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result
        self._on_end(trial.config["trial"], last if OUTCOMES in last else None, "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        *_, reason = ["its process died", *str(trial.get_error() or "").strip().splitlines()]
        self._on_end(trial.config["trial"], None, reason)


def _asha(epochs: int) -> ASHAScheduler:
    return ASHAScheduler(
        time_attr=TIME,
        metric=METRIC,
        mode="max",
        max_t=epochs,
        grace_period=_grace(epochs),
        reduction_factor=REDUCTION,
        stop_last_trials=False,
    )


def _resources() -> dict[str, float]:
    """Keep the processes of trials on this node, where Tune's own files are; the store has ours."""
    (node,) = (node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    names = (name for name in node["Resources"] if name.startswith("node:") and name != "node:__internal_head__")
    return {"cpu": 0, next(names): 0.001}
