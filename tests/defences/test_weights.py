"""Checkpoints that the user has: read, renamed, tested by their clean accuracy, stored as trained models."""

from __future__ import annotations

import hashlib
import json
import pkgutil
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from dwf_cluster.api import load as load_trained_model
from dwf_cluster.cluster.events import Connected
from dwf_cluster.data.device import DeviceImages, to_float
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.data.sources import Images, load, sizes
from dwf_cluster.defences.build import to_train, trained
from dwf_cluster.experiment import Experiment
from dwf_cluster.launch import main
from dwf_cluster.models.registry import BACKBONES
from dwf_cluster.models.resnet import Normalize, resnet18
from dwf_cluster.models.state_dicts import FORMS, Misfit, matched
from dwf_cluster.pipeline.run import Run
from dwf_cluster.pipeline.sweep import sweep
from dwf_cluster.pipeline.trial_table import TrialTable
from dwf_cluster.plan.jobs import EVALUATE, EXPERTS, deduplicate, jobs, pending
from dwf_cluster.plan.resources import Resources, allocate
from dwf_cluster.plan.schedule import Schedule
from dwf_cluster.presets import build, invocation
from dwf_cluster.settings import InvalidInput, to_text
from dwf_cluster.status import _resume_command
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.training.given import clean_accuracy, take_over

from ..conftest import TINY, task_for

CPU = torch.device("cpu")
MEAN, STD = 0.3, 0.4


