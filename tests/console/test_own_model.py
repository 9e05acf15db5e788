"""`dwf evaluate` prints a model's accuracy, writes an experiment that `analysis` reads, and refuses in one line."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import analysis
from dwf_cluster.console.own_model import evaluate_command

from ..conftest import write_npz

MODEL = """
import torch
from torch import nn
from beside import classes

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))

def probabilities():
    return nn.Sequential(network(), nn.Softmax(1))

def other():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, classes))

def failing():
    raise RuntimeError("first line\\nsecond line")

def number():
    return 3

def interrupted():
    raise KeyboardInterrupt
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model's file, one beside it, and an .npz of 8x8 colour images of three classes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_network.py").write_text(MODEL)
    (tmp_path / "beside.py").write_text("classes = 3\n")
    write_npz(tmp_path / "own.npz")
    return tmp_path


def _evaluate(*options: str, model: str = "network", suites: str = "noise,checks") -> int:
    return evaluate_command([f"--model=own_network.py:{model}", "--preset=own.npz", f"--suites={suites}", *options])


def test_tables_are_printed_and_an_experiment_is_written_that_analysis_reads(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):  # the same command again replaces its rows
        assert _evaluate("--out=results", "--examples=12", "--epsilon=0.1", suites="paper,noise,checks") == 0
    out, err = capsys.readouterr()
    assert not err
    assert "Accuracy in percent, 12 test images" in out
    assert "15 checks of 1 models on 12 images" in out
    written = Path(out.splitlines()[-1])
    assert written.parent == folder / "results"
    assert written.name.startswith("own_network-network-seed0-")
    results = analysis.load("results")
    evaluations = results.evaluations
    assert set(evaluations.model) == {"model"}
    assert set(evaluations.examples) == {12}
    assert (len(evaluations), len(results.checks), len(results.predictions)) == (
        19,
        15,
        19 * 12,
    )  # `worst_case` is the last
    assert set(evaluations[evaluations.attack == "pgd"].epsilon) == {0.1}
    assert len(pd.read_parquet(written / "results" / "shards")) == 18


