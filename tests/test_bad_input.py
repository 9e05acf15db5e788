"""Bad input: one line names the value and what is allowed, the exit status is 2, and nothing is written."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import shlex
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dwf_cluster import status
from dwf_cluster.launch import main
from dwf_cluster.presets import build
from dwf_cluster.settings import MAX_JSON_BYTES

from .conftest import TINY, write_npz


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("pwned"),))


@pytest.fixture
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that commands run in, with files of many kinds."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "folder").mkdir()
    x, y = np.zeros((64, 8, 8, 3), np.uint8), np.arange(64) % 3
    write_npz(tmp_path / "good.npz")
    for name, changed in {
        "float": {"x_train": x.astype(np.float32)},
        "flat": {"x_train": x.reshape(64, -1)},
        "channels": {"x_train": np.zeros((64, 8, 8, 7), np.uint8)},
        "empty": {"x_train": x[:0], "y_train": y[:0]},
        "sizes": {"x_test": np.zeros((16, 9, 9, 3), np.uint8)},
        "labels": {"y_train": y[:5]},
        "fractions": {"y_train": y.astype(float)},
        "negative": {"y_train": y - 1},
        "one-class": {"y_train": y * 0, "y_test": np.zeros(16, int)},
        "new-class": {"y_test": np.arange(16)},
        "missing": {"x_test": None},
        "objects": {"y_train": np.array([Malicious()] * 64, dtype=object)},
    }.items():
        write_npz(tmp_path / f"{name}.npz", **changed)
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "nothing.npz").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-200])
    (tmp_path / "pickle.npz").write_bytes(pickle.dumps(Malicious()))
    with zipfile.ZipFile(tmp_path / "zip.npz", "w") as archive:
        for name in ("x_train", "y_train", "x_test", "y_test"):
            archive.writestr(f"{name}.npy", b"no array")
    good = json.loads(build("digits").to_json())
    for name, content in {
        "good": json.dumps(good),
        "invalid": "{",
        "list": "[]",
        "number": "7",
        "nested": "[" * 100_000,
        "unknown": json.dumps({**good, "colour": "red"}),
        "outside": json.dumps({**good, "preset": "../../etc"}),
        "shell": json.dumps({**good, "preset": "$(touch pwned)"}),
        "newline": json.dumps({**good, "preset": "digits\nrm"}),
        "seed": json.dumps({**good, "seed": "0; touch pwned"}),
        "deep": json.dumps({**good, "experts": {**good["experts"], "epochs": {"a": [1]}}}),
    }.items():
        (tmp_path / f"{name}.json").write_text(content)
    text = json.dumps(good)
    for name, encoded in {
        "binary": b"\xff\xfe\x00\x01",
        "utf-16": text.encode("utf-16"),
        "bom": b"\xef\xbb\xbf" + text.encode(),
        "latin-1": text.replace("digits", "caf\xe9").encode("latin-1"),
        "surrogate": text.replace('"source": "digits"', '"source": "\\udcff.npz"').encode(),
        "zero": text.replace('"source": "digits"', '"source": "a\\u0000.npz"').encode(),
        "nan": text.replace('"checkpoint_minutes": 10.0', '"checkpoint_minutes": NaN').encode(),
        "long": text.replace('"seed": 0', '"seed": ' + "9" * 5000).encode(),
        "url": text.replace('"source": "digits"', '"source": "https://example.org/x.npz"').encode(),
        "twice": text.replace('"seed": 0', '"seed": 7, "seed": 4').encode(),
    }.items():
        (tmp_path / f"{name}.json").write_bytes(encoded)
    with (tmp_path / "large.json").open("wb") as large:
        large.truncate(MAX_JSON_BYTES + 1)  # sparse: it takes no space on the disk
    return tmp_path


def _local(*arguments: str) -> list[str]:
    return ["--local", *arguments]


def _set(*assignments: str) -> list[str]:
    return ["--local", "--set", *assignments]


def _sweep(*arguments: str) -> list[str]:
    return ["--local", "--sweep", *arguments]


CASES: list[tuple[list[str], str]] = [
    # the command line
    ([], "one of the arguments --local --address --slurm is required"),
    (["--seed", "3"], "one of the arguments --local --address --slurm is required"),
    (["--local", "--slurm"], "--slurm: not allowed with argument --local"),
    (["--help-fields", "expert"], "--help-fields: 'expert' cannot be used: allowed are preset, seed, "),
    (["--help-fields", "experts.epoch"], "--help-fields: 'experts.epoch' cannot be used: allowed are preset, seed, "),
    (["--help-fields", "x" * 500], "--help-fields: 'xxxx"),
    (["--fetch-data", "--preset", "mnist"], "preset: 'mnist' is none of"),
    (["--fetch-data", "--set", "data.source=mnist"], "data.source: 'mnist' cannot be used: one of digits"),
    (["--fetch-data", "--nodes", "2"], "--nodes: cannot be used without --slurm"),
    (["--fetch-data", "--preset", "gone.npz"], "data.source: 'gone.npz' cannot be read: No such file or directory"),
    (["--local", "--nodes", "2"], "--nodes: cannot be used without --slurm"),
    (["--address", "auto", "--cpus", "2"], "--cpus: cannot be used without --local"),
    (["--address", "127.0.0.1:1"], "--address: '127.0.0.1:1' cannot be reached: "),
    (["--address", "127.0.0.1:port"], "--address: '127.0.0.1:port' cannot be reached: "),
    (_local("--seed", "3..1"), "--seed: '3..1' cannot be used: allowed are 1 to 1000 different seeds"),
    (_local("--seed", "1,1"), "--seed: '1,1' cannot be used: allowed are 1 to 1000 different seeds"),
    (_local("--seed", "0..9999999"), "--seed: '0..9999999' cannot be used: allowed are 1 to 1000 different seeds"),
    (_local("--seed", "0..2147483647"), "--seed: '0..2147483647' cannot be used: allowed are 1 to 1000"),
    (_local("--seed", "-1"), "--seed: '-1' cannot be used: allowed is an integer from 0"),
    (_local("--seed", "one"), "--seed: 'one' cannot be used"),
    (_local("--seed", "٣"), "--seed: '٣' cannot be used"),
    (_local("--gpus-per-expert", "2"), "--gpus-per-expert: '2' cannot be used: allowed is a number from 0.01"),
    (_local("--gpus-per-expert", "nan"), "--gpus-per-expert: 'nan' cannot be used"),
    (_local("--colour"), "unrecognized arguments: --colour"),
    (_local("--cpus", "0"), "--cpus: '0' cannot be used: allowed is an integer from 1"),
    (_local("--cpus", "1e3"), "--cpus: '1e3' cannot be used"),
    (_local("--stages", "train"), "--stages: 'train' cannot be used: allowed are experts,joint,evaluate"),
    (_local("--stages", ""), "--stages: '' cannot be used"),
    (_local("--stages", "joint"), "--stages: joint cannot be run: experts is not done"),
    (["--slurm", "--time", "soon"], "--time: 'soon' cannot be used"),
    (["--slurm", "--partition", "a b"], "--partition: 'a b' cannot be used: allowed are letters"),
    (["--slurm", "--account", "$(id)"], "--account: '$(id)' cannot be used"),
    (["--slurm", "--sbatch", "qos=a\nb"], "--sbatch: 'a\\nb' cannot be used"),
    (["--slurm", "--sbatch", "wrap"], "--sbatch: 'wrap' cannot be used: allowed is option=value"),
    # sweeps
    (_sweep("experts.epoch=5"), "experts.epoch: no such field; did you mean experts.epochs?"),
    (_sweep("experts.epochs"), "--sweep: 'experts.epochs' is not of the form dotted.field=value"),
    (_sweep("experts.epochs=1", "experts.epochs=0"), "experts.epochs: 0 cannot be used"),
    (_sweep("seeds=3..1"), "--sweep: seeds: '3..1' cannot be used: allowed are 1 to 1000 different seeds"),
    (_sweep("seeds=one"), "--sweep: seeds: 'one' cannot be used"),
    (_sweep("seed=1"), "--sweep: 'seed' cannot be varied: allowed is any field but data.*, and seeds=0..4"),
    (_sweep("data.source=digits"), "--sweep: 'data.source' cannot be varied"),
    (_sweep("preset=a", "preset=b"), "--sweep: 'preset' cannot be varied"),
    (_sweep("gate.kind=soft", "gate.kind=medium"), "gate.kind: 'medium' cannot be used"),
    (_sweep("experts.fgsm=4", "experts.fgsm=4"), "--sweep: 'experts.fgsm=4' and 'experts.fgsm=4' cannot both be run"),
    (_sweep("seeds=0..999", "gate.kind=soft", "gate.kind=hard"), "--sweep: 2 combinations with 1000 seeds cannot be"),
    (_sweep("seeds=0..1", "--seed", "3"), "--seed: cannot be used with --sweep; allowed is --sweep seeds=0..4"),
    (_sweep("seeds=0..1", "--stages", "joint"), "--stages: cannot be used with --sweep; allowed is all stages"),
    (["--slurm", "--sweep", "seeds=0..1"], "--slurm: cannot be used with --sweep; allowed is sbatch slurm/sweep.sh"),
    (_sweep("seeds=0..1", "--samples", "0"), "--samples: '0' cannot be used: allowed is an integer from 1"),
    (_local("--samples", "3"), "--samples: cannot be used without --sweep"),
    (_local("--asha"), "--asha: cannot be used without --sweep"),
    (_local("--sweep"), "--sweep: expected at least one argument"),
    (_local("--tensorboard", "file"), "--tensorboard: 'file' cannot be used: "),
    # the store
    (_local("--storage", "nosuch://bucket"), "--storage: 'nosuch://bucket' cannot be used: "),
    (_local("--storage", "s3://key:secret@bucket/x"), "--storage: 's3://bucket/x' with a password"),
    (_local("--storage", "s3://bucket/x?secret=1"), "--storage: 's3://bucket/x' with a password"),
    (
        _local("--storage", "zip://runs"),
        "--storage: 'zip://runs' cannot be used: zip has no files that can be replaced",
    ),
    (_local("--storage", "data://runs"), "--storage: 'data://runs' cannot be used: data has no files that can be rep"),
    (_local("--storage", "runs\udcff"), "'runs\\udcff' cannot be used: allowed is text in UTF-8"),
    (_local("--storage", "runs\n$(id)"), "--storage: 'runs\\n$(id)' cannot be used: allowed are printable characters"),
    (_local("--storage", "runs\x1b[31m"), "--storage: 'runs\\x1b[31m' cannot be used: allowed are printable"),
    (_local("--data-folder", "\udcff"), "'\\udcff' cannot be used: allowed is text in UTF-8"),
    # presets and experiment files
    (_local("--preset", "mnist"), "preset: 'mnist' is none of digits, fashion-mnist, cifar10, svhn"),
    (_local("--preset", ""), "preset: '' is none of"),
    (_local("--preset", "../digits"), "preset: '../digits' is none of"),
    (_local("--preset", "gone.json"), "preset: 'gone.json' cannot be read: No such file or directory"),
    (_local("--preset", "invalid.json"), "experiment: "),
    (_local("--preset", "list.json"), "experiment: "),
    (_local("--preset", "number.json"), "experiment: "),
    (_local("--preset", "nested.json"), "experiment: "),
    (_local("--preset", "binary.json"), "preset: 'binary.json' cannot be used: it is not text"),
    (_local("--preset", "utf-16.json"), "preset: 'utf-16.json' cannot be used: it is not text in UTF-8"),
    (_local("--preset", "bom.json"), "experiment: "),
    (_local("--preset", "latin-1.json"), "preset: 'latin-1.json' cannot be used: it is not text in UTF-8"),
    (_local("--preset", "surrogate.json"), "experiment: "),
    (_local("--preset", "zero.json"), "data.source: 'a\\x00.npz' cannot be used"),
    (_local("--preset", "nan.json"), "checkpoint_minutes: nan cannot be used"),
    (_local("--preset", "long.json"), "experiment: "),
    (_local("--preset", "url.json"), "data.source: 'https://example.org/x.npz' cannot be read: No such file"),
    (_local("--preset", "large.json"), "preset: 'large.json' cannot be used: it has "),
    (_local("--preset", "a\0.json"), "preset: 'a\\x00.json' cannot be read: "),
    (_local("--preset", "\udcff.npz"), "'\\udcff.npz' cannot be used: allowed is text in UTF-8"),
    (_local("--preset", "unknown.json"), "colour: no such field"),
    (_local("--preset", "outside.json"), "preset: '../../etc' cannot be used"),
    (_local("--preset", "shell.json"), "preset: '$(touch pwned)' cannot be used"),
    (_local("--preset", "newline.json"), "preset: 'digits\\nrm' cannot be used"),
    (_local("--preset", "seed.json"), "seed: '0; touch pwned' cannot be used"),
    (_local("--preset", "deep.json"), "experts.epochs: "),
    # --set
    (_set("experts.epoch=5"), "experts.epoch: no such field; did you mean experts.epochs?"),
    (_set("experts=3"), "experts: no such field"),
    (_set("zzz=3"), "zzz: no such field; --help-fields lists them all"),
    (_set("experts.epochs"), "--set: 'experts.epochs' is not of the form"),
    (_set("=1"), ": no such field"),
    (_set("experts.epochs=-1"), "experts.epochs: -1 cannot be used"),
    (_set("experts.epochs=1.5"), "experts.epochs: 1.5 cannot be used"),
    (_set("experts.epochs=1e400"), "experts.epochs: inf cannot be used"),
    (_set("experts.epochs=" + "9" * 5000), "experts.epochs: "),
    (_set("pgd.epsilon=NaN"), "pgd.epsilon: nan cannot be used"),
    (_set("pgd.epsilon=0"), "pgd.epsilon: 0 cannot be used"),
    (_set("pgd.steps=" + "[" * 5000), "pgd.steps"),
    (_set("fgsm.epsilons="), "fgsm.epsilons: "),
    (_set("checkpoint_minutes=0"), "checkpoint_minutes: 0 cannot be used"),
    (_set("preset=../../etc"), "preset: '../../etc' cannot be used"),
    (_set("preset=a/b"), "preset: 'a/b' cannot be used"),
    (_set("preset=-rf"), "preset: '-rf' cannot be used"),
    (_set("preset=;touch pwned;"), "preset: ';touch pwned;' cannot be used"),
    (_set("evaluation.beyond=apgd,deepfool"), "evaluation.beyond.1: 'deepfool' cannot be used"),
    (_set("evaluation.beyond=autoattack", "data.source=good.npz"), "evaluation.beyond: 'autoattack' cannot be used"),
    (_set("defence=own-model"), "defence: 'own-model' cannot be used: allowed are methods that train a model"),
    (_set("baselines=own-model"), "baselines.0: 'own-model' cannot be used: allowed are dwf, fgsm-at"),
    (_set("baselines=given"), "baselines.0: 'given' cannot be used: allowed are dwf, fgsm-at"),
    (_set("data.train_examples=2000"), "data.train_examples: 2000 cannot be used: allowed are 2"),
    (_set("data.train_examples=1"), "data.train_examples: 1 cannot be used: allowed are 2"),
    (_set("data.mean=0.1,0.2", "data.std=1,1"), "data.mean: 2 values cannot be used: the images have 1"),
    (_set("data.source=a\0.npz"), "data.source: 'a\\x00.npz' cannot be used"),
    (_set("data.source=/etc/passwd"), "data.source: '/etc/passwd' cannot be used: one of digits"),
    # images
    (_local("--preset", "gone.npz"), "data.source: 'gone.npz' cannot be read: No such file or directory"),
    (_local("--preset", "float.npz"), "x_train: dtype float32 cannot be used: images are uint8"),
    (_local("--preset", "flat.npz"), "x_train: shape (64, 192) cannot be used"),
    (_local("--preset", "channels.npz"), "x_train: shape (64, 8, 8, 7) cannot be used"),
    (_local("--preset", "empty.npz"), "x_train: shape (0, 8, 8, 3) cannot be used"),
    (_local("--preset", "sizes.npz"), "x_test: images of shape (9, 9, 3) cannot be used"),
    (_local("--preset", "labels.npz"), "y_train: shape (5,) cannot be used"),
    (_local("--preset", "fractions.npz"), "y_train: dtype float64 cannot be used: labels are integers"),
    (_local("--preset", "negative.npz"), "y_train: label -1 cannot be used"),
    (_local("--preset", "one-class.npz"), "y_train: all labels are 0"),
    (_local("--preset", "new-class.npz"), "y_test: label 15 cannot be used: y_train has 0..2"),
    (_local("--preset", "missing.npz"), "missing.npz: no array x_test"),
    (_local("--preset", "objects.npz"), "objects.npz: not an .npz file of plain arrays"),
    (_local("--preset", "text.npz"), "text.npz: not an .npz file of plain arrays"),
    (_local("--preset", "nothing.npz"), "nothing.npz: not an .npz file of plain arrays"),
    (_local("--preset", "cut.npz"), "cut.npz: not an .npz file of plain arrays"),
    (_local("--preset", "pickle.npz"), "pickle.npz: not an .npz file of plain arrays"),
    (_local("--preset", "zip.npz"), "zip.npz: not an .npz file of plain arrays"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), CASES, ids=lambda value: shlex.join(value)[:60] if isinstance(value, list) else ""
)
def test_bad_input_is_one_line_and_exit_status_2_and_nothing_is_written(
    working_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = sorted(os.listdir(working_folder))
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {message}")
    assert printed.count("\n") == 1
    assert len(printed) < 400
    assert "secret" not in printed
    assert sorted(os.listdir(working_folder)) == before


def _plan(folder: Path) -> list[str]:
    return ["--local", "--dry-run", "--cpus", "2", "--gpus", "0", "--storage", str(folder), "--set", *TINY]


def _table(content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "results" / "jobs").mkdir(parents=True)
        (folder / "results" / "jobs" / "expert-pgd-1.parquet").write_bytes(content)

    return damage


def _other_columns() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = io.BytesIO()
    pq.write_table(pa.table({"state": [[1]], "attempts": ["many"]}), content)
    return content.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        _table(b""),
        _table(b"PAR1"),
        _table(gzip.compress(b"x")),
        _table(pickle.dumps(Malicious())),
        _table(_other_columns()),
    ],
    ids=["empty", "header", "gzip", "pickle", "columns"],
)
def test_a_table_that_cannot_be_read_is_a_failure_of_the_store(
    working_folder: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    folder = working_folder / "runs" / build("digits", None, TINY).folder
    damage(folder)
    assert main(_plan(working_folder / "runs")) == 1
    failure, resume = capsys.readouterr().err.splitlines()
    assert failure.startswith(
        f"failed: {folder}/results/jobs/expert-pgd-1.parquet: not the Parquet file that was written"
    )
    assert resume.startswith("resume: python -m dwf_cluster.launch --local")
    assert not (working_folder / "pwned").exists()


def test_folders_that_only_look_like_checkpoints_are_ignored(
    working_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = working_folder / "runs" / build("digits", None, TINY).folder / "checkpoints" / "pgd-1"
    for name in ("epoch-00003", "epoch-99999-step-1", "epoch-../../x".replace("/", "_"), "notes"):
        (folder / name).mkdir(parents=True)
    (folder / "epoch-00004").write_text("a file")
    (folder / "epoch-00003" / "manifest.json").write_text('{"tensors.safetensors": {"bytes": "3"}, "state.json": []}')
    assert main(_plan(working_folder / "runs")) == 0
    assert "expert pgd-1" in capsys.readouterr().out


def test_the_last_value_of_a_field_that_is_given_twice_counts(working_folder: Path) -> None:
    assert build("twice.json").seed == 4


def test_the_experiment_file_of_a_run_can_be_used_as_a_preset(working_folder: Path) -> None:
    experiment = build("digits", 3, ["experts.epochs=7", "checkpoint_minutes=2"])
    (working_folder / "experiment.json").write_text(experiment.to_json())
    assert build("experiment.json") == experiment
    assert build("experiment.json", 4, ["experts.epochs=7"]).folder.startswith("digits-seed4-")


def test_minutes_between_checkpoints_are_no_part_of_the_signature() -> None:
    assert build("digits", 0, ["checkpoint_minutes=2"]).signature == build("digits").signature


def test_status_refuses_a_file_as_a_storage(working_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status.main(["file"]) == 2
    assert capsys.readouterr().err == "error: storage: 'file' cannot be used: no experiments there\n"
