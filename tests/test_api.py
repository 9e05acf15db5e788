"""`evaluate` measures any module as torchattacks does and leaves it as it was; `load` gives a trained model back."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import torchattacks
import torchvision
from sklearn.datasets import load_digits
from torch import nn

from dwf_cluster import evaluate, load
from dwf_cluster.attacks.gradient import NotLogits
from dwf_cluster.data.sources import Images
from dwf_cluster.defences.build import untrained
from dwf_cluster.evaluation import run
from dwf_cluster.evaluation.merge import wilson
from dwf_cluster.evaluation.registry import CHECK_FUNCTIONS
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput
from dwf_cluster.store import RowLabels, Store, checkpoints, tables

from .conftest import TINY, InDouble, write_npz

EPSILON, STEP_SIZE = 0.06, 0.012
FGSM_EPSILONS, PGD_STEPS = [round(0.01 * i, 2) for i in range(1, 10)], [10, 20, 30, 40, 50]
COLUMNS = {
    name: [label for label in tables.SCHEMAS[name].names if label not in {field.name for field in fields(RowLabels)}]
    for name in ("evaluations", "predictions", "checks")
}


def _digits(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    digits = load_digits()
    x = (torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 * 255).round() / 255
    return x[-count:], torch.tensor(digits.target)[-count:]


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A small convolutional network, trained for a second on digits with random signs added; in evaluation mode."""
    x, y = _digits(1797)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for _ in range(4):
            for batch in torch.randperm(1500).split(64):
                noisy = (x[batch] + 0.2 * torch.randn_like(x[batch]).sign()).clamp(0, 1)
                optimizer.zero_grad()
                F.cross_entropy(model(noisy), y[batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    return model.eval().requires_grad_(False)


def _peers_accuracies(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epsilon: float, step: float) -> list[float]:
    """Accuracy in the 15 columns by torchattacks: clean, FGSM, PGD."""
    attacks = [
        *(torchattacks.FGSM(model, eps=strength) for strength in FGSM_EPSILONS),
        *(torchattacks.PGD(model, eps=epsilon, alpha=step, steps=n, random_start=False) for n in PGD_STEPS),
    ]
    return [float((model(images).argmax(1) == y).double().mean()) for images in (x, *(a(x, y) for a in attacks))]


def test_evaluate_gives_torchattacks_accuracy_on_a_small_network(network: nn.Module) -> None:
    """In double precision inside: rounding must not decide the sign of a gradient."""
    model = InDouble(copy.deepcopy(network)).eval()
    x, y = _digits(100)
    result = evaluate(model, x, y, epsilon=EPSILON, step_size=STEP_SIZE, suites=["paper"], progress=False)
    expected = _peers_accuracies(model, x, y, EPSILON, STEP_SIZE)
    assert result.evaluations.accuracy[:15].tolist() == expected
    assert len(set(expected)) > 5  # else the attacks could hardly differ


def test_evaluate_gives_torchattacks_accuracy_on_torchvisions_resnet18() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.resnet18(num_classes=10)
        x = torch.rand(3, 3, 32, 32)
        network.train()
        network(torch.rand(16, 3, 32, 32))
    model = InDouble(network).eval().requires_grad_(False)
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 10
    epsilon, step_size = 0.001, 0.0002
    result = evaluate(model, x, y, epsilon=epsilon, step_size=step_size, suites=["paper"], progress=False)
    assert result.evaluations.accuracy[:15].tolist() == _peers_accuracies(model, x, y, epsilon, step_size)
    assert result.evaluations.accuracy[0] == 2 / 3


def _measured(model: nn.Module, *suites: str, count: int = 24, **changed: Any) -> dict[str, pd.DataFrame]:
    x, y = _digits(count)
    arguments = {"epsilon": EPSILON, "step_size": STEP_SIZE, "suites": suites or ("noise",), "progress": False}
    result = evaluate(model, **{"x": x, "y": y, **arguments, **changed})
    return {
        "evaluations": result.evaluations.drop(columns="seconds"),
        "predictions": result.predictions,
        "checks": result.checks,
    }


def _assert_equal(one: dict[str, pd.DataFrame], other: dict[str, pd.DataFrame]) -> None:
    for name, frame in one.items():
        pd.testing.assert_frame_equal(frame, other[name])


def test_the_frames_have_the_columns_of_the_tables_and_equal_each_other(network: nn.Module) -> None:
    x, y = _digits(24)
    result = evaluate(network, x, y, suites=("noise", "pgd_momentum", "checks"), batch_size=10, progress=False)
    assert {name: list(getattr(result, name)) for name in COLUMNS} == COLUMNS
    assert set(result.evaluations.model) == set(result.predictions.model) == set(result.checks.model) == {"model"}
    assert result.evaluations.attack.tolist() == ["noise", "pgd_momentum", "worst_case"]
    for row in result.evaluations.itertuples():
        own = result.predictions[result.predictions.attack == row.attack]
        assert own.example.tolist() == list(range(24))
        assert own.label.tolist() == y.tolist()
        assert (own.prediction == own.label).sum() == row.correct == round(row.accuracy * row.examples)
        assert (row.accuracy_low, row.accuracy_high) == wilson(row.correct, row.examples)
    assert not result.checks.fired.any()
    assert set(result.checks.check) == set(CHECK_FUNCTIONS)  # without PGD with restarts there is no `stronger`
    assert result.checks.could_fire.dtype == bool


@pytest.mark.parametrize(
    "form", ["uint8 NHW", "uint8 NHWC", "numpy", "double", "list of labels", "views", "uint8 views"]
)
def test_every_form_of_images_and_labels_gives_the_same_rows(network: nn.Module, form: str) -> None:
    x, y = _digits(24)
    pixels = (x * 255).round().to(torch.uint8)
    forms: dict[str, tuple[Any, Any]] = {
        "uint8 NHW": (pixels[:, 0], y),
        "uint8 NHWC": (pixels.permute(0, 2, 3, 1), y.to(torch.uint8)),
        "numpy": (x.numpy(), y.numpy().astype(np.int32)),
        "double": (x.double(), y),
        "list of labels": (x, y.tolist()),
        "views": (x.numpy()[::-1].copy()[::-1], y.numpy()[::-1].copy()[::-1]),  # with negative strides
        "uint8 views": (pixels[:, 0].numpy()[:, ::-1].copy()[:, ::-1], y),
    }
    images, labels = forms[form]
    _assert_equal(_measured(network, x=images, y=labels), _measured(network))


def test_numbers_of_numpy_are_numbers(network: nn.Module) -> None:
    given = _measured(network, epsilon=np.float64(0.1), seed=np.int64(3), batch_size=np.int32(8))
    _assert_equal(given, _measured(network, epsilon=0.1, seed=3, batch_size=8))


class Plain(nn.Module):
    """A network whose layers stand in plain lists, dicts and tuples, and which changes what it can in every pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        pair, relu, flatten, linear = copy.deepcopy(network)  # type: ignore[misc]
        self.layers = [pair[0], (nn.Dropout(0.5),), {"norm": [pair[1]]}]
        self.rest = nn.Sequential(relu, flatten, nn.Dropout(0.5), linear)
        self.register_buffer("passes", torch.zeros(()))
        self.call = self.forward_plain

    def forward_plain(self, x: torch.Tensor) -> torch.Tensor:
        convolution, (dropout,), norms = self.layers
        logits: torch.Tensor = self.rest(norms["norm"][0](dropout(convolution(x))))  # type: ignore[index]
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.passes += 1
        random.random()
        np.random.random()
        torch.rand(())
        return self.call(x)


def _modules(model: Plain) -> list[nn.Module]:
    convolution, (dropout,), norms = model.layers
    return [convolution, dropout, *norms["norm"], *model.modules()]  # type: ignore[index,list-item]


def _state(model: Plain) -> list[Any]:
    """Everything of a model that a run might change, as values that compare by content."""
    state: list[Any] = []
    for module in _modules(model):
        state.append(module.training)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            grad = None if tensor.grad is None else tensor.grad.tolist()
            state += [id(tensor), tensor.tolist(), tensor.requires_grad, grad]
    return state


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_model_with_plain_containers_in_either_mode_is_measured_as_in_evaluation_mode_and_left_as_it_was(
    network: nn.Module, mode: str
) -> None:
    model = Plain(network)
    for module in _modules(model):
        module.train(mode == "train")
        module.requires_grad_(True)
    model.rest[3].bias.requires_grad_(False)  # type: ignore[union-attr]
    model.rest[3].weight.grad = torch.ones(10, 512)  # type: ignore[union-attr]
    before = _state(model)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # type: ignore[index]
    rows = _measured(model, "pgd_momentum", "noise", "checks")
    assert _state(model) == before
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states  # type: ignore[index]
    expected = _measured(network, "pgd_momentum", "noise", "checks")
    assert rows["evaluations"].correct.tolist() == expected["evaluations"].correct.tolist()
    assert rows["predictions"].prediction.tolist() == expected["predictions"].prediction.tolist()
    assert not rows["checks"].fired.any()


def test_a_model_whose_forward_was_replaced_by_a_closure_keeps_its_buffers(network: nn.Module) -> None:
    model = copy.deepcopy(network).train()
    forward = model.forward
    model.forward = lambda x: forward(1.0 * x)  # type: ignore[method-assign]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InvalidInput, match="rest of its batch"):
        _measured(model, "noise")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_evaluate_works_inside_no_grad_and_inference_mode(network: nn.Module) -> None:
    expected = _measured(network, "pgd_momentum")
    with torch.no_grad():
        _assert_equal(_measured(network, "pgd_momentum"), expected)
    with torch.inference_mode():
        _assert_equal(_measured(network, "pgd_momentum"), expected)


class Changed(nn.Module):
    """A network with something done to its outputs."""

    def __init__(self, network: nn.Module, change: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.network, self.change = network, change

    def forward(self, x: torch.Tensor) -> Any:
        return self.change(self.network(x))


def test_a_model_without_a_gradient_path_is_measured_and_its_check_fires(network: nn.Module) -> None:
    with pytest.warns(UserWarning, match="model: no gradient of the loss reaches the pixels"):
        rows = _measured(Changed(network, torch.Tensor.detach), "pgd_momentum", "checks")
    assert rows["checks"].set_index("check").fired["zero_gradients"]
    assert rows["evaluations"].perturbation.tolist() == [0.0, 0.0]  # the worst case is the same


def test_a_random_model_has_equal_results_with_equal_seeds(network: nn.Module) -> None:
    model = Changed(network, lambda logits: logits + 0.1 * torch.randn_like(logits))
    _assert_equal(_measured(model, "pgd_momentum", "checks"), _measured(model, "pgd_momentum", "checks"))
    assert _measured(model, "checks")["checks"].set_index("check").fired["random"]


X, Y = torch.rand(4, 1, 8, 8), torch.arange(4)
REFUSALS: list[tuple[str, dict[str, Any]]] = [
    ("norm: 'l3' .* linf, l2, l1", {"norm": "l3"}),
    ("epsilon: 0 ", {"epsilon": 0}),
    ("epsilon: nan ", {"epsilon": float("nan")}),
    ("epsilon: 8 .* up to 1", {"epsilon": 8}),
    ("step_size: '2/255' ", {"step_size": "2/255"}),
    ("suites: 'papr' .* paper", {"suites": ("papr",)}),
    ("suites: 'transfer' ", {"suites": ("transfer",)}),
    ("suites: none", {"suites": ()}),
    ("suites: 'square' .* norm l2 are paper, .* apgd_l2", {"norm": "l2", "suites": ("square",)}),
    ("suites: 'pgd_l2' .* norm linf", {"suites": ("pgd_l2",)}),
    ("suites: 'pgd_gate' .* no experts and gate", {"suites": ("pgd_gate",)}),
    ("seed: -1 ", {"seed": -1}),
    ("seed: 0.5 ", {"seed": 0.5}),
    ("batch_size: 0 ", {"batch_size": 0}),
    ("batch_size: 2000000000 ", {"batch_size": 2_000_000_000}),
    ("device: 'gpu' ", {"device": "gpu"}),
    ("model: str ", {"model": "resnet18"}),
    ("x: dtype int64 ", {"x": (X * 255).long()}),
    ("x: values from 0 to 255 ", {"x": torch.tensor([0.0, 255.0]).repeat(4, 1, 8, 4)}),
    ("x: values from nan ", {"x": X * float("nan")}),
    ("x: shape \\(4, 8, 8\\) .* NCHW", {"x": X[:, 0]}),
    ("x: shape \\(4, 1, 8, 8\\) .* NHWC", {"x": (X * 255).to(torch.uint8)}),
    ("x: shape \\(0, 1, 8, 8\\) .* at least one", {"x": X[:0], "y": Y[:0]}),
    ("model: it cannot be called with images of shape \\(4, 3, 8, 8\\)", {"x": X.expand(-1, 3, -1, -1)}),
    ("y: shape \\(3,\\) .* \\(4,\\)", {"y": Y[:3]}),
    ("y: dtype float32 ", {"y": Y.float()}),
    ("y: label 10 .* 0 to 9", {"y": Y + 7}),
    ("y: label -1 .* 0 to 9", {"y": Y - 1}),
]


@pytest.mark.parametrize(("message", "changed"), REFUSALS, ids=[message for message, _ in REFUSALS])
def test_an_argument_that_cannot_be_used_is_one_line_before_any_attack(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch, message: str, changed: dict[str, Any]
) -> None:
    _refused(monkeypatch, InvalidInput, message, **{"model": network, "x": X, "y": Y, **changed})


def _refused(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str, **arguments: Any) -> None:
    for name in ("evaluate", "check"):
        monkeypatch.setattr(run, name, lambda *_, **__: pytest.fail("an attack was started"))
    with pytest.raises(kind, match=message) as caught:
        evaluate(**arguments, progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "kind", "change"),
    [
        ("probabilities", NotLogits, lambda logits: logits.softmax(1)),
        ("NaN", NotLogits, lambda logits: logits / 0 * 0),
        ("NaN", NotLogits, lambda logits: logits.where(torch.arange(len(logits))[:, None] < 3, torch.inf)),
        ("outputs of shape \\(4,\\)", InvalidInput, lambda logits: logits.argmax(1).float()),
        ("outputs of shape \\(4, 1\\)", InvalidInput, lambda logits: logits[:, :1]),
        ("outputs of shape \\(4, 10\\) and torch.int64", InvalidInput, lambda logits: logits.long()),
        ("outputs of type tuple", InvalidInput, lambda logits: (logits, None)),
        ("rest of its batch", InvalidInput, lambda logits: logits - logits.mean(0)),
        ("cannot be called", InvalidInput, lambda logits: logits.no_such_method()),
        ("'autoattack' .* 3 classes", InvalidInput, lambda logits: logits[:, :3]),
    ],
)
def test_a_model_that_cannot_be_attacked_is_refused_before_any_attack(
    network: nn.Module,
    monkeypatch: pytest.MonkeyPatch,
    message: str,
    kind: type[Exception],
    change: Callable[[torch.Tensor], Any],
) -> None:
    arguments = {"x": X, "y": Y % 3, "suites": ("autoattack", "checks")}
    _refused(monkeypatch, kind, message, model=Changed(network, change), **arguments)


def test_a_model_that_changes_its_images_in_place_is_refused(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    for layer in (nn.Hardtanh(inplace=True), nn.ReLU(inplace=True)):  # which changes no value of these images
        model = nn.Sequential(layer, network)
        _refused(monkeypatch, InvalidInput, "changes the images in place", model=model, x=X, y=Y)


def test_hidden_layers_in_train_mode_are_refused_and_keep_their_statistics(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    norm = nn.BatchNorm2d(1)  # in an object that is no module, where nothing can freeze it
    model = nn.Sequential(network)
    model.layer = SimpleNamespace(norm=norm)  # type: ignore[assignment]
    model.register_forward_pre_hook(lambda module, inputs: (module.layer.norm(inputs[0]),))
    _refused(monkeypatch, InvalidInput, "rest of its batch", model=model, x=X, y=Y)
    assert int(norm.num_batches_tracked) == 0


def test_l2_suites_use_the_given_ball(network: nn.Module) -> None:
    rows = _measured(network, "pgd_l2", norm="l2", epsilon=0.3, step_size=0.05)["evaluations"]
    row, worst = rows.itertuples()
    assert (worst.attack, worst.norm, worst.epsilon, worst.correct) == ("worst_case", "l2", 0.3, row.correct)
    assert (row.attack, row.epsilon, row.step_size) == ("pgd_l2", 0.3, 0.05)
    assert 0.2 < row.perturbation <= 0.3 + 1e-6


@pytest.mark.parametrize(("norm", "radius", "step"), [("linf", 8 / 255, 2 / 255), ("l2", 0.5, 0.1), ("l1", 12, 1)])
def test_every_norm_has_a_default_radius_and_measures_paper_and_checks(
    network: nn.Module, norm: str, radius: float, step: float
) -> None:
    x, y = torch.rand(4, 1, 8, 8), torch.arange(4)
    result = evaluate(network, x, y, norm=norm, progress=False)  # type: ignore[arg-type]
    rows = result.evaluations[result.evaluations.attack.str.startswith("pgd")]
    assert len(rows) == 7
    assert set(zip(rows.norm, rows.epsilon, rows.step_size, strict=True)) == {(norm, radius, step)}
    assert set(result.evaluations.norm[result.evaluations.attack == "fgsm"]) == {"linf"}
    assert not result.checks.empty


def test_the_progress_bar_is_on_stderr_or_nowhere(network: nn.Module, capfd: pytest.CaptureFixture[str]) -> None:
    for progress in (True, False):
        _measured(network, "noise", progress=progress)
        out, err = capfd.readouterr()
        assert not out
        assert ("100%" in err) is progress


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, dwf_cluster; assert 'torch' not in sys.modules; dwf_cluster.evaluate; dwf_cluster.load"
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------------- load


def _stored(experiment: Experiment, images: Images, storage: Path) -> Store:
    """An experiment's folder as a run leaves it, with untrained weights and predictions of the mixture."""
    store = experiment.store(str(storage))
    store.write("experiment.json", experiment.to_json().encode())
    models: dict[str, nn.Module] = {}
    for spec in experiment.models:
        parents = {name: copy.deepcopy(models[name]) for name in spec.parents}
        models[spec.name] = model = untrained(spec, images.format, experiment.seed, parents)
        weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
        checkpoints.save(store, spec.name, spec.training.epochs, 0, weights, {})
    settings = (images.x_test, images.y_test, experiment.evaluation, experiment.threats)
    name = experiment.defended.name
    _, rows = run.evaluate(
        {name: models[name]}, name, "pgd_gate", *settings, seed=experiment.seed, device=torch.device("cpu")
    )
    tables.write(store, "predictions", "evaluate-mixture-pgd_gate-000000000", rows)
    return store


def test_a_loaded_model_gives_the_stored_predictions(tiny: Experiment, images: Images, tmp_path: Path) -> None:
    store = _stored(tiny, images, tmp_path)
    model = load(f"{tmp_path}/{tiny.folder}/")
    assert isinstance(model, Mixture)
    assert not model.training
    settings = (images.x_test, images.y_test, tiny.evaluation, tiny.threats)
    device = torch.device("cpu")
    _, rows = run.evaluate({"mixture": model}, "mixture", "pgd_gate", *settings, seed=tiny.seed, device=device)
    stored = tables.read(store, "predictions").to_pylist()
    assert len(stored) == len(images.y_test)
    for row, expected in zip(rows, stored, strict=True):
        assert (row["prediction"], row["margin"]) == (expected["prediction"], expected["margin"])
    x = torch.tensor(images.x_test) / 255
    assert model.gate(x).shape == (40, 3)
    assert load(tmp_path / tiny.folder, "fgsm-1")(x).shape == (40, 10)
    result = evaluate(model, x, images.y_test, suites=("pgd_gate", "pgd_expert"), progress=False)
    assert result.evaluations.attack.tolist() == ["pgd_gate", "pgd_expert", "worst_case"]
    assert {len(gate) for gate in result.predictions.gate} == {3}


def test_load_takes_urls_and_the_users_own_images(tmp_path: Path) -> None:
    from dwf_cluster.data import sources

    file = write_npz(tmp_path / "own.npz")
    own = [name for name in TINY if not name.startswith("data.")]
    experiment = build(str(file), 0, own)
    images = sources.load(experiment.data, Path())
    _stored(experiment, images, tmp_path)
    model = load(f"file://{tmp_path}/{experiment.folder}", "mixture")
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 3)
    file.unlink()
    with pytest.raises(InvalidInput, match=r"own\.npz.* cannot be read: No such file"):
        load(f"{tmp_path}/{experiment.folder}")


def test_load_refuses_unknown_folders_and_models_and_removes_nothing(
    tiny: Experiment, images: Images, tmp_path: Path
) -> None:
    store = _stored(tiny, images, tmp_path)
    with pytest.raises(InvalidInput, match=r"name: 'pgd-9' .* benign, fgsm-1, pgd-1, mixture"):
        load(store.root, "pgd-9")
    with pytest.raises(InvalidInput, match=r"no experiment\.json"):
        load(tmp_path)
    (tmp_path / tiny.folder).rename(tmp_path / "renamed")  # its checkpoints then belong to another experiment
    with pytest.raises(InvalidInput, match=r"name: 'mixture' .* 0 of 2 epochs"):
        load(tmp_path / "renamed")
    assert list((tmp_path / "renamed" / "checkpoints" / "joint").iterdir())
    (tmp_path / "renamed" / "experiment.json").write_text("{")
    with pytest.raises(InvalidInput, match=r"experiment\.json"):
        load(tmp_path / "renamed")


def test_every_suite_that_needs_a_gate_attacks_a_mixture() -> None:
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(64, 4)) for _ in range(2)]
    mixture = Mixture(experts, Gate(2, (1, 8, 8), (0.5,), (0.25,), hidden=4))
    rows = _measured(mixture, "pgd_gate", x=X, y=Y)
    assert rows["evaluations"].attack.tolist() == ["pgd_gate", "worst_case"]


def test_a_gate_that_gives_each_image_to_one_expert_is_attacked_by_its_routing_too() -> None:
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(64, 4)) for _ in range(2)]
    mixture = Mixture(experts, Gate(2, (1, 8, 8), (0.5,), (0.25,), hidden=4, hard=True))
    with pytest.warns(UserWarning, match="upper bounds, so pgd_route is measured too"):
        rows = _measured(mixture, "noise", x=X, y=Y)
    assert rows["evaluations"].attack.tolist() == ["noise", "pgd_route", "worst_case"]
