"""Sweeps: their experiments, the jobs that these share, and whole sweeps on a real Ray."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import psutil
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dwf_cluster.cluster.events import Ended, Epoch, Listener
from dwf_cluster.data.registry import Sizes
from dwf_cluster.evaluation.settings import Threat
from dwf_cluster.experiment import Experiment
from dwf_cluster.pipeline import sweep as sweeps
from dwf_cluster.pipeline import trials
from dwf_cluster.pipeline.stages import Connection, StageFailed
from dwf_cluster.pipeline.trial_table import TrialTable, column_names, headline
from dwf_cluster.plan.jobs import Job, deduplicate, jobs
from dwf_cluster.plan.resources import Resources
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import StorageFailed, Store, checkpoints

from ..conftest import ARGUMENTS, LOCAL, MODELS, TINY, assert_same, store_of
from ..process import Launch, pause_after_first_epoch, resume_and_stop, wait_for_answer

SIZES = Sizes(96, 40, (1, 8, 8))


def _sweep(*varied: str, seeds: tuple[int | None, ...] = (None,), samples: int | None = None) -> sweeps.Sweep:
    return sweeps.sweep("digits", TINY, varied, seeds, samples, asha=False)


def test_each_combination_of_values_is_a_trial_with_each_seed() -> None:
    sweep = _sweep("pgd.steps=1,2", "gate.kind=soft", "pgd.steps=3", "gate.kind=hard", seeds=(0, 7))
    assert [trial.name for trial in sweep.trials] == [
        f"pgd.steps={steps} gate.kind={kind} seed={seed}"
        for steps in ("1,2", "3")
        for kind in ("soft", "hard")
        for seed in (0, 7)
    ]
    last = sweep.trials[-1]
    assert last.experiment == build("digits", 7, [*TINY, "pgd.steps=3", "gate.kind=hard"])
    assert last.varied == {"pgd.steps": (3,), "gate.kind": "hard", "seed": 7}


def test_without_seeds_trials_have_the_seed_of_the_preset_and_no_seed_in_their_names() -> None:
    assert [trial.name for trial in _sweep("gate.kind=soft", "gate.kind=hard").trials] == [
        "gate.kind=soft",
        "gate.kind=hard",
    ]


def test_random_search_draws_different_combinations_and_always_the_same() -> None:
    widths = [f"gate.hidden={n}" for n in range(1, 101)]
    rates = [f"joint.learning_rate={n / 1000}" for n in range(1, 101)]
    drawn = _sweep(*widths, *rates, seeds=(0, 1), samples=6)
    assert drawn == _sweep(*widths, *rates, seeds=(0, 1), samples=6)
    settings = [trial.name.rpartition(" ")[0] for trial in drawn.trials]
    assert len(settings) == 12
    assert len(set(settings)) == 6
    assert len({setting.partition(" ")[0] for setting in settings}) > 3


def test_the_order_of_trials_does_not_change_the_folder_of_the_sweep() -> None:
    one = _sweep("gate.kind=soft", "gate.kind=hard")
    other = _sweep("gate.kind=hard", "gate.kind=soft")
    assert one.folder == other.folder != _sweep("gate.kind=hard").folder
    assert re.fullmatch(r"sweeps/digits-[0-9a-f]{10}", one.folder)


def _shared(*assignments: list[str], done: tuple[int, ...] = ()) -> dict[tuple[int, str], str | None]:
    """(number of the experiment, task) -> folder that it is copied from, of experiments with these assignments."""
    experiments = [build("digits", 0, [*TINY, *given]) for given in assignments]
    every = [job for stage in ("experts", "joint", "evaluate") for e in experiments for job in jobs(e, stage, SIZES)]
    finished = [job for job in every if job.experiment in [experiments[n] for n in done]]
    todo = deduplicate([job for job in every if job not in finished], finished)
    numbers = {experiment.folder: str(n) for n, experiment in enumerate(experiments)}
    return {(int(numbers[job.folder]), job.name): job.copy_of and numbers[job.copy_of] for job in todo}


NOISE = "evaluation.beyond=noise"


def test_experiments_that_differ_in_the_joint_stage_share_experts_and_their_evaluations() -> None:
    origins = _shared([NOISE], ["joint.epochs=5", NOISE], ["gate.kind=hard", NOISE])
    assert {name for (n, name), origin in origins.items() if n == 0 and origin} == set()
    for number in (1, 2):
        alone = {name for (n, name), origin in origins.items() if n == number and origin is None}
        assert alone == {name for n, name in origins if n == number and (name == "joint" or "mixture" in name)}
        assert {origin for (n, _), origin in origins.items() if n == number} == {None, "0"}


def test_only_equal_jobs_are_shared() -> None:
    def copied(*given: str) -> set[str]:
        return {name for (n, name), origin in _shared([NOISE], [NOISE, *given]).items() if n == 1 and origin}

    experts = {"expert benign", "expert fgsm-1", "expert pgd-1"}
    assert {n for n in copied("pgd.steps=3") if n.startswith("expert")} == experts - {"expert pgd-1"}
    assert {n for n in copied("fgsm.epsilons=0.1") if n.startswith("expert")} == experts - {"expert fgsm-1"}
    assert copied("experts.pgd=2") >= experts
    assert {n for n in copied("evaluation.pgd_steps=1") if n.startswith(("expert", "eval"))} == experts
    for other in (
        "experts.epochs=4",
        "model.width=8",
        "pgd.epsilon=0.2",
        "experts.momentum=0",
        "data.train_examples=64",
    ):
        assert copied(other) == set()


def test_jobs_that_are_done_are_copied() -> None:
    origins = _shared([NOISE], ["joint.epochs=5", NOISE], done=(1,))
    assert origins[0, "expert pgd-1"] == "1"


def test_evaluations_of_transfer_are_not_shared() -> None:
    beyond = "evaluation.beyond=transfer"
    origins = _shared([beyond], ["joint.epochs=5", beyond])
    assert {name for (n, name), origin in origins.items() if n == 1 and "paper" in name and origin} == set()
    assert origins[1, "evaluate pgd-1 checks 0-7"] == "0"


def test_a_copy_waits_for_its_original() -> None:
    first, second = (build("digits", 0, [*TINY, f"joint.epochs={n}"]) for n in (1, 2))
    every = [job for e in (first, second) for job in jobs(e, "experts", SIZES)]
    copy: Job = deduplicate(every, ())[-1]
    assert copy.inputs == {(first.folder, copy.model)}
    assert copy.cost == 0


def test_a_defence_without_parents_is_swept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = sweeps.sweep("digits", [*TINY, "defence=pgd-at"], ["pgd.steps=1", "pgd.steps=2"], [None], None, asha=False)
    names = [trial.name for trial in sweep.trials]
    started: list[str] = []
    monkeypatch.setattr(trials, "run_trials", lambda names, work, **options: started.extend(names))
    cluster: Any = SimpleNamespace(resources=Resources(2, 0))
    connection = Connection(str(tmp_path), cluster, SIZES, None, {}, "", 0)
    running = trials.Trials(
        sweep, sweep.trials, TrialTable(sweep, str(tmp_path)), connection, lambda event: None, lambda: False
    )
    running._run_trials(sweep.trials)
    assert started == names
    assert {job.name for job in running._running.values()} == {"expert pgd-at"}


@pytest.mark.parametrize(
    ("varied", "names"),
    [
        ("pgd.epsilon=0.05 pgd.epsilon=0.15", ["pgd 2 @0.05", "pgd 2 @0.15"]),
        ("pgd.step_size=0.03 pgd.step_size=0.04", ["pgd 2 step_size=0.03", "pgd 2 step_size=0.04"]),
        ("pgd.epsilon=0.05 pgd.epsilon=0.15 evaluation.epsilon=0.1 evaluation.step_size=0.02", ["pgd 2"]),
        ("gate.kind=soft gate.kind=hard", ["pgd 2"]),
    ],
)
def test_accuracies_under_different_attacks_are_in_different_columns(varied: str, names: list[str]) -> None:
    experiments = [trial.experiment for trial in _sweep(*varied.split()).trials]
    columns = column_names(experiments)
    assert len(set(columns.values())) == len(columns)
    assert [name for column, name in columns.items() if (column.attack, column.steps) == ("pgd", 2)] == names
    assert [name for name in headline(dict.fromkeys(columns.values(), 0.0)) if name.startswith("pgd ")] == names
    assert columns[experiments[0].columns[0]] == "clean"


# ------------------------------------------------------------------------------------------ ASHA and seeds

VALIDATED = [*TINY, "data.validation_examples=40", "joint.epochs=4"]


def _asha(*varied: str, seeds: tuple[int | None, ...] = (0, 1), assignments: Sequence[str] = VALIDATED) -> sweeps.Sweep:
    return sweeps.sweep("digits", assignments, varied, seeds, None, asha=True)


def test_asha_looks_at_no_test_images() -> None:
    with pytest.raises(InvalidInput, match=r"^--asha: cannot be used with data\.validation_examples=null: allowed is "):
        _asha("joint.epochs=1", "joint.epochs=2", assignments=TINY)


@pytest.mark.parametrize(
    ("varied", "fixed", "named"),
    [
        ("pgd.epsilon=0.05 pgd.epsilon=0.15", "", r"evaluation\.epsilon: .*\(0\.05, 0\.15\)"),
        ("pgd.epsilon=0.05 pgd.epsilon=0.15", "evaluation.epsilon=0.1", r"evaluation\.step_size: "),
        ("pgd.step_size=0.03 pgd.step_size=0.04", "", r"evaluation\.step_size: .*\(0\.03, 0\.04\)"),
        ("evaluation.probe_steps=1 evaluation.probe_steps=2", "", r"evaluation\.probe_steps: .*\(1, 2\)"),
    ],
)
def test_asha_compares_no_probes_of_different_attacks(varied: str, fixed: str, named: str) -> None:
    with pytest.raises(InvalidInput, match=f"^{named}.* --set evaluation"):
        _asha(*varied.split(), assignments=[*VALIDATED, *fixed.split()])


def test_asha_compares_trainings_of_different_strength_by_one_attack() -> None:
    fixed = [*VALIDATED, "evaluation.epsilon=0.1", "evaluation.step_size=0.02"]
    sweep = _asha("pgd.epsilon=0.05", "pgd.epsilon=0.15", assignments=fixed)
    assert {trial.experiment.threat for trial in sweep.trials} == {Threat(0.1, 0.02)}


class Trainings:
    """A connection whose trainings take no time: the probe of seed s after epoch e is 10 s + e.

    Args:
        failing: seed whose training fails after its first epoch.
    """

    def __init__(self, storage: str, failing: int | None = None) -> None:
        self.storage, self.failing = storage, failing
        self.cluster = SimpleNamespace(is_stopped=lambda folder: False)
        self.calls: list[tuple[list[int], tuple[str, ...], int | None]] = []

    def stores(self, experiments: Sequence[Experiment]) -> dict[Experiment, Store]:
        return {experiment: experiment.store(self.storage) for experiment in experiments}

    def run_stages(
        self,
        experiments: Sequence[Experiment],
        stages: tuple[str, ...],
        emit: Listener,
        stopping: Callable[[], bool],
        model: str,
        until: int | None,
    ) -> None:
        self.calls.append(([experiment.seed for experiment in experiments], stages, until))
        for experiment in experiments:
            (job,) = jobs(experiment, "joint", SIZES)
            for epoch in range(1, 1 + (until or experiment.joint.epochs)):
                emit(Epoch(job, {"epoch": epoch, "probe_pgd_accuracy": 10.0 * experiment.seed + epoch}))
                if experiment.seed == self.failing:
                    emit(Ended(job, "failed", "NonFiniteLoss: nan"))
                    break
        if self.failing in [experiment.seed for experiment in experiments]:
            raise StageFailed


def _work(connection: Any, seeds: int = 2) -> tuple[list[Mapping[str, Any]], Mapping[str, Any]]:
    """The reports of a setting with two seeds under ASHA, and its last report."""
    groups, reports = {"setting": _asha(seeds=(0, 1)).trials}, list[Mapping[str, Any]]()
    last = trials._Work(groups, seeds, (1, 2), connection)("setting", reports.append, lambda: False)
    return reports, last


def test_asha_sees_the_mean_over_seeds_at_equal_epochs(tmp_path: Path) -> None:
    connection = Trainings(str(tmp_path))
    reports, last = _work(connection)
    means = [(report["epoch"], report["probe_pgd_accuracy"]) for report in reports if "epoch" in report]
    assert means == [(1, 6.0), (2, 7.0), (3, 8.0)]
    assert (last["epoch"], last["probe_pgd_accuracy"]) == (4, 9.0)
    assert len(reports) == 2 * 4  # each epoch of each seed is shown


def test_seeds_wait_for_each_other_where_asha_compares(tmp_path: Path) -> None:
    connection = Trainings(str(tmp_path))
    _work(connection)
    assert connection.calls[:3] == [
        ([0, 1], ("joint",), 1),
        ([0, 1], ("joint",), 2),
        ([0, 1], ("joint", "evaluate"), None),
    ]


def test_a_seed_that_fails_ends_the_comparison_and_not_the_other_seed(tmp_path: Path) -> None:
    connection = Trainings(str(tmp_path), failing=0)
    reports, last = _work(connection)
    assert [report["epoch"] for report in reports if "epoch" in report] == [1]
    assert connection.calls[1:] == [([1], ("joint", "evaluate"), None), ([1], ("evaluate",), None)]
    assert last["outcomes"]["seed=0"] == ("failed", "stage joint, joint: NonFiniteLoss: nan")


def test_a_setting_that_lacks_seeds_is_not_judged(tmp_path: Path) -> None:
    """As when ASHA of an older version has stopped some of its seeds."""
    connection = Trainings(str(tmp_path))
    reports, last = _work(connection, seeds=3)
    assert not any("epoch" in report for report in reports)
    assert last["epoch"] == 0
    assert [until for _, _, until in connection.calls] == [None, None]


def test_a_damaged_trial_table_is_one_line(tmp_path: Path) -> None:
    sweep = _sweep("gate.kind=soft", "gate.kind=hard")
    Store(str(tmp_path), sweep.folder).write(TrialTable.FILE, b"damaged")
    with pytest.raises(StorageFailed, match=r"trials\.parquet: not the Parquet file that was written; remove it"):
        TrialTable(sweep, str(tmp_path))


# ------------------------------------------------------------------------------------------ on a real Ray

KINDS = ["gate.kind=soft", "gate.kind=hard"]
SWEEP = [*ARGUMENTS, "--sweep", *KINDS]
PROMETHEUS = "prom_metrics_service_discovery.json"
"""Ray lists its metrics endpoints for Prometheus there."""

Swept = tuple[Path, subprocess.CompletedProcess[str], dict[str, Any]]


def _outcomes(folder: Path) -> list[pd.DataFrame]:
    tables = (folder / "runs" / "sweeps").glob("*/trials.parquet")
    return [pd.read_parquet(table).set_index("trial") for table in tables]


def _outcome(folder: Path) -> pd.DataFrame:
    (table,) = _outcomes(folder)
    return table


def _trial(folder: Path, name: str) -> Path:
    return folder / "runs" / str(_outcome(folder).folder[name])


class RayMetrics:
    """Everything that a Ray shows Prometheus, from when its address is known until the `with` block ends.

    A metric lasts as long as the process that set it, so metrics are read all the time.
    """

    def __init__(self) -> None:
        self.samples: dict[str, set[float]] = {}
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> RayMetrics:
        return self

    def watch(self, ray: Path) -> None:
        """Begin to read the metrics of the Ray whose files are in this folder."""
        self._thread = threading.Thread(target=self._read, args=(ray / PROMETHEUS,), daemon=True)
        self._thread.start()

    def _read(self, discovery: Path) -> None:
        while not self._over.wait(0.2):
            with contextlib.suppress(OSError, ValueError):  # not written yet, not listening yet, or ended already
                (targets,) = (group["targets"] for group in json.loads(discovery.read_text()))
                for target in targets:
                    text = urllib.request.urlopen(f"http://{target}/metrics", timeout=60).read().decode()
                    for name, value in re.findall(r"^(ray_dwf_\S+\{.*\}) (\S+)$", text, re.M):
                        self.samples.setdefault(name, set()).add(float(value))

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._thread:
            self._thread.join()


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """The folder of a sweep over two kinds of gates, its output, and the data of Ray's dashboard."""
    launch = Launch(tmp_path_factory.mktemp("sweep"))
    dashboard_data: dict[str, Any] = {}
    dashboard: list[str] = []

    def look(driver: psutil.Process, line: str) -> None:
        for resource in ("tasks", "actors"):
            request = urllib.request.Request(f"{dashboard[0]}/api/v0/{resource}?detail=true&limit=10000")
            request.add_header("Authorization", f"Bearer {Path(dashboard[1]).read_text()}")
            dashboard_data[resource] = json.loads(wait_for_answer(request))["data"]["result"]["result"]

    def remember(driver: psutil.Process, line: str) -> None:
        match = re.match(r"Ray dashboard: (\S+) .* `cat (\S+)`", line)
        assert match is not None
        dashboard.extend(match.groups())
        metrics.watch(Path(dashboard[1]).with_name("ray"))

    steps = [("^Ray dashboard", remember), (r"^gate\.kind=hard joint: epoch 1/3", look)]
    with pytest.MonkeyPatch.context() as environment, RayMetrics() as metrics:
        environment.setenv("RAY_metrics_report_interval_ms", "250")  # epochs take a second, Ray reports every ten
        code, errors, lines = launch.run_with_steps(steps, "--tensorboard", "tensorboard", *SWEEP)
    assert code == 0, errors
    dashboard_data["metrics"] = metrics.samples
    return launch.folder, subprocess.CompletedProcess([], code, "\n".join(lines), errors), dashboard_data