class Block(nn.Module):
    """A block of a ResNet, with kuangliu's names."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class Network(nn.Module):
    """ResNet-18 in its CIFAR form with kuangliu's names, without a normalisation."""

    def __init__(self, width: int = 4, classes: int = 10, channels: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        for stage in range(1, 5):
            stride = 1 if stage == 1 else 2
            blocks = Block(widths[stage - 1], widths[stage], stride), Block(widths[stage], widths[stage], 1)
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(8 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, 5):
            x = getattr(self, f"layer{stage}")(x)
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def network() -> nn.Module:
    """A network whose BatchNorm statistics are not those of a new one."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = Network()
        for _ in range(20):
            made(torch.rand(64, 1, 8, 8))
        return made.eval()


@pytest.fixture(scope="module")
def data() -> Images:
    return load(build("digits", 0, TINY).data, Path())


def _accuracy(network: nn.Module, images: Images) -> float:
    x = (to_float(torch.tensor(images.x_test)) - MEAN) / STD
    return 100 * float((network(x).argmax(1) == torch.tensor(images.y_test)).double().mean())


def _entry(file: Path, accuracy: float = 10.0, **changed: Any) -> dict[str, Any]:
    entry = {"name": "r18", "file": str(file), "width": 4, "mean": [MEAN], "std": [STD], "accuracy": accuracy}
    return {name: value for name, value in (entry | changed).items() if value is not None}


def _set(*entries: dict[str, Any]) -> str:
    return f"given={json.dumps(entries)}"


def _experiment(*entries: dict[str, Any], more: Sequence[str] = ()) -> Experiment:
    return build("digits", 0, [*TINY, *more, _set(*entries)])


def _take_over(experiment: Experiment, store: Store, images: Images) -> nn.Module:
    model = to_train(experiment.models, "r18", images.format, experiment.seed, store)
    arrays = DeviceImages(images, experiment.data, CPU)
    return take_over(task_for(experiment, store, "r18"), model, arrays, images.x_test, images.y_test)


# --------------------------------------------------------------------------------------------------- forms


def _renamed(state: dict[str, torch.Tensor], **rules: str) -> dict[str, torch.Tensor]:
    for old, new in rules.items():
        state = {name.replace(old, new): tensor for name, tensor in state.items()}
    return state


SAVED: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "kuangliu": lambda state: {"net": state, "acc": 93.02, "epoch": 199},
    "parallel": lambda state: {"net": {f"module.{name}": tensor for name, tensor in state.items()}},
    "torchvision": lambda state: _renamed(state, shortcut="downsample", linear="fc"),
    "lightning": lambda state: {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}},
    "half": lambda state: {name: t.half() if t.is_floating_point() else t for name, t in state.items()},
    "uncounted": lambda state: {name: t for name, t in state.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("form", [*SAVED, "safetensors"])
def test_a_checkpoint_of_each_form_gives_the_logits_of_its_network(
    tmp_path: Path, network: nn.Module, data: Images, form: str
) -> None:
    file = tmp_path / "resnet18.bin"
    if form == "safetensors":
        safetensors.torch.save_file(network.state_dict(), file)
    else:
        torch.save(SAVED[form](dict(network.state_dict())), file)
    experiment = _experiment(_entry(file, _accuracy(network, data)))
    model = _take_over(experiment, experiment.store(str(tmp_path)), data).eval()
    x = to_float(torch.tensor(data.x_test))
    logits = network((x - MEAN) / STD)
    tolerance = 2e-2 if form == "half" else 1e-4
    torch.testing.assert_close(model(x), logits, rtol=tolerance, atol=tolerance)


def test_a_network_of_this_package_keeps_its_own_normalisation(tmp_path: Path, data: Images) -> None:
    own = resnet18(data.format, 4)
    own.normalize.mean.fill_(MEAN)
    own.normalize.std.fill_(STD)
    file = tmp_path / "own.pt"
    torch.save({f"model.{name}": tensor for name, tensor in own.state_dict().items()}, file)
    accuracy = clean_accuracy(own, data.x_test, data.y_test, CPU)
    experiment = _experiment(_entry(file, accuracy, mean=None, std=None))
    model = _take_over(experiment, experiment.store(str(tmp_path)), data)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in own.state_dict().items())
    refused = _experiment(_entry(file, accuracy))
    with pytest.raises(InvalidInput, match=r"^given: r18: mean and std cannot be used: the file has its own"):
        _take_over(refused, refused.store(str(tmp_path / "other")), data)


@pytest.mark.parametrize("backbone", [name for name in FORMS if name in BACKBONES and name.startswith("resnet")])
def test_the_names_of_a_resnet_are_those_that_torchvision_has(backbone: str, data: Images) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, backbone)().state_dict()
    ours = pkgutil.resolve_name(BACKBONES[backbone].build)(data.format, 64).state_dict()
    form = next(form for form in FORMS[backbone] if form.source == "torchvision or timm")
    assert form.rename([name for name in ours if not name.startswith("normalize.")]) == [*theirs]


def test_the_names_of_vgg_19_are_those_of_torchvisions_features_in_their_order() -> None:
    with torch.device("meta"):
        theirs = torchvision.models.vgg19_bn().features.state_dict()
    (form,) = FORMS["vgg19"]
    assert form.rename([])[:-2] == [f"features.{name}" for name in theirs]


def _on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """A network of shapes alone, behind a normalisation."""
    with torch.device("meta"):
        return nn.Sequential(Normalize([0.5] * 3, [0.5] * 3), make())


def _vgg19() -> nn.Module:
    return nn.Sequential(*torchvision.models.vgg19_bn().features, nn.Flatten(), nn.Linear(512, 10))


def test_kuangliu_vgg_19_is_loaded_by_position() -> None:
    model = _on_meta(_vgg19)
    (form,) = FORMS["vgg19"]
    ours = [name for name in model.state_dict() if not name.startswith("0.")]
    renamed = dict(zip(form.rename(ours), ours, strict=True))
    state = {name: model.state_dict()[own] for name, own in renamed.items()}
    loaded = matched(state, model, "vgg19")
    assert all(loaded[own] is state[name] for name, own in renamed.items())
    hidden = state | {"classifier.0.weight": torch.zeros(4096, 512)}
    with pytest.raises(Misfit, match=r"^classifier\.0\.weight is no weight of our vgg19: this one has hidden layers"):
        matched(hidden, model, "vgg19")


class DenseLayer(nn.Module):
    """A layer of a DenseNet with kuangliu's names; its features come before those of earlier layers."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x)))))), x], 1)


class Transition(nn.Module):
    """Between two blocks of a DenseNet."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, inputs // 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DenseNetwork(nn.Module):
    """A small DenseNet with kuangliu's names."""

    def __init__(self, blocks: Sequence[int], growth: int) -> None:
        super().__init__()
        channels = 2 * growth
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        for number, layers in enumerate(blocks, 1):
            block = [DenseLayer(channels + layer * growth, growth) for layer in range(layers)]
            setattr(self, f"dense{number}", nn.Sequential(*block))
            channels += layers * growth
            if number < len(blocks):
                setattr(self, f"trans{number}", Transition(channels))
                channels //= 2
        self.bn, self.linear = nn.BatchNorm2d(channels), nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv1(x)
        for number in range(1, 5):
            x = getattr(self, f"dense{number}")(x)
            x = getattr(self, f"trans{number}")(x) if number < 4 else x
        logits: torch.Tensor = self.linear(F.relu(self.bn(x)).mean((2, 3)))
        return logits


def test_a_densenet_that_puts_new_features_first_gives_the_same_logits() -> None:
    torch.manual_seed(0)
    theirs = DenseNetwork((2, 3, 1, 2), 4)
    for _ in range(3):
        theirs(torch.rand(16, 3, 16, 16))
    for tensor in theirs.state_dict().values():  # a new BatchNorm has the same weight for every channel
        if tensor.dim() == 1:
            tensor.add_(torch.rand(len(tensor)))
    ours = torchvision.models.DenseNet(4, (2, 3, 1, 2), 8, num_classes=10)
    ours.features.conv0 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    ours.features.norm0 = ours.features.relu0 = ours.features.pool0 = nn.Identity()
    model = nn.Sequential(Normalize([0.0] * 3, [1.0] * 3), ours)
    weights = matched(theirs.state_dict(), model, "densenet121")
    model.load_state_dict({**model.state_dict(), **weights})
    x = torch.rand(8, 3, 16, 16)
    torch.testing.assert_close(model.eval()(x), theirs.eval()(x), rtol=1e-4, atol=1e-5)


def test_a_densenet_with_a_norm_in_its_stem_is_refused() -> None:
    model = _on_meta(lambda: torchvision.models.DenseNet(4, (1, 1, 1, 1), 8))
    state = {**model[1].state_dict(), "features.norm0.weight": torch.zeros(8)}
    model[1].features.norm0 = nn.Identity()
    with pytest.raises(Misfit, match=r"^features\.norm0\.weight is no weight of our densenet121: this one has a norm"):
        matched(state, model, "densenet121")


def _plain(backbone: str) -> nn.Module:
    """A backbone of shapes alone, for images of 32x32."""
    images = ImageFormat((3, 32, 32), 10, (0.5,) * 3, (0.5,) * 3)
    with torch.device("meta"):
        network: nn.Module = pkgutil.resolve_name(BACKBONES[backbone].build)(images, 64)
        return network


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_state_dict_of_every_backbone_fits_with_and_without_the_modules_around_it(backbone: str) -> None:
    model = _plain(backbone)
    own = model.state_dict()
    assert matched(own, model, backbone).keys() == own.keys()
    weights = [name for name in own if not name.startswith("normalize.")]
    bare = {f"module.{name.removeprefix('network.')}": own[name] for name in weights}
    assert [*matched(bare, model, backbone)] == weights


def test_torchvisions_names_fit_its_network_behind_a_normalisation() -> None:
    model = _on_meta(torchvision.models.mobilenet_v2)
    state = model[1].state_dict()
    assert [*matched(state, model, "mobilenet-v2")] == [f"1.{name}" for name in state]
    with pytest.raises(Misfit, match=r"^layers\.0\.conv1\.weight is no weight of our mobilenet-v2: kuangliu's has"):
        matched({"layers.0.conv1.weight": torch.zeros(1)}, model, "mobilenet-v2")


STRUCTURES = [
    ("googlenet", "pre_layers.0.weight", "kuangliu's, weiaicunzai's and the one for larger images have other stems"),
    ("googlenet", "inception3a.branch3.3.conv.weight", "kuangliu's, weiaicunzai's and the one"),
    ("inception-v3", "Mixed_5b.branch5x5.0.conv.weight", "weiaicunzai's has another stem and other branches"),
    ("inception-v3", "linear.weight", "weiaicunzai's has another stem and other branches; allowed is torchvision's"),
    ("mobilenet-v2", "stage1.residual.0.bias", "kuangliu's has more shortcuts and no ReLU6, weiaicunzai's has other"),
    ("xception", "entry_flow.conv1.0.weight", "how the names of other sources, weiaicunzai's too, map to ours is not"),
]


@pytest.mark.parametrize(("backbone", "key", "reason"), STRUCTURES)
@pytest.mark.parametrize("others", ["none", "ours"])
def test_a_checkpoint_of_another_structure_is_refused_with_the_reason(
    backbone: str, key: str, reason: str, others: str
) -> None:
    """Whether or not other names of the file are those of our network."""
    model = _plain(backbone)
    bare = {name.removeprefix("network."): tensor for name, tensor in model.state_dict().items()}
    state = {key: torch.zeros(1)} if others == "none" else {**bare, key: torch.zeros(1)}
    with pytest.raises(Misfit) as error:
        matched(state, model, backbone)
    assert str(error.value).startswith(f"{key} is no weight of our {backbone}: {reason}")
    assert re.search("; allowed (is torchvision's with|are this package's)", str(error.value))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("backbone", "key"),
    [("googlenet", "aux1.fc1.weight"), ("inception-v3", "AuxLogits.fc.weight"), ("xception", "network.9.weights")],
)
def test_a_single_unknown_name_beside_all_known_ones_is_refused_with_the_nearest(backbone: str, key: str) -> None:
    model = _plain(backbone)
    with pytest.raises(Misfit, match=rf"^{re.escape(key)} is no weight of {backbone}"):
        matched({**model.state_dict(), key: torch.zeros(1)}, model, backbone)


