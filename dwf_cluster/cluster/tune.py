"""Trials on Ray Tune. A trial holds neither CPU nor GPU: what it starts does, so none waits for what another holds."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dwf_cluster.cluster import failures, temporary

REDUCTION, GRACE = 2, 0.25
"""ASHA: of the trials that reach a rung, one in so many goes on; the first rung, as a share of all epochs."""

Report = Callable[[Mapping[str, Any]], None]
Work = Callable[[str, Report, Callable[[], bool]], Mapping[str, Any]]
"""(trial, report, stopping) -> last report, which has a `state`. Runs in the trial's process."""


def run_trials(
    names: Sequence[str],
    work: Work,
    concurrent: int,
    epochs: int | None,
    heard: Callable[[str, Mapping[str, Any]], None],
    ended: Callable[[str, Mapping[str, Any] | None, str], None],
    tick: Callable[[], None],
) -> None:
    """Run trials to their ends.

    Args:
        names: theirs.
        work: what each does.
        concurrent: how many run at once.
        epochs: if ASHA is to stop trials early, the most that one trains; it goes by `probe_pgd_accuracy` at
            `epoch` of the reports. None: each comes to its end.
        heard: is given each report as it comes, with its trial.
        ended: is given each trial that has ended, its last report (None if it was stopped early, or failed), and
            why it failed.
        tick: is called again and again.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # stopping is the caller's
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # which would talk at any verbosity
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what is to be said, the caller says
    import ray
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    class Trial(tune.Trainable):  # type: ignore[misc]
        def setup(self, config: dict[str, Any], work: Work) -> None:
            self._news: queue.Queue[Any] = queue.Queue()
            self._over = threading.Event()
            self._thread = threading.Thread(target=self._go, args=(config["trial"], work), daemon=True)
            self._thread.start()

        def __repr__(self) -> str:  # its name in the dashboard
            return str(self.config["trial"])

        def _go(self, name: str, work: Work) -> None:
            try:
                self._news.put({**work(name, self._news.put, self._over.is_set), "done": True})
            except BaseException as error:
                self._news.put(error)

        def step(self) -> Any:
            news = self._news.get()
            if isinstance(news, BaseException):
                raise news
            return news

        def cleanup(self) -> None:
            self._over.set()
            self._thread.join()

    class Watch(tune.Callback):  # type: ignore[misc]
        def __reduce__(self) -> tuple[Any, ...]:
            return tune.Callback, ()  # in Tune's own notes, which nobody reads

        def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
            tick()

        def on_trial_result(
            self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
        ) -> None:
            if "state" not in result:
                heard(trial.config["trial"], result)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            last = trial.last_result
            ended(trial.config["trial"], last if "state" in last else None, "")

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            *_, reason = ["its process died", *str(trial.get_error() or "").strip().splitlines()]
            ended(trial.config["trial"], None, reason)

    asha = epochs and ASHAScheduler(
        time_attr="epoch",
        metric="probe_pgd_accuracy",
        mode="max",
        max_t=epochs,
        grace_period=max(1, round(GRACE * epochs)),
        reduction_factor=REDUCTION,
        stop_last_trials=False,
    )
    # All that a trial's process asks for is to be on this node, where Tune's own notes are; the store has ours.
    (node,) = (node for node in ray.nodes() if node["NodeID"] == ray.get_runtime_context().get_node_id())
    here = next(name for name in node["Resources"] if name.startswith("node:") and name != "node:__internal_head__")
    with temporary.folder() as folder:
        tune.Tuner(
            tune.with_resources(tune.with_parameters(Trial, work=work), {"cpu": 0, here: 0.001}),
            param_space={"trial": tune.grid_search(list(names))},
            tune_config=tune.TuneConfig(
                max_concurrent_trials=concurrent,
                scheduler=asha or None,
                trial_name_creator=lambda trial: trial.config["trial"],
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name="sweep",
                storage_path=folder,
                verbose=0,
                callbacks=[Watch()],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=tune.FailureConfig(
                    max_failures=failures.WORKER_DIED.retries
                ),  # a trial whose process died
            ),
        ).fit()
