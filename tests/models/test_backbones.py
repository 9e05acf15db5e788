"""Every backbone: its size and operations against the published ones, its image sizes, its frozen model."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.data.device import DeviceImages, to_float
from dwf_cluster.data.registry import ImageFormat, Shape
from dwf_cluster.data.sources import load, sizes
from dwf_cluster.defences.build import to_train
from dwf_cluster.defences.build import trained as build_trained
from dwf_cluster.defences.registry import METHODS
from dwf_cluster.evaluation.registry import PAPER
from dwf_cluster.evaluation.run import evaluate
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.plain import Mean
from dwf_cluster.models.registry import BACKBONES
from dwf_cluster.plan.jobs import jobs
from dwf_cluster.presets import build
from dwf_cluster.settings import InvalidInput
from dwf_cluster.training.loop import train

from ..conftest import TINY, task_for, write_npz

PUBLISHED = {
    "resnet18": (11_173_962, "0.555"),
    "resnet34": (21_282_122, "1.159"),
    "resnet50": (23_520_842, "1.298"),
    "vgg19": (20_040_522, "0.398"),
    "densenet121": (6_956_298, "0.888"),
    "densenet169": (12_493_322, "1.060"),
    "densenet121-k12": (1_000_618, "0.125"),
    "googlenet": (5_490_986, "1.337"),
    "inception-v3": (21_806_058, "3.10"),
    "xception": (20_829_578, "1.130"),
    "mobilenet-v2": (2_236_682, "0.088"),
}
"""Parameters and GMACs for ten classes and images of 3x32x32, of others' networks of this structure."""


def _built(name: str, width: int, shape: Shape) -> nn.Module:
    channels = shape[0]
    images = ImageFormat(shape, 10, (0.5, 0.4, 0.3)[:channels], (0.2, 0.25, 0.3)[:channels])
    return cast(nn.Module, pkgutil.resolve_name(BACKBONES[name].build)(images, width))


def _narrowest(name: str) -> int:
    """The smallest allowed width from 4 on."""
    return next(width for width in range(4, 65) if BACKBONES[name].has_width(width))


def _counted_flops(model: nn.Module, shape: Shape) -> int:
    with FlopCounterMode(display=False) as counter:
        model.eval()(torch.rand(1, *shape, device=next(model.parameters()).device))
    return counter.get_total_flops()