def test_weights_of_either_kind_are_loaded(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with np.load("own.npz") as arrays:
        x = torch.tensor(arrays["x_train"].transpose(0, 3, 1, 2).reshape(64, 192) / 255, dtype=torch.float32)
        y = torch.tensor(arrays["y_train"])
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
    with torch.no_grad():  # least squares
        network[1].weight.copy_(torch.linalg.lstsq(x, nn.functional.one_hot(y, 3).float()).solution.T)
        network[1].bias.zero_()
    torch.save(network.state_dict(), "weights.pt")
    save_file(network.state_dict(), "weights.safetensors")
    for file in ("weights.pt", "weights.safetensors"):
        assert _evaluate(f"--weights={file}", "--out=results", suites="noise") == 0
    first, second = re.findall(r"^ *model +[\d.]+ .*$", capsys.readouterr().out, re.M)
    assert first == second
    assert [path.name.split("-seed0")[0] for path in Path("results").iterdir()] == ["own_network-network-weights"]


def test_an_l2_suite_takes_its_ball_from_the_options(folder: Path) -> None:
    options = ("--norm=l2", "--epsilon=0.25", "--step-size=0.05", "--out=results", "--seed=3", "--batch-size=5")
    assert _evaluate(*options, suites="pgd_l2") == 0
    row, worst = analysis.load("results").evaluations.itertuples()
    assert (row.attack, row.epsilon, row.step_size, row.seed) == ("pgd_l2", 0.25, 0.05, 3)
    assert (worst.attack, worst.norm, worst.epsilon, worst.correct) == ("worst_case", "l2", 0.25, row.correct)


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("--model: 'net.txt:f' cannot be used: allowed is FILE.py:FUNCTION", ["--model=net.txt:f"]),
        ("--model: 'none.py' cannot be read: No such file or directory", ["--model=none.py:f"]),
        ("has no function missing", ["--model=own_network.py:missing"]),
        ("RuntimeError: first line second line", ["--model=own_network.py:failing"]),
        ("it returns int, allowed is nn.Module", ["--model=own_network.py:number"]),
        ("probabilities; attacks need logits", ["--model=own_network.py:probabilities"]),
        ("--weights: 'none.pt' cannot be read", ["--weights=none.pt"]),
        ("--weights: 'own_network.py' cannot be used", ["--weights=own_network.py"]),
        ("preset: 'none' is none of digits", ["--preset=none"]),
        ("data.source: 'none.npz' cannot be read", ["--preset=none.npz"]),
        ("data.test_examples: 17 cannot be used: allowed are 3 to 16", ["--examples=17"]),
        ("it cannot be called with images of shape", ["--preset=digits"]),
        ("--suites: 'pdg' cannot be used: allowed are paper", ["--suites=pdg"]),
        ("suites: 'pgd_l2' cannot be used: allowed with norm linf are", ["--suites=pgd_l2"]),
        ("pgd.epsilon: -1", ["--epsilon=-1"]),
        ("--epsilon: invalid float value: 'x'", ["--epsilon=x"]),
        ("device: 'gpu' cannot be used", ["--device=gpu"]),
        ("unrecognized arguments: --frob", ["--frob"]),
        ("--from: 'none.npz' cannot be read: No such file", ["--from=none.npz"]),
        ("own.npz: no array images: images, index,", ["--from=own.npz"]),
        ("--epsilon: cannot be used with --from, which attacks nothing", ["--from=own.npz", "--epsilon=0.1"]),
    ],
)
def test_input_that_cannot_be_used_is_one_line_and_status_2(
    folder: Path, capsys: pytest.CaptureFixture[str], message: str, options: list[str]
) -> None:
    out_option = [] if any("--from" in option for option in options) else ["--out=results"]
    assert _evaluate(*options, *out_option) == 2
    out, err = capsys.readouterr()
    assert not out
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not Path("results").exists()


@pytest.mark.parametrize("kind", ["float", "uint8"])
def test_saved_images_are_verified_on_the_same_model_and_on_another(
    folder: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    assert _evaluate("--out=results", f"--save-adversarial={kind}", "--epsilon=0.1", suites="paper,noise") == 0
    experiment = Path(capsys.readouterr().out.splitlines()[-1])
    files = sorted(map(str, (experiment / "adversarial").iterdir()))
    assert len(files) == 2
    evaluations = analysis.load("results").evaluations.set_index("attack").accuracy
    assert _evaluate("--from", *files) == 0
    out, err = capsys.readouterr()
    assert not err
    assert f"Accuracy in percent on {17 * 16} saved images, each within its ball" in out
    cells = {line.split()[1]: line.split() for line in out.splitlines() if line.split()[:1] == ["model"]}
    assert float(cells["noise"][-2]) == pytest.approx(100 * evaluations["noise"], abs=0.05)
    if kind == "float":
        assert "every answer is the one that was saved" in out
        assert cells["pgd_restarts"][-1] == "100.0"
        assert float(cells["pgd_restarts"][6]) == pytest.approx(100 * evaluations["pgd_restarts"], abs=0.05)
    assert _evaluate("--from", files[0], model="other") == 0
    assert f"of {_count(files[0])} answers differ from the saved ones" in capsys.readouterr().out
    assert _evaluate("--out=results", "--epsilon=0.1", suites="paper,noise") == 0
    assert not list((experiment / "adversarial").iterdir())  # the rows were replaced


def _count(file: str) -> int:
    with np.load(file) as arrays:
        return len(arrays["index"])


def test_ctrl_c_is_status_130_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _evaluate("--out=results", model="interrupted") == 130
    assert capsys.readouterr().err == "interrupted; nothing was written\n"
    assert not Path("results").exists()


def test_an_unavailable_data_set_is_status_1(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _evaluate("--preset=cifar10") == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("failed: CIFAR10 is not in data")