# ------------------------------------------------------------------------------------------ clean accuracy


@pytest.mark.parametrize("points", [0.49, -0.49, 0.52, -0.52])
def test_the_clean_accuracy_may_differ_by_half_a_point(
    tmp_path: Path, network: nn.Module, data: Images, points: float
) -> None:
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    measured = _accuracy(network, data)
    experiment = _experiment(_entry(tmp_path / "r18.pth", measured + points))
    store = experiment.store(str(tmp_path / "runs"))
    if abs(points) < 0.5:
        _take_over(experiment, store, data)
        assert checkpoints.latest_epoch(store, "r18") == 1
        return
    with pytest.raises(InvalidInput) as error:
        _take_over(experiment, store, data)
    assert str(error.value) == (
        f"given: r18 cannot be used: its clean accuracy on 40 test images is {measured:.2f} %, expected are "
        f"{measured + points:.2f} %: allowed is a difference of 0.5 points; do backbone, mean and std fit the file?"
    )
    assert not (tmp_path / "runs").exists()


def test_weights_that_give_no_numbers_are_refused(tmp_path: Path, network: nn.Module, data: Images) -> None:
    torch.save({**network.state_dict(), "linear.bias": torch.full((10,), torch.nan)}, tmp_path / "r18.pth")
    experiment = _experiment(_entry(tmp_path / "r18.pth"))
    with pytest.raises(InvalidInput, match=r"r18\.pth' cannot be used: the model's outputs contain NaN"):
        _take_over(experiment, experiment.store(str(tmp_path)), data)


