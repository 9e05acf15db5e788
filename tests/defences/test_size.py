"""Parameters and operations of the models of every method, against models that are built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from analysis.cost import costs
from dwf_cluster.attacks.gradient import predict
from dwf_cluster.data.registry import ImageFormat, Shape
from dwf_cluster.defences.build import untrained
from dwf_cluster.defences.registry import METHODS, ModelSpec
from dwf_cluster.evaluation.registry import SUITES
from dwf_cluster.evaluation.run import evaluate
from dwf_cluster.evaluation.settings import Evaluation, Threat
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.presets import build

SHAPES: dict[str, Shape] = {"cifar10": (3, 32, 32), "digits": (1, 8, 8)}
ROWS = "controls,standard,pgd-at,fgsm-at,trades,free,fgsm-rs,n-fgsm,random-at,soe,advmoe"
MIXTURES = ("mixture", "uniform", "soe", "advmoe")
CPU = torch.device("cpu")


def _experiment(preset: str, *assignments: str) -> Experiment:
    return build(preset, 0, [f"baselines={ROWS}", "model.width=8", "experts.fgsm=1", "experts.pgd=1", *assignments])


def _built(specs: Sequence[ModelSpec], name: str, shape: Shape) -> nn.Module:
    """The model, and as parts of it those that it starts from."""
    spec = next(spec for spec in specs if spec.name == name)
    images = ImageFormat(shape, 10, (0.5,) * shape[0], (0.25,) * shape[0])
    return untrained(spec, images, 0, {parent: _built(specs, parent, shape) for parent in spec.parents})


class _Convolutions(TorchDispatchMode):
    """Counts operations of convolutions and of their gradients. FlopCounterMode fails at the gradient of a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in (torch.ops.aten.convolution, torch.ops.aten.convolution_backward):
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize("options", [["gate.kind=soft"], ["gate.kind=hard", "advmoe.router=per-layer"]])
@pytest.mark.parametrize("preset", SHAPES)
def test_the_table_has_the_parameters_of_the_models_that_are_built(preset: str, options: list[str]) -> None:
    experiment, shape = _experiment(preset, *options), SHAPES[preset]
    methods = {spec.method for spec in experiment.models}
    assert methods == {name for name, method in METHODS.items() if method.group != "user"}
    built = {name: _built(experiment.models, name, shape) for name in experiment.names}
    numbers = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in built.items()}
    assert {name: cost.parameters for name, cost in costs(experiment).items()} == numbers


@pytest.mark.parametrize("router", ["shared", "per-layer"])
@pytest.mark.parametrize("preset", SHAPES)
def test_the_table_has_the_convolutions_of_a_mixture_and_its_gate(preset: str, router: str) -> None:
    experiment, shape = _experiment(preset, f"advmoe.router={router}"), SHAPES[preset]
    for name in MIXTURES:
        model = _built(experiment.models, name, shape).eval()
        with torch.no_grad(), _Convolutions() as counter:
            model(torch.rand(1, *shape))
        assert costs(experiment)[name].macs == counter.flops / 2, name


@pytest.mark.parametrize("suite", ["pgd_gate", "pgd_expert", "pgd_route", "experts"])
@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("mixture", "gate.kind=hard"),
        ("soe", "soe.experts=3"),
        ("advmoe", "advmoe.router=shared"),
    ],
)
def test_a_suite_costs_an_image_that_no_attack_fools_what_is_planned(
    name: str, option: str, suite: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In convolutions; the checks of the clean images and of the last iterates are within the tolerance."""
    monkeypatch.setattr("dwf_cluster.models.stack._SMALL", 0)  # experts in one pass are counted wrongly
    experiment, shape = _experiment("digits", "model.width=4", option), SHAPES["digits"]
    spec, model = experiment.spec(name), _built(experiment.models, name, shape).eval()
    x = torch.rand(2, *shape)
    y = predict(frozen(model), x).argmax(1)
    settings = Evaluation(adaptive_steps=12, pgd_steps=(12,))
    with _Convolutions() as counter:
        rows, _ = evaluate(
            *({name: model}, name, suite, x.numpy(), y.numpy(), settings, [Threat(1e-9, 1e-9)]), seed=0, device=CPU
        )
    assert all(row["correct"] == len(y) for row in rows if suite != "experts")
    method = METHODS[spec.method]
    planned = SUITES[suite].cost(settings, method.parts(spec, shape)) * method.flops(spec, shape)
    assert counter.flops / len(x) == pytest.approx(planned, rel=0.1)