def test_a_trial_equals_the_same_experiment_run_alone_bit_for_bit(
    swept: Swept,
    reference_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    assert_same(_trial(swept[0], "gate.kind=soft"), reference_run[0])


def test_experts_are_trained_once_and_copied_with_their_rows(
    swept: Swept,
) -> None:
    soft, hard = (_trial(swept[0], kind) for kind in KINDS)
    assert_same(soft, hard, models=["benign", "fgsm-1", "pgd-1"], tables=[])
    trained, copied = (pd.read_parquet(folder / "results" / "jobs").set_index("task") for folder in (soft, hard))
    assert set(trained.state) == {"done"}
    assert set(copied[copied.stage == "experts"].state) == {"shared"}
    assert set(copied[copied.index.str.contains("pgd-1 checks")].state) == {"shared"}
    assert set(copied[copied.index.str.contains("mixture")].state) == {"done"}
    assert copied.seconds["expert pgd-1"] == trained.seconds["expert pgd-1"]
    state = json.loads(sorted((hard / "checkpoints" / "pgd-1").glob("*/state.json"))[-1].read_text())
    assert state["copied_from"] == soft.name
    assert not list((hard / "checkpoints" / "pgd-1").glob("*/tensors.safetensors"))  # stored once
    metrics = pd.read_parquet(hard / "results" / "metrics")
    assert set(metrics.experiment) == {hard.name.rpartition("-")[2]}
    assert metrics.groupby("model").epoch.apply(list).to_dict() == {
        model: [1, 2, 3] for model in ("benign", "fgsm-1", "pgd-1", "mixture")
    }


def test_the_trial_table_has_the_varied_fields_and_the_results_of_each_trial(
    swept: Swept,
) -> None:
    folder, result, _ = swept
    outcome = _outcome(folder)
    assert outcome.state.to_dict() == dict.fromkeys(KINDS, "done")
    assert outcome["gate.kind"].tolist() == ["soft", "hard"]
    for kind in KINDS:
        rows = pd.read_parquet(_trial(folder, kind) / "results" / "evaluations")
        accuracy = rows[rows.model == "mixture"].set_index(["attack", "steps"]).accuracy
        assert outcome.loc[kind, "pgd 2"] == accuracy["pgd", 2]
        assert outcome.loc[kind, "restarts 2x2"] == accuracy["pgd_restarts", 2]
        line = next(line for line in result.stdout.splitlines() if line.split()[:2] == [kind[10:], "done"])
        assert line.split()[2] == f"{100 * outcome.loc[kind, 'clean']:.1f}"


def test_the_dashboard_names_trials_and_tasks_by_the_varied_fields(
    swept: Swept,
) -> None:
    dashboard_data = swept[2]
    assert {"gate.kind=soft expert pgd-1", "gate.kind=soft joint", "gate.kind=hard joint"} <= {
        task["name"] for task in dashboard_data["tasks"]
    }
    assert set(KINDS) <= {actor["repr_name"] for actor in dashboard_data["actors"]}


def test_rays_metrics_have_the_last_epoch_of_each_model(swept: Swept) -> None:
    folder, _, dashboard_data = swept
    trial = _trial(folder, "gate.kind=soft")
    metrics = pd.read_parquet(trial / "results" / "metrics").set_index("model")
    for model in ("fgsm-1", "pgd-1"):
        for column in ("epoch", "probe_pgd_accuracy"):
            name = rf'ray_dwf_{column}\{{[^}}]*experiment="{trial.name}"[^}}]*model="{model}"[^}}]*\}}'
            (values,) = (values for sample, values in dashboard_data["metrics"].items() if re.fullmatch(name, sample))
            assert values <= set(metrics.loc[model, column])


def test_tensorboards_event_files_have_every_epoch_of_every_model(swept: Swept) -> None:
    for kind in KINDS:
        folder = _trial(swept[0], kind)
        metrics = pd.read_parquet(folder / "results" / "metrics").set_index(["model", "epoch"])
        for model in MODELS:
            events = EventAccumulator(str(swept[0] / "tensorboard" / folder.name / model))
            events.Reload()
            curve = {event.step: event.value for event in events.Scalars("loss")}
            assert curve == pytest.approx(metrics.loss[model].to_dict(), rel=1e-6)


def test_the_same_sweep_again_does_nothing_and_prints_the_same_table(
    swept: Swept,
) -> None:
    folder, first, _ = swept
    again = Launch(folder)(*SWEEP)
    assert again.returncode == 0
    assert again.stdout.splitlines()[:3] == [f"{s}: done already, skipped" for s in ("experts", "joint", "evaluate")]
    table = first.stdout[first.stdout.index("Accuracy of the defended model") :].strip()
    assert table in again.stdout


@pytest.mark.interruptions
def test_asha_stops_all_seeds_of_a_setting_that_falls_behind_for_good(launch: Launch) -> None:
    """It is compared with a setting that is done, so it is certain which one falls behind."""
    learnable = ["data.train_examples=300", "data.validation_examples=40", "joint.epochs=3"]  # with 96, both guess
    arguments = [*LOCAL, "--set", *TINY, *learnable, "--sweep", "seeds=0,1"]
    good, useless = "joint.learning_rate=0.01", "joint.learning_rate=5.0"
    assert launch(*arguments, good).returncode == 0
    result = launch(*arguments, good, useless, "--asha")
    assert result.returncode == 0, result.stderr
    states = {f"{good} seed={seed}": "done" for seed in (0, 1)}
    stopped = [f"{useless} seed={seed}" for seed in (0, 1)]
    states |= dict.fromkeys(stopped, "stopped early")
    for name in stopped:
        assert f"{name}: stopped early\n" in result.stdout
    (sweep,) = (sweep for sweep in _outcomes(launch.folder) if len(sweep) == len(states))
    assert sweep.state.to_dict() == states
    for name in stopped:
        saved = checkpoints.load_latest(store_of(launch.folder / "runs" / str(sweep.folder[name])), "mixture")
        assert saved is not None
        assert saved.epoch < 3
    again = launch(*arguments, good, useless, "--asha")
    assert again.stdout.startswith("experts: done already, skipped\njoint: done already, skipped\n")
    assert "stopped early" in again.stdout


@pytest.mark.interruptions
def test_a_trial_that_fails_does_not_stop_the_others(launch: Launch) -> None:
    rates = ["joint.learning_rate=0.01", "joint.learning_rate=100"]
    result = launch(*LOCAL, "--set", *TINY, "joint.epochs=4", "--sweep", *rates)
    assert result.returncode == 1
    assert result.stderr.startswith("failed: trial joint.learning_rate=100.0: stage joint, ")
    assert "NonFiniteLoss: " in result.stderr
    assert "\nresume: python -m dwf_cluster.launch --local" in result.stderr
    assert "Traceback" not in result.stderr
    assert _outcome(launch.folder).state.tolist() == ["done", "failed"]


@pytest.mark.interruptions
def test_an_interrupted_and_killed_sweep_resumes_to_the_same_bits(launch: Launch, swept: Swept) -> None:
    def interrupt(driver: psutil.Process, line: str) -> None:
        training = pause_after_first_epoch(launch.folder, "joint")
        driver.send_signal(signal.SIGINT)
        resume_and_stop(training)

    def kill(driver: psutil.Process, line: str) -> None:
        driver.kill()

    code, errors = launch.run_and_act_at("^Ray dashboard", interrupt, *SWEEP)
    assert code == 130
    assert "\nresume: python -m dwf_cluster.launch --local" in errors
    assert "stopped" in set(_outcome(launch.folder).state)
    code, _ = launch.run_and_act_at(r"^gate\.kind=\w+ joint: epoch [23]/3", kill, *SWEEP)
    assert code == -signal.SIGKILL
    result = launch(*SWEEP)
    assert result.returncode == 0, result.stderr
    assert "experts: done already, skipped" in result.stdout
    for kind in KINDS:
        assert_same(_trial(launch.folder, kind), _trial(swept[0], kind))