def test_every_backbone_has_a_published_size() -> None:
    assert set(PUBLISHED) == set(BACKBONES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_width_64_has_the_published_parameters_and_operations(name: str) -> None:
    parameters, gmacs = PUBLISHED[name]
    with torch.device("meta"):
        model = _built(name, 64, (3, 32, 32))
        flops = _counted_flops(model, (3, 32, 32))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert f"{flops / 2e9:.{len(gmacs) - 2}f}" == gmacs


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_registry_counts_the_networks_operations_and_parameters(name: str) -> None:
    backbone = BACKBONES[name]
    size = max(backbone.smallest, 32)
    for width, shape in ((64, (3, size, size)), (_narrowest(name), (1, size + 4, size))):
        with torch.device("meta"):
            model = _built(name, width, shape)
            *_, last = (module for module in model.modules() if isinstance(module, nn.Linear))
            counted = _counted_flops(model, shape) - 2 * last.in_features * 10  # the registry leaves the last layer out
        assert backbone.flops(width, shape) == counted
        assert backbone.parameters(width, shape[0], 10) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_backbone_takes_its_smallest_images_and_none_below(name: str) -> None:
    smallest, width = BACKBONES[name].smallest, _narrowest(name)
    with torch.device("meta"):
        logits = _built(name, width, (1, smallest, smallest))(torch.rand(2, 1, smallest, smallest))
        assert logits.shape == (2, 10)
        if smallest > 1:
            with pytest.raises((RuntimeError, ValueError)):
                _built(name, width, (1, smallest - 1, smallest))(torch.rand(2, 1, smallest - 1, smallest))


def _in_use(name: str, shape: Shape) -> nn.Module:
    """With statistics of its own, in double precision: rounding must not decide on which side of zero a ReLU's input
    lies."""
    torch.manual_seed(0)
    model = _built(name, _narrowest(name), shape).double()
    for brightness in (1, 2):
        model(brightness * torch.rand(4, *shape, dtype=torch.float64))
    return model


@pytest.mark.parametrize("name", PUBLISHED)
def test_attacks_have_the_gradients_of_the_model_in_evaluation_mode(name: str) -> None:
    side = max(8, BACKBONES[name].smallest)
    model = _in_use(name, (1, side, side))
    x, y = torch.rand(2, 1, side, side, dtype=torch.float64), torch.arange(2)
    found = differentiate(frozen(model), x, y)
    torch.testing.assert_close(found, differentiate(model.eval(), x, y))
    assert float(found[0].abs().max()) > 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_training_step_draws_no_random_numbers(name: str) -> None:
    """Random draws of training come from `determinism.Draws`, so no network has dropout that draws."""
    side = max(8, BACKBONES[name].smallest)
    model = _built(name, _narrowest(name), (1, side, side)).train()
    before = torch.get_rng_state()
    model(torch.zeros(2, 1, side, side)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_papers_attacks_measure_every_backbone(name: str) -> None:
    """In every column of the result table. Clean images are classified correctly, and PGD lowers their margin."""
    side = max(8, BACKBONES[name].smallest)
    model = _in_use(name, (1, side, side))
    x = torch.randint(256, (2, 1, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = model.eval()(to_float(x).double()).argmax(1)
    few = ["pgd_steps=2,4", "restart_steps=2", "adaptive_steps=2", "fgsm_epsilons=0.1,0.2"]
    settings = build("digits", 0, [f"evaluation.{field}" for field in few])
    rows, predictions = evaluate(
        {name: model},
        name,
        PAPER,
        x.numpy(),
        y.numpy(),
        settings.evaluation,
        settings.threats,
        seed=0,
        device=torch.device("cpu"),
    )
    correct = {(row["attack"], row["steps"]): row["correct"] for row in rows}
    assert {attack for attack, _ in correct} == {"clean", "fgsm", "pgd", "pgd_restarts", "pgd_adaptive"}
    assert len(predictions) == 2 * len(rows)
    assert correct["clean", None] == 2
    margins = [sum(row["margin"] for row in predictions if row["attack"] == attack) for attack in ("clean", "pgd")]
    assert margins[1] / 2 < margins[0]  # of two runs of PGD


def _mixture(*experts: nn.Module) -> Mixture:
    torch.manual_seed(1)
    return Mixture(experts, Gate(len(experts), (1, 8, 8), (0.5,), (0.25,), hidden=4)).double()


def _check_frozen(mixture: Mixture) -> None:
    x, y = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.arange(2)
    found = differentiate(frozen(mixture), x, y)
    torch.testing.assert_close(found, differentiate(mixture.eval(), x, y))


def test_experts_of_one_backbone_pass_at_once_with_the_same_gradients() -> None:
    for name in ("resnet50", "densenet121-k12", "mobilenet-v2", "xception"):
        experts = [_in_use(name, (1, 8, 8)), _built(name, _narrowest(name), (1, 8, 8)).double()]
        _check_frozen(_mixture(*experts))


def test_experts_of_different_backbones_have_the_models_gradients() -> None:
    _check_frozen(_mixture(*(_in_use(name, (1, 8, 8)) for name in ("resnet18", "mobilenet-v2", "xception"))))


def test_experts_with_equal_weights_and_different_strides_have_the_models_gradients() -> None:
    """Their weights could be stacked, and must not be."""
    experts = [
        nn.Sequential(nn.Conv2d(1, 4, 3, stride, padding=1), nn.ReLU(), Mean(), nn.Linear(4, 3)) for stride in (1, 2)
    ]
    _check_frozen(_mixture(*experts))


# ------------------------------------------------------------------------------------------------ experiments


def test_several_backbones_are_dealt_to_the_experts_in_turn() -> None:
    experiment = build("digits", 0, ["model.backbone=resnet18,mobilenet-v2", "experts.fgsm=1", "experts.pgd=2"])
    backbones = {spec.name: spec.backbone for spec in experiment.models}
    assert [backbones[name] for name in experiment.defended.parents] == ["resnet18", "mobilenet-v2"] * 2
    each = [METHODS["standard"].flops(experiment.spec(name), (1, 8, 8)) for name in experiment.defended.parents]
    assert METHODS["dwf"].flops(experiment.defended, (1, 8, 8)) == sum(each)
    assert experiment.defended.backbones == ("resnet18", "mobilenet-v2") * 2


def test_the_controls_of_a_mixture_of_backbones_have_its_experts_networks() -> None:
    names = ["model.backbone=resnet18,mobilenet-v2", "experts.fgsm=1", "experts.pgd=1", "baselines=controls"]
    experiment = build("digits", 0, names)
    assert experiment.spec("joint-fgsm-1").backbones == ("mobilenet-v2",)
    assert experiment.spec("joint-uniform").backbones == experiment.spec("uniform").backbones
    assert experiment.spec("uniform").backbones == ("resnet18", "mobilenet-v2", "resnet18")


def test_one_backbone_in_an_older_file_is_read_and_has_the_same_signature() -> None:
    experiment = build("digits")
    fields = json.loads(experiment.to_json())
    fields["model"]["backbone"] = "resnet18"
    older = Experiment.from_json(json.dumps(fields))
    assert (older, older.signature) == (experiment, experiment.signature)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_backbones_name_is_a_row_trained_on_clean_images(name: str) -> None:
    width = max(16, _narrowest(name))
    experiment = build("digits", 0, [f"baselines={name}", f"model.width={width}", "data.padding=12"])
    spec = experiment.spec(name)
    assert (spec.backbone, spec.method, spec.parents) == (name, "standard", ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.width=32", "baselines=googlenet"], "model.width: 32 cannot be used with googlenet: allowed is 64"),
        (["model.backbone=inception-v3"], "model.width: 8 cannot be used with inception-v3: allowed is 64"),
        (["model.width=12", "baselines=xception"], "12 cannot be used with xception: allowed are multiples of 8"),
        (["baselines=vgg19"], "data.source: images with a side of 8 cannot be used with vgg19: allowed are 32x32 and"),
        (["model.backbone=resnet19"], "model.backbone.0: 'resnet19' cannot be used: allowed are resnet18, "),
        (["model.backbone="], "model.backbone: '' cannot be used: "),
    ],
)
def test_a_network_that_cannot_be_built_is_refused_in_one_line(settings: list[str], message: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        build("digits", 0, settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_small_images_of_a_file_are_refused_when_they_are_known(tmp_path: Path) -> None:
    file = write_npz(tmp_path / "images.npz")  # of 8x8
    experiment = build(str(file), 0, ["baselines=vgg19"])
    with pytest.raises(InvalidInput, match="a side of 8 cannot be used with vgg19: allowed are 32x32"):
        jobs(experiment, "experts", sizes(experiment.data))


def test_a_mixture_of_two_backbones_is_trained_and_loaded(tmp_path: Path) -> None:
    settings = [
        *TINY,
        "model.backbone=resnet18,mobilenet-v2",
        "experts.fgsm=1",
        "experts.pgd=0",
        "experts.epochs=1",
        "joint.epochs=1",
    ]
    experiment = build("digits", 0, settings)
    store, images = experiment.store(str(tmp_path)), load(experiment.data, tmp_path)
    for name in experiment.names:
        model = to_train(experiment.models, name, images.format, 0, store)
        train(task_for(experiment, store, name), model, DeviceImages(images, experiment.data, torch.device("cpu")))
    trained = build_trained(experiment.models, "mixture", images.format, 0, store)
    assert isinstance(trained, Mixture)
    assert [type(expert).__name__ for expert in trained.experts] == ["ResNet", "Normalized"]
    assert trained(torch.rand(2, 1, 8, 8)).shape == (2, 10)