class _NoCluster:
    """In the place of a Ray cluster: keeps the images that it is given."""

    dashboard = token_file = None

    def share(self, images: Images) -> Images:
        return images


@contextmanager
def _no_ray() -> Iterator[Any]:
    yield _NoCluster()


def test_the_accuracy_is_that_on_all_test_images_however_few_are_attacked(tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    events: list[Any] = []
    run = Run(str(tmp_path / "runs"), tmp_path, _no_ray, events.append, lambda: False, "")
    experiment = _experiment(_entry(tmp_path / "r18.pth"))
    with run.connected([experiment], {}) as connection:
        images = connection.images
    assert isinstance(events[0], Connected)
    assert len(images.y_test) == 40
    assert [len(array) for array in images.whole_test] == [360, 360]
    assert np.array_equal(images.whole_test[0][:40], images.x_test)
    with run.connected([build("digits", 0, TINY)], {}) as connection:
        assert connection.images.whole_test is None


# ----------------------------------------------------------------------------- a model like any trained one


@pytest.fixture
def stored(tmp_path: Path, network: nn.Module, data: Images) -> tuple[Experiment, Store]:
    """An experiment that has taken the weights over, and whose file is gone."""
    file = tmp_path / "r18.pth"
    torch.save({"net": network.state_dict()}, file)
    experiment = _experiment(_entry(file, _accuracy(network, data)))
    store = experiment.store(str(tmp_path / "runs"))
    _take_over(experiment, store, data)
    store.write("experiment.json", experiment.to_json().encode())
    file.unlink()
    return experiment, store


def test_weights_that_were_taken_over_need_no_file(
    stored: tuple[Experiment, Store], network: nn.Module, data: Images
) -> None:
    experiment, store = stored
    x = to_float(torch.tensor(data.x_test))
    logits = network((x - MEAN) / STD)
    model = trained(experiment.models, "r18", data.format, experiment.seed, store)
    torch.testing.assert_close(model.eval()(x), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(load_trained_model(store.root, "r18")(x), logits, rtol=1e-4, atol=1e-5)
    (row,) = tables.read(store, "metrics", ["r18"]).to_pylist()
    assert (row["epoch"], row["step"], row["kept"], row["stage"]) == (1, 0, True, EXPERTS)


def test_taking_over_is_a_short_job_that_every_evaluation_of_the_model_waits_for(
    stored: tuple[Experiment, Store],
) -> None:
    experiment, store = stored
    size = sizes(experiment.data)
    assert experiment.names == ("benign", "fgsm-1", "pgd-1", "r18", "mixture")
    (job,) = (job for job in jobs(experiment, EXPERTS, size) if job.model == "r18")
    assert (job.cost, job.inputs) == (size.test, frozenset())
    evaluations = [job for job in jobs(experiment, EVALUATE, size) if job.model == "r18"]
    assert {job.suite for job in evaluations} == {"paper", "noise", "checks"}
    assert all(job.output in evaluation.inputs for evaluation in evaluations)
    transfers = [job for job in jobs(experiment, EVALUATE, size) if job.tests_transfer]
    assert all(job.output in transfer.inputs for transfer in transfers)
    assert job in pending(experiment, store, size)[EXPERTS]
    store.write(f"results/jobs/{job.file}.parquet", b"")
    assert job not in pending(experiment, store, size)[EXPERTS]


def test_weights_are_tested_before_hours_of_training(tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    experiment = _experiment(_entry(tmp_path / "r18.pth"))
    experts = jobs(experiment, EXPERTS, sizes(experiment.data))
    schedule = Schedule(experts, allocate(experts, Resources(1, 0)), 1)
    first = schedule.start()
    assert first is not None
    assert first.model == "r18"


def test_the_trials_of_a_sweep_share_the_weights(tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    entry = _set(_entry(tmp_path / "r18.pth"))
    rates = [f"experts.learning_rate={rate}" for rate in (0.1, 0.2)]
    trials = sweep("digits", [*TINY, entry], rates, [0], None, False)
    size = sizes(trials.trials[0].experiment.data)
    every = [job for trial in trials.trials for job in jobs(trial.experiment, EXPERTS, size) if job.model == "r18"]
    assert [job.copy_of is not None for job in deduplicate(every)] == [False, True]


def test_a_sweep_can_vary_the_weights(tmp_path: Path, network: nn.Module) -> None:
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    entry = _set(_entry(tmp_path / "r18.pth"))
    trials = sweep("digits", TINY, ["given=", entry], [None], None, False)
    assert [trial.experiment.given != () for trial in trials.trials] == [False, True]
    rows = TrialTable(trials, str(tmp_path / "runs")).rows
    assert [row["trial"] for row in rows] == ["given=", f"given={rows[1]['given']}"]
    assert json.loads(rows[1]["given"])[0]["name"] == "r18"


# -------------------------------------------------------------------------------- signature and command line


def test_the_signature_follows_the_content_of_the_file_and_not_its_path_or_accuracy(
    tmp_path: Path, network: nn.Module
) -> None:
    file, copy, other = (tmp_path / name for name in ("r18.pth", "copy.pth", "other.pth"))
    torch.save(network.state_dict(), file)
    copy.write_bytes(file.read_bytes())
    torch.save({**network.state_dict(), "linear.bias": torch.zeros(10)}, other)
    experiment = _experiment(_entry(file))
    assert experiment.given[0].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    assert _experiment(_entry(copy, 93.0)).signature == experiment.signature
    changes = [_entry(other), _entry(file, mean=[0.5]), _entry(file, name="other"), _entry(file, width=8)]
    signatures = {_experiment(entry).signature for entry in changes}
    assert len({*signatures, experiment.signature, build("digits", 0, TINY).signature}) == 6


def test_the_resume_command_names_the_weights_from_every_folder(
    tmp_path: Path, network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(network.state_dict(), "r18.pth")
    experiment = _experiment(_entry(Path("r18.pth")))
    assert experiment.given[0].file == str(tmp_path / "r18.pth")
    preset, changed = invocation(experiment)
    assert build(preset, 0, [f"{name}={to_text(value)}" for name, value in changed.items()]) == experiment
    command = _resume_command(experiment.to_json().encode(), experiment.folder, "runs", on_slurm=False)
    assert str(tmp_path / "r18.pth") in command
    assert Experiment.from_json(experiment.to_json()) == experiment


def test_a_file_can_be_at_a_url(tmp_path: Path, network: nn.Module, data: Images) -> None:
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    entry = _entry(tmp_path / "r18.pth", _accuracy(network, data))
    experiment = _experiment(entry | {"file": f"file://{tmp_path}/r18.pth"})
    assert experiment.signature == _experiment(entry).signature
    _take_over(experiment, experiment.store(str(tmp_path / "runs")), data)


class Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("pwned"),))


def _files(network: nn.Module) -> dict[str, Any]:
    state = dict(network.state_dict())
    return {
        "pickled": {"net": state, "acc": Malicious()},
        "whole": network,
        "list": [1, 2],
        "empty": {},
        "plain": {"acc": 93.0, "weights": 3},
        "classes": dict(Network(classes=7).state_dict()),
        "channels": dict(Network(channels=3).state_dict()),
        "width": dict(Network(width=8).state_dict()),
        "kinds": {**state, "linear.bias": torch.zeros(10, dtype=torch.int8)},
        "missing": {name: tensor for name, tensor in state.items() if name != "layer2.0.shortcut.0.weight"},
        "unknown": _renamed(state, **{"layer3.1.bn2": "layer3.1.norm2"}),
        "foreign": {"encoder.stem_conv.weight": torch.zeros(1)},
        "r18": state,
    }


CASES = [
    ("pickled", {}, "given: r18: '{file}' cannot be used: it holds pickled code ("),
    ("whole", {}, "given: r18: '{file}' cannot be used: it holds pickled code ("),
    ("list", {}, "given: r18: '{file}' cannot be used: it holds a list: allowed is a state dict"),
    ("empty", {}, "given: r18: '{file}' cannot be used: it holds no weights"),
    ("plain", {}, "given: r18: '{file}' cannot be used: it holds 'acc', which is no tensor"),
    ("classes", {}, "given: r18: '{file}' cannot be used: linear.weight is for 7 classes: the images have 10"),
    ("channels", {}, "given: r18: '{file}' cannot be used: conv1.weight is for 3 channels: the images have 1"),
    ("width", {}, "given: r18: '{file}' cannot be used: linear.weight has shape (10, 64): allowed is (10, 32); do "),
    ("kinds", {}, "given: r18: '{file}' cannot be used: linear.bias is of type torch.int8: allowed are floating-"),
    ("missing", {}, "given: r18: '{file}' cannot be used: layer2.0.shortcut.0.weight is missing: allowed are all "),
    (
        "unknown",
        {},
        "given: r18: '{file}' cannot be used: layer3.1.norm2.weight is no weight of resnet18; the nearest known name "
        "is layer3.1.bn2.weight (kuangliu)",
    ),
    ("foreign", {}, "given: r18: '{file}' cannot be used: encoder.stem_conv.weight is no weight of resnet18; the "),
    ("text", {}, "given: r18: '{file}' cannot be used: it is no checkpoint of torch or safetensors ("),
    ("header", {}, "given: r18: '{file}' cannot be used: it is no checkpoint of torch or safetensors ("),
    ("cut", {}, "given: r18: '{file}' cannot be used: it is no checkpoint of torch or safetensors ("),
    ("nothing", {}, "given: r18: '{file}' cannot be used: it is no checkpoint of torch or safetensors ("),
    ("gone", {}, "given.0.file: '{file}' cannot be read: No such file or directory"),
    ("folder", {}, "given.0.file: '{file}' cannot be read: it is a directory"),
    ("r18", {"file": "memory://gone/r18.pth"}, "given.0.file: 'memory://gone/r18.pth' cannot be read: there is no"),
    ("r18", {"file": "s3://key:secret@b/x.pth"}, "given.0.file: 's3://b/x.pth' with a password, a key or options"),
    ("r18", {"mean": [0.1] * 3, "std": [1.0] * 3}, "given: r18: mean and std of 3 channel(s) cannot be used: the im"),
    ("r18", {"std": None}, "given.0: mean and std need the same number of channels"),
    ("r18", {"accuracy": 101}, "given.0.accuracy: 101 cannot be used: Input should be less than or equal to 100"),
    ("r18", {"backbone": "vit"}, "given.0.backbone: 'vit' cannot be used: allowed are resnet18"),
    ("r18", {"name": "../r18"}, "given.0.name: '../r18' cannot be used"),
    ("r18", {"name": "joint"}, "given.0.name: 'joint' cannot be used: the checkpoints of mixture have this name"),
    ("r18", {"name": "benign"}, "experiment: defence, baselines and given give two models the name 'benign'"),
    ("r18", {"colour": "red"}, "given.0.colour: no such field"),
]


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory, network: nn.Module) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, content in _files(network).items():
        torch.save(content, folder / name)
    (folder / "text").write_text("hello, this is no checkpoint")
    (folder / "header").write_bytes((5).to_bytes(8, "little") + b"{nonsense")
    (folder / "cut").write_bytes((folder / "r18").read_bytes()[:5000])
    (folder / "nothing").write_bytes(b"")
    (folder / "folder").mkdir()
    return folder


@pytest.mark.parametrize(
    ("name", "changed", "message"), CASES, ids=[f"{name} {' '.join(changed)}" for name, changed, _ in CASES]
)
def test_bad_weights_are_one_line_and_exit_status_2_and_nothing_is_written(
    bad_files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    changed: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    file = bad_files / name
    entry = {k: v for k, v in (_entry(file) | changed).items() if v is not None}
    assert main(["--local", "--cpus", "1", "--gpus", "0", "--set", *TINY, _set(entry)]) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith(f"error: {message.format(file=file)}")
    assert "secret" not in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("r18.pth", "given.0: 'r18.pth' cannot be used: Input should be an object"),
        ("{}", "given: Input should be a valid array"),
        ('[{"name": "r18"}]', "given.0.file: Field required"),
        ('[{"name": "r18", "file": "r18.pth"}]', "given.0.accuracy: Field required"),
    ],
)
def test_a_value_that_is_no_list_of_entries_is_refused(value: str, message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        build("digits", 0, [f"given={value}"])
    assert str(error.value) == message


def test_a_file_that_changes_after_the_plan_is_refused(tmp_path: Path, network: nn.Module, data: Images) -> None:
    torch.save(network.state_dict(), tmp_path / "r18.pth")
    experiment = _experiment(_entry(tmp_path / "r18.pth"))
    torch.save({"net": network.state_dict()}, tmp_path / "r18.pth")
    with pytest.raises(InvalidInput, match="it has changed since the experiment was planned"):
        _take_over(experiment, experiment.store(str(tmp_path)), data)


def test_the_help_describes_the_fields_of_an_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help-fields", "given"]) == 0
    printed = capsys.readouterr().out
    for name in ("name", "file", "backbone", "width", "mean", "std", "accuracy", "sha256"):
        assert f"\n      {name} (" in printed
