"""The whole pipeline on a real Ray, from the command line: run, repeated, interrupted, killed, on two workers."""

from __future__ import annotations

import json
import platform
import re
import shutil
import signal
import subprocess
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from dwf_cluster import status
from dwf_cluster.data import sources
from dwf_cluster.evaluation.adversarial import read, verify
from dwf_cluster.evaluation.column import expert_columns
from dwf_cluster.evaluation.registry import CHECKS, columns
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.disk_space import stored_bytes
from dwf_cluster.plan.jobs import pending
from dwf_cluster.presets import build
from dwf_cluster.store import checkpoints, tables

from ..conftest import ARGUMENTS, LOCAL, LONG_EPOCHS, MODELS, NO_MIXTURE, TINY, assert_same, store_of
from ..process import Launch, command_line, pause_after_first_epoch, resume_and_stop, wait_for_answer

SHARDS = 2
"""Shards of the 40 test images, of 24 images at most."""


def _suites(experiment: Experiment) -> list[str]:
    """The suites of columns that are measured, for one model after the other."""
    return [suite for spec in experiment.models for suite in experiment.suites(spec) if suite != CHECKS]


def test_a_run_stores_checkpoints_tables_and_the_experiment(
    reference_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = reference_run
    experiment = build("digits", 0, [*TINY, *LONG_EPOCHS])
    assert Experiment.from_json((folder / "experiment.json").read_text()) == experiment
    assert folder.name == experiment.folder
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["benign", "fgsm-1", "joint", "pgd-1"]
    for table, schema in tables.SCHEMAS.items():
        for file in (folder / "results" / table).iterdir():
            assert pq.read_schema(file).equals(schema)
    metrics = pd.read_parquet(folder / "results" / "metrics")
    assert metrics.groupby("model").epoch.apply(list).to_dict() == {model: [1, 2, 3] for model in MODELS}
    evaluations = pd.read_parquet(folder / "results" / "evaluations")
    own = sum(len(columns(experiment.evaluation, experiment.threats, suite)) for suite in _suites(experiment))
    transferred = len(MODELS) * (len(MODELS) - 1)
    parts = len(expert_columns(experiment.evaluation, experiment.threat, experiment.defended.parents))
    assert len(evaluations) == own + transferred + parts + len(MODELS)  # with the worst case of each
    assert set(evaluations.examples) == {40}
    shards = pd.read_parquet(folder / "results" / "shards")
    assert len(shards) == SHARDS * (own + transferred + parts)
    assert set(shards["first"]) == {0, 24}
    assert (evaluations.accuracy_low <= evaluations.accuracy).all()
    predictions = pd.read_parquet(folder / "results" / "predictions")
    assert len(predictions) == 40 * len(evaluations)
    gates = predictions[predictions.model == "mixture"].gate
    assert all(len(gate) == 3 and abs(sum(gate) - 1) < 1e-5 for gate in gates)
    assert predictions[predictions.model != "mixture"].gate.isna().all()


def test_the_adversarial_images_of_every_shard_are_kept_and_can_be_verified(
    reference_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = reference_run
    images = sources.load(build("digits", 0, TINY).data, Path())
    files = sorted((folder / "adversarial").iterdir())
    assert [file.stem for file in files] == sorted(f.stem for f in (folder / "results" / "shards").iterdir())
    predictions = pd.read_parquet(folder / "results" / "predictions")
    for file in files:
        if "-experts-" in file.name:  # its images are about parts of the mixture
            continue
        kept = read(file)
        verify(kept, images.x_test, images.y_test, file)
        model = predictions[predictions.model == kept.source[0]]
        for attack, steps in dict.fromkeys(zip(kept.attack, kept.steps, strict=True)):
            own = (kept.attack == attack) & (kept.steps == steps)
            rows = model[(model.attack == attack) & (model.steps.fillna(-1) == steps)]
            rows = rows[rows.example.isin(kept.index)].sort_values(["epsilon", "example"])
            order = np.lexsort((kept.index[own], kept.epsilon[own]))
            assert kept.prediction[own][order].tolist() == rows.prediction.tolist()


def test_an_evaluation_without_its_adversarial_images_is_pending_if_they_are_to_be_kept(
    reference_run: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    folder = tmp_path / reference_run[0].name
    shutil.copytree(reference_run[0], folder)
    (removed, *_) = sorted((folder / "adversarial").iterdir())
    removed.unlink()
    for kept, expected in (("uint8", [removed.stem]), ("null", [])):
        experiment = build("digits", 0, [*TINY, *LONG_EPOCHS, f"save_adversarial={kept}"])
        assert experiment.folder == folder.name
        waiting = pending(experiment, experiment.store(str(tmp_path)), sources.sizes(experiment.data))
        assert [job.file for listed in waiting.values() for job in listed] == expected


def test_every_job_has_a_readable_name_and_a_row(
    reference_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = reference_run
    jobs = pd.read_parquet(folder / "results" / "jobs")
    assert {"expert pgd-1", "joint", "evaluate mixture paper 0-23", "evaluate mixture checks 0-7"} <= set(jobs.task)
    suites = len(_suites(build("digits", 0, [*TINY, *LONG_EPOCHS])))
    checks = trainings = len(MODELS)
    assert len(jobs) == trainings + SHARDS * suites + checks
    assert set(jobs.state) == {"done"}
    assert set(jobs.attempts) == {1}
    assert (jobs.finished >= jobs.started).all()
    assert (jobs.peak_memory_bytes > 1e8).all()
    experts = jobs[jobs.stage == "experts"].sort_values("started").task
    assert experts.iloc[-1] == "expert benign"  # longest first, two at a time


def test_a_run_prints_progress_the_table_and_how_to_read_the_results(
    reference_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, result = reference_run
    lines = result.stdout.splitlines()
    assert lines[-1] == str(folder)
    assert re.search(r"^expert pgd-1: epoch 3/3, loss \d+\.\d+, clean [\d.]+%, PGD probe", result.stdout, re.M)
    assert re.search(r"^Ray dashboard: http://127\.0\.0\.1:\d+ \(token authentication is on; ", result.stdout, re.M)
    rows = [line.split() for line in lines if line.strip() and line.split()[0] in MODELS]
    assert [row[0] for row in rows] == ["benign", "mixture", "fgsm-1", "pgd-1"] * 2  # the transfer matrix follows
    assert {len(row) for row in rows[4:]} == {1 + 3}
    assert re.search(
        r"^signs of gradient masking: (\d+|none) in \d+ checks of 4 models on 8 and 40 images; \d+ of them could fire$",
        result.stdout,
        re.M,
    )
    evaluations = pd.read_parquet(folder / "results" / "evaluations").set_index(["model", "attack"])
    for row in rows[:4]:
        assert len(row) == 1 + 16 + 2 * (row[0] == "mixture")
        assert row[1] == f"{100 * evaluations.loc[(row[0], 'clean')].accuracy.item():.1f}"
        assert row[14] == f"{100 * evaluations.loc[(row[0], 'pgd_adaptive')].accuracy.item():.1f}"
        assert row[-2] == f"{100 * evaluations.loc[(row[0], 'noise')].accuracy.item():.1f}"
        assert row[-1] == f"{100 * evaluations.loc[(row[0], 'worst_case')].accuracy.item():.1f}"
    (line,) = (line for line in lines if line.startswith("read them: "))
    program = f"{line.removeprefix('read them: import pandas; ')}"
    assert len(eval(program, {"pandas": pd})) == len(evaluations)


def test_the_same_command_again_skips_jobs_that_are_done(
    reference_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, first = reference_run
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    second = Launch(folder.parent.parent)(*ARGUMENTS)
    assert second.returncode == 0
    assert second.stdout.splitlines()[:3] == [f"{s}: done already, skipped" for s in ("experts", "joint", "evaluate")]
    table = first.stdout.index("Accuracy in percent")
    assert first.stdout[table:] in second.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_interrupted_and_killed_run_resumes_to_the_same_bits(
    launch: Launch, reference_run: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    refused: list[str] = []

    def interrupt(driver: psutil.Process, line: str) -> None:
        training = pause_after_first_epoch(launch.folder, "expert pgd-1")
        driver.send_signal(signal.SIGINT)
        resume_and_stop(training)

    def kill(driver: psutil.Process, line: str) -> None:
        training = pause_after_first_epoch(launch.folder, "joint")
        second = launch(*ARGUMENTS)
        assert second.returncode == 1
        refused.append(second.stderr.splitlines()[0])
        assert refused[0].startswith(
            f"failed: {folder.name} is being run by {platform.node()} (process {driver.pid}) since 20"
        )
        training.kill()
        driver.kill()

    code, stderr = launch.run_and_act_at("^Ray dashboard", interrupt, *ARGUMENTS)
    assert code == 130
    assert stderr.splitlines()[0] == "stopping: trainings save what they have; again to stop at once"
    assert stderr.splitlines()[1] == "interrupted; what is done is kept"
    assert stderr.splitlines()[2].startswith("resume: python -m dwf_cluster.launch --local")
    (folder,) = (launch.folder / "runs").iterdir()
    assert checkpoints.latest_epoch(store_of(folder), "pgd-1") in (1, 2)

    (line,) = _status(launch)
    assert line.split()[1] == "stopped"
    code, _ = launch.run_and_act_at("^Ray dashboard", kill, *ARGUMENTS)
    assert code == -signal.SIGKILL
    assert refused
    assert checkpoints.latest_epoch(store_of(folder), "mixture") in (1, 2)

    result = launch(*ARGUMENTS)  # takes over at once: the owner's process is gone
    assert result.returncode == 0, result.stderr
    assert "experts: done already, skipped" in result.stdout
    assert_same(folder, reference_run[0])
    jobs = pd.read_parquet(folder / "results" / "jobs").set_index("task")
    assert jobs.loc[["expert pgd-1", "joint"], "attempts"].tolist() == [2, 2]
    assert set(jobs.state) == {"done"}
    (line,) = _status(launch)
    evaluations = int((jobs.stage == "evaluate").sum())
    assert line.split()[1:5] == ["done", "3/3", "1/1", f"{evaluations}/{evaluations}"]


def _status(launch: Launch) -> list[str]:
    """The lines of experiments that `python -m dwf_cluster.status` prints."""
    return [line for line in status.lines(str(launch.folder / "runs")) if line.startswith("digits-")]


@pytest.mark.interruptions
def test_a_killed_worker_is_replaced_and_changes_no_number(
    launch: Launch, reference_run: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    def kill_worker(driver: psutil.Process, line: str) -> None:
        pause_after_first_epoch(launch.folder, "joint").kill()

    folder = launch.folder / "runs" / reference_run[0].name
    shutil.copytree(reference_run[0], folder, ignore=NO_MIXTURE)
    code, stderr = launch.run_and_act_at("^Ray dashboard", kill_worker, *ARGUMENTS)
    assert code == 0, stderr
    assert_same(folder, reference_run[0])
    jobs = pd.read_parquet(folder / "results" / "jobs").set_index("task")
    assert jobs.loc["joint", "attempts"] == 2


def test_the_last_checkpoint_has_no_optimizer_and_the_one_before_has(
    reference_run: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    for model in ("pgd-1", "joint"):
        older, last = sorted((reference_run[0] / "checkpoints" / model).iterdir())
        kinds = [{name.partition(".")[0] for name in load_file(f / "tensors.safetensors")} for f in (older, last)]
        assert kinds == [{"model", "momentum"}, {"model"}]


def test_the_stored_bytes_are_as_estimated(reference_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    experiment = build("digits", 0, [*TINY, *LONG_EPOCHS])
    estimates = stored_bytes([experiment], sources.sizes(experiment.data))
    for folder, estimate in zip(("checkpoints", "results"), estimates, strict=True):
        stored = sum(path.stat().st_size for path in (reference_run[0] / folder).rglob("*") if path.is_file())
        assert 0.5 < estimate / stored < 2, (folder, estimate, stored)


def _remove(folder: Path, *files: str) -> None:
    for file in files:
        path = folder / "results" / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_removed_evaluations_are_merged_again_without_ray(
    launch: Launch, reference_run: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    copy = launch.folder / "runs" / reference_run[0].name
    shutil.copytree(reference_run[0], copy)
    table = reference_run[1].stdout[reference_run[1].stdout.index("Accuracy in percent") :]
    for removed in ("evaluations/evaluate-pgd-1-paper.parquet", "evaluations"):
        _remove(copy, removed)
        result = launch(*ARGUMENTS)
        assert result.returncode == 0, result.stderr
        assert "Ray dashboard" not in result.stdout
        assert table.replace(str(reference_run[0]), str(copy)) in result.stdout
        assert_same(copy, reference_run[0])


def test_removed_tables_and_a_damaged_model_are_remade_bit_for_bit(
    launch: Launch, reference_run: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    copy = launch.folder / "runs" / reference_run[0].name
    shutil.copytree(reference_run[0], copy)
    tasks = set(pd.read_parquet(copy / "results" / "jobs").task)
    saved = {path: path.stat().st_mtime_ns for path in (copy / "checkpoints").rglob("*")}
    _remove(copy, *tables.SCHEMAS)
    result = launch(*ARGUMENTS)
    assert result.returncode == 0, result.stderr
    # Nothing is trained: checkpoints have the rows.
    assert {path: path.stat().st_mtime_ns for path in (copy / "checkpoints").rglob("*")} == saved
    assert_same(copy, reference_run[0])
    assert set(pd.read_parquet(copy / "results" / "jobs").task) == tasks

    evaluation = "evaluate-{}-000000000.parquet"
    _remove(copy, "metrics/fgsm-1.parquet", "jobs/joint.parquet", "evaluations/evaluate-mixture-noise.parquet")
    for table, file in (("shards", "benign-noise"), ("predictions", "pgd-1-noise"), ("checks", "pgd-1-checks")):
        _remove(copy, f"{table}/{evaluation.format(file)}")
    last = copy / "checkpoints" / "benign" / "epoch-00003"
    (last / "tensors.safetensors").write_bytes((last / "tensors.safetensors").read_bytes()[::-1])
    result = launch(*ARGUMENTS)
    assert result.returncode == 1
    assert result.stderr.splitlines()[0].startswith(
        "failed: stage evaluate, evaluate benign noise 0-23: CheckpointLost: benign is not trained to the end: no "
        f"checkpoint of epoch 3 (damaged checkpoint {last} removed; resuming from {last.with_name('epoch-00002')}); "
        "run the same command again to train it; log: "
    )
    assert "Traceback" not in result.stderr
    result = launch(*ARGUMENTS)
    assert result.returncode == 0, result.stderr
    assert "expert benign: done in" in result.stdout
    assert_same(copy, reference_run[0])
    assert set(pd.read_parquet(copy / "results" / "jobs").task) == tasks


def test_one_cpu_or_two_and_a_repeated_shard_give_the_same_rows(
    launch: Launch, reference_run: tuple[Path, subprocess.CompletedProcess[str]]
) -> None:
    copy = launch.folder / "runs" / reference_run[0].name
    evaluated = shutil.ignore_patterns("evaluations", "shards", "predictions", "checks", "evaluate-*")
    shutil.copytree(reference_run[0], copy, ignore=evaluated)
    killed: list[str] = []

    def kill_worker(driver: psutil.Process, line: str) -> None:
        while not killed:
            for process in driver.children(recursive=True):
                if (name := command_line(process)).startswith("ray::evaluate"):
                    process.kill()
                    killed.append(name.removeprefix("ray::"))

    on_one_cpu = ["--local", "--cpus", "1", "--gpus", "0", "--set", *TINY, *LONG_EPOCHS]
    last = Path(store_of(copy).path("checkpoints/joint/epoch-00003"))
    (last / "tensors.safetensors").write_bytes(b"not what was saved")
    again = rf"^warning: damaged checkpoint {last} removed; resuming from {last.with_name('epoch-00002')}$"
    code, stderr = launch.run_and_act_at(again, lambda _, __: None, "--stages", "joint", *ARGUMENTS)
    assert code == 0, stderr
    assert_same(copy, reference_run[0], tables=["metrics"])
    code, stderr = launch.run_and_act_at(r"evaluate .* done", kill_worker, *on_one_cpu)
    assert code == 0, stderr
    assert_same(copy, reference_run[0])
    jobs = pd.read_parquet(copy / "results" / "jobs").set_index("task").attempts
    again = set(jobs[jobs == 2].index) - {"joint"}  # whose checkpoint was damaged
    assert len(again) <= len(killed)  # the others were not run again
    assert set(jobs) <= {1, 2}


def test_a_run_that_fails_names_the_expert_the_reason_and_the_resume_command(launch: Launch) -> None:
    exploding = ["experts.learning_rate=100", "experts.weight_decay=1", "experts.epochs=9"]
    result = launch(*LOCAL, "--set", *TINY, *exploding)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert lines[0].startswith("failed: stage experts, expert ")
    assert re.search(r"NonFiniteLoss: .* in epoch \d+, step \d+ of ", lines[0])
    assert lines[-1].startswith("resume: python -m dwf_cluster.launch --local")
    assert "Traceback" not in result.stderr
    (folder,) = (launch.folder / "runs").iterdir()
    assert "failed" in set(pd.read_parquet(folder / "results" / "jobs").state)


def test_two_gloo_workers_train_the_mixture_nearly_like_one(
    reference_run: tuple[Path, subprocess.CompletedProcess[str]], two_worker_run: Path
) -> None:
    """They differ in BatchNorm, which sees half of each batch."""
    one, two = (
        pd.read_parquet(folder / "results" / "metrics", filters=[("model", "==", "mixture")]).sort_values("epoch")
        for folder in (reference_run[0], two_worker_run)
    )
    assert two.epoch.tolist() == one.epoch.tolist() == [1, 2, 3]
    assert two.step.tolist() == one.step.tolist()
    assert two.loss.tolist() == pytest.approx(one.loss.tolist(), rel=0.05)
    assert two.loss.tolist() != one.loss.tolist()


def test_everything_listens_on_loopback_and_the_dashboard_needs_the_token(launch: Launch) -> None:
    files: list[Path] = []

    def knock(driver: psutil.Process, line: str) -> None:
        addresses = {
            connection.laddr.ip
            for process in (driver, *driver.children(recursive=True))
            for connection in process.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        assert addresses == {"127.0.0.1", "::ffff:127.0.0.1"}
        match = re.match(r"Ray dashboard: (\S+) .* `cat (\S+)`", line)
        assert match is not None
        token_file = Path(match[2])
        files.append(token_file)
        assert token_file.stat().st_mode & 0o777 == 0o600
        assert token_file.parent.stat().st_mode & 0o777 == 0o700
        with pytest.raises(urllib.error.HTTPError) as refused:
            wait_for_answer(f"{match[1]}/api/jobs/")
        assert refused.value.code in (401, 403)
        headers = {"Authorization": f"Bearer {token_file.read_text()}"}
        request = urllib.request.Request(f"{match[1]}/api/jobs/", headers=headers)
        assert [job["type"] for job in json.loads(wait_for_answer(request))] == ["DRIVER"]
        driver.send_signal(signal.SIGINT)

    code, _ = launch.run_and_act_at("^Ray dashboard", knock, *ARGUMENTS)
    assert code == 130
    assert not files[0].parent.exists()
    assert not [process for process in psutil.process_iter() if str(files[0].parent) in command_line(process)]
