"""Experiments are found and grouped, their tables are read, and bad input is reported in one line."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow.dataset as ds
import pytest

from analysis import Group, figures, load, report, tables
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store.tables import SCHEMAS
from tests.analysis.conftest import EXAMPLES, ROOT, Call, Run


def test_experiments_that_differ_in_their_seed_are_one_group(storage: Path) -> None:
    groups = load(str(storage)).groups
    assert [(group.title, group.seeds) for group in groups] == [("cifar10", (0, 1, 2)), ("digits", (0,))]


def test_titles_name_the_settings_that_differ(tmp_path: Path) -> None:
    for epochs in (3, 4):
        for seed in (0, 1):
            experiment = build("digits", seed, [f"experts.epochs={epochs}", "evaluation.pgd_steps=5,10"])
            (tmp_path / experiment.folder).mkdir()
            (tmp_path / experiment.folder / "experiment.json").write_text(experiment.to_json())
    groups = load(str(tmp_path)).groups
    assert [(group.title, group.seeds) for group in groups] == [
        ("digits, experts.epochs=3", (0, 1)),
        ("digits, experts.epochs=4", (0, 1)),
    ]
    assert dict(groups[1].changed) == {"evaluation.pgd_steps": [5, 10]}


def test_titles_of_groups_with_many_different_settings_have_a_signature(tmp_path: Path) -> None:
    many = ["model.width=4", "gate.hidden=8", "experts.epochs=1", "joint.epochs=2", "pgd.steps=1", "fgsm.epsilons=0.1"]
    experiments = [build("digits", 0), build("digits", 0, many)]
    for experiment in experiments:
        (tmp_path / experiment.folder).mkdir()
        (tmp_path / experiment.folder / "experiment.json").write_text(experiment.to_json())
    titles = {group.title for group in load(str(tmp_path)).groups}
    assert len(titles) == 2
    assert all(any(experiment.signature in title for title in titles) for experiment in experiments)


def test_a_folder_that_is_named_twice_counts_once(storage: Path) -> None:
    folder = next(storage.glob("digits-*"))
    assert [group.seeds for group in load(str(folder), f"{folder}/").groups] == [(0,)]


@pytest.mark.parametrize("table", ["evaluations", "predictions", "metrics", "checks", "jobs"])
def test_frames_have_the_documented_columns_and_the_group(storage: Path, table: str) -> None:
    frame = getattr(load(str(storage)), table)
    assert list(frame) == [*SCHEMAS[table].names, "group"]
    assert set(frame.group) == {"cifar10", "digits"}


def test_frames_have_categories_and_read_only_the_requested_rows(storage: Path) -> None:
    frame = load(str(storage)).frame("predictions", ["model", "seed"], ds.field("model") == "mixture")
    assert set(frame.model) == {"mixture"}
    assert isinstance(frame.model.dtype.categories[0], str)


def test_results_of_another_version_are_read(storage: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(next(storage.glob("digits-*")), tmp_path / "digits"))
    fields = json.loads((folder / "experiment.json").read_text())
    del fields["evaluation"]["probe_steps"]
    fields["evaluation"]["later"] = 3
    (folder / "experiment.json").write_text(json.dumps(fields))
    (group,) = load(str(folder)).groups
    assert group.settings["evaluation.later"] == 3
    assert len(group.frame("evaluations")) == 4 * 17


def test_seeds_of_an_older_version_are_in_the_same_group(storage: Path, tmp_path: Path) -> None:
    for seed, folder in enumerate(sorted(storage.glob("cifar10-*"))[:2]):
        copy = Path(shutil.copytree(folder, tmp_path / f"seed-{seed}"))
        fields = json.loads((copy / "experiment.json").read_text())
        if seed == 0:
            del fields["defence"], fields["model"]["backbone"]  # added later
            (copy / "experiment.json").write_text(json.dumps(fields))
    (group,) = load(str(tmp_path)).groups
    assert len(group.seeds) == 2


def test_an_unfinished_file_is_not_read(storage: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(next(storage.glob("digits-*")), tmp_path / "digits"))
    (folder / "results" / "evaluations" / ".evaluate-benign-paper.parquet").write_bytes(b"half")
    assert len(load(str(folder)).evaluations) == 4 * 17


def test_other_file_systems_are_read_through_fsspec(storage: Path, cifar10: Group) -> None:
    memory = fsspec.filesystem("memory")
    try:
        memory.put(str(storage), "/bucket/runs", recursive=True)
        (group, _) = load("memory://bucket/runs").groups
        assert group.seeds == cifar10.seeds
        assert group.frame("evaluations").accuracy.tolist() == cifar10.frame("evaluations").accuracy.tolist()
        assert len(group.frame("predictions", ["seed"])) == len(cifar10.frame("predictions", ["seed"]))
    finally:
        memory.rm("/bucket", recursive=True)


def test_a_missing_table_is_empty(storage: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(next(storage.glob("digits-*")), tmp_path / "digits"))
    shutil.rmtree(folder / "results" / "checks")
    assert load(str(folder)).checks.empty


def test_the_synthetic_tables_agree(cifar10: Group) -> None:
    predictions = cifar10.frame(
        "predictions", ["model", "attack", "epsilon", "steps", "source", "seed", "label", "prediction"]
    )
    keys = ["model", "attack", "source", "epsilon", "steps", "seed"]
    correct = (predictions.label == predictions.prediction).groupby(
        [predictions[k] for k in keys], observed=True, dropna=False
    )
    counted = correct.sum().rename("counted").reset_index()
    both = cifar10.frame("evaluations").merge(counted, on=keys, validate="1:1")
    assert len(both) == len(cifar10.frame("evaluations"))
    assert (both.correct == both.counted).all()
    assert (both.examples == EXAMPLES).all()


def _broken_json(folder: Path) -> None:
    (folder / "experiment.json").write_text("{")


def _bad_value(folder: Path) -> None:
    fields = json.loads((folder / "experiment.json").read_text())
    fields["model"]["width"] = -1
    (folder / "experiment.json").write_text(json.dumps(fields))


def _no_object(folder: Path) -> None:
    (folder / "experiment.json").write_text("[1]")


@pytest.mark.parametrize("fault", [_broken_json, _bad_value, _no_object])
def test_an_experiment_that_cannot_be_used_is_named(storage: Path, tmp_path: Path, fault: object) -> None:
    folder = Path(shutil.copytree(next(storage.glob("digits-*")), tmp_path / "digits"))
    assert callable(fault)
    fault(folder)
    with pytest.raises(InvalidInput, match=r"digits/experiment\.json: "):
        load(str(tmp_path))


def test_bad_input_is_one_line_and_exit_status_2(run: Run) -> None:
    done = run("analysis.tables", "nowhere")
    assert done.returncode == 2
    assert done.stderr == (
        "error: storage: 'nowhere' cannot be used: it holds no experiment.json, "
        "allowed are a storage of experiments or an experiment's folder\n"
    )


def test_every_bad_input_is_one_line(storage: Path, tmp_path: Path, call: Call) -> None:
    broken = Path(shutil.copytree(next(storage.glob("digits-*")), tmp_path / "broken"))
    next((broken / "results" / "predictions").iterdir()).write_bytes(b"no Parquet")
    empty = Path(shutil.copytree(next(storage.glob("digits-*")), tmp_path / "empty"))
    shutil.rmtree(empty / "results")
    one = next(storage.glob("digits-*"))
    for main, arguments, expected in (
        (tables.main, ["nonsense://x"], "storage: 'nonsense://x' cannot be used"),
        (tables.main, [], "storage"),
        (tables.main, [one, "--format", "word"], "choose from"),
        (tables.main, [broken], "broken: table predictions cannot be read"),
        (tables.main, [empty], "empty: cannot be used: it has no evaluations yet"),
        (report.main, [one, "--out", "/dev/null/report.html"], "--out: '/dev/null/report.html' cannot be used"),
        (figures.main, [one, "--out", "/dev/null/x"], "--out"),
    ):
        status, _, err = call(main, *arguments)
        assert status == 2
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert expected in line


@pytest.mark.parametrize(
    ("credentials", "reason"),
    [({}, "credentials"), ({"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}, "127.0.0.1:9")],
)
def test_a_storage_that_does_not_answer_or_denies_access_is_one_line_and_exit_status_1(
    run: Run, tmp_path: Path, credentials: dict[str, str], reason: str
) -> None:
    (tmp_path / "impatient.py").write_text(
        "import runpy\n"
        "from dwf_cluster.store import retry\n"
        "retry.PATIENCE = 1\n"  # not a minute
        "runpy.run_module('analysis.tables', run_name='__main__')\n"
    )
    where = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    done = run("impatient", "s3://bucket/prefix", **where, **credentials)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("failed: ")
    assert reason in line


def test_the_reader_of_a_pipe_may_stop_reading(storage: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m analysis.tables {shlex.quote(str(storage))} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("module", sorted(path.stem for path in (ROOT / "analysis").glob("*.py")))
def test_no_module_imports_torch_or_ray(module: str, run: Run, tmp_path: Path) -> None:
    name = "analysis" if module == "__init__" else f"analysis.{module}"
    (tmp_path / "imports.py").write_text(f"import sys, {name}; print(sorted({{'torch', 'ray'}} & set(sys.modules)))")
    done = run("imports")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_the_report_needs_neither_torch_nor_ray(storage: Path, run: Run, tmp_path: Path) -> None:
    (tmp_path / "without.py").write_text(
        "import runpy, sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'ray'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import analysis.figures, analysis.tables\n"
        "sys.argv = ['report', sys.argv[1], '--out', 'report.html']\n"
        "runpy.run_module('analysis.report', run_name='__main__')\n"
    )
    done = run("without", next(storage.glob("digits-*")))
    assert (done.stdout, done.stderr) == ("report.html\n", "")
    assert (tmp_path / "report.html").exists()


def test_a_full_disk_keeps_the_earlier_report(storage: Path, small_disk: Path, call: Call) -> None:
    one, out = next(storage.glob("digits-*")), small_disk / "report.html"
    out.write_text("before")
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "rest").write_bytes(bytes(2 << 20))
    status, _, err = call(report.main, one, "--out", out)
    assert (status, err) == (2, f"error: --out: '{out}' cannot be used: No space left on device\n")
    assert out.read_text() == "before"
    assert sorted(path.name for path in small_disk.iterdir()) == ["report.html", "rest"]


def test_a_full_disk_keeps_the_earlier_figures(storage: Path, small_disk: Path, call: Call) -> None:
    group = load(str(next(storage.glob("digits-*")))).groups[0]
    drawn = small_disk / "figures" / group.name
    drawn.mkdir(parents=True)
    for name in figures.FIGURES:
        (drawn / f"{name}.pdf").write_text("before")
    with pytest.raises(OSError, match="No space left"):
        (small_disk / "rest").write_bytes(bytes(2 << 20))
    status, _, err = call(figures.main, next(storage.glob("digits-*")), "--out", small_disk / "figures")
    assert status == 2
    assert "No space left on device" in err
    assert {path.read_text() for path in drawn.iterdir()} == {"before"}


def test_a_report_is_written_to_a_device_and_through_a_link(storage: Path, tmp_path: Path, call: Call) -> None:
    one, link = next(storage.glob("digits-*")), tmp_path / "link.html"
    link.symlink_to(tmp_path / "report.html")
    for out in (link, Path("/dev/null")):
        assert call(report.main, one, "--out", out)[0] == 0
    assert link.is_symlink()
    assert (tmp_path / "report.html").read_text().endswith("</html>")
    assert Path("/dev/null").is_char_device()
