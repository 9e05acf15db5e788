"""Each sign of gradient masking shows in a model that was built to have that fault, and in no sound model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster.data.device import to_float
from dwf_cluster.data.sources import Images, load
from dwf_cluster.evaluation.masking import Check, Inspection, masking
from dwf_cluster.evaluation.settings import Threat
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.resnet import ResNet18
from dwf_cluster.presets import build

COUNT, EPSILON, STEP_SIZE, STEPS = 32, 0.1, 0.025, 6


@pytest.fixture(scope="module")
def images() -> Images:
    return load(build("digits").data, Path())


@pytest.fixture(scope="module")
def sound(images: Images) -> nn.Module:
    """A classifier of digits, trained for a few seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNet18(10, (0.3,), (0.37,), width=4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        x, y = to_float(torch.tensor(images.x_train)), torch.tensor(images.y_train)
        for _ in range(4):
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                F.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
    return model.eval().requires_grad_(False)


class Fault(nn.Module):
    """A model with something done to its inputs or outputs."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[torch.Tensor], torch.Tensor] = lambda x: x,
        after: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.after(self.model(self.before(x)))
        return logits


def _checks(model: nn.Module, images: Images) -> dict[str, Check]:
    x, y = to_float(torch.tensor(images.x_test[:COUNT])), torch.tensor(images.y_test[:COUNT])
    generators = [torch.Generator().manual_seed(i) for i in range(COUNT)]
    inspection = Inspection(model, x, y, Threat(EPSILON, STEP_SIZE), STEPS, generators)
    return {check.check: check for check in masking(inspection)}


def test_a_sound_model_shows_no_sign(sound: nn.Module, images: Images) -> None:
    checks = _checks(frozen(sound), images)
    assert {name for name, check in checks.items() if check.fired} == set()
    assert set(checks) == {
        "nan",
        "probabilities",
        "random",
        "train_mode",
        "zero_gradients",
        "one_step",
        "more_steps",
        "restarts",
        "perturbation",
        "black_box",
        "huge_epsilon",
    }


def _quantised(x: torch.Tensor) -> torch.Tensor:
    return (x * 8).round() / 8  # of gradient zero


def _saturated(logits: torch.Tensor) -> torch.Tensor:
    return logits * 1e4  # cross-entropy is exactly zero where the model is right


class Crumpled(torch.autograd.Function):
    """A layer whose gradient is true at the clean image and turned round elsewhere: one step is the best attack."""

    clean: torch.Tensor

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: torch.Tensor) -> torch.Tensor:
        ctx.sign = 1.0 if x.shape == Crumpled.clean.shape and torch.equal(x, Crumpled.clean) else -1.0  # type: ignore[attr-defined]
        return x.clone()

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * ctx.sign  # type: ignore[attr-defined]


class Overshooting(nn.Module):
    """Its gradient leads astray once the attack has taken ten passes: more steps undo what a few have done."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(x)
        if not x.requires_grad:
            return logits
        self.passes += 1
        return logits if self.passes <= STEPS else logits.detach() * 2 - logits


class Grabbing(nn.Module):
    """A model that changes the images that it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(x)
        x.data.add_(0.05)
        return logits


class Fickle(nn.Module):
    """Every other pass, another label, whatever the image."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(x)
        self.passes += 1
        return logits.roll(1, 1) if self.passes % 2 else logits


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        ("nan", lambda model: Fault(model, after=lambda logits: logits / 0 * 0)),
        ("nan_under_attack", lambda model: Fault(model, after=lambda z: z / (z.requires_grad is False))),
        ("probabilities", lambda model: Fault(model, after=lambda logits: logits.softmax(1))),
        ("train_mode", lambda model: copy.deepcopy(model).train()),
        ("zero_gradients", lambda model: Fault(model, before=_quantised)),
        ("zero_gradients", lambda model: Fault(model, after=_saturated)),
        ("huge_epsilon", lambda model: Fault(model, before=_quantised)),
        ("black_box", lambda model: Fault(model, before=_quantised)),
        ("black_box", lambda model: Fault(model, after=_saturated)),
        ("one_step", lambda model: Fault(model, before=Crumpled.apply)),
        ("more_steps", Overshooting),
        ("random", Fickle),
        ("restarts", Fickle),
        ("perturbation", Grabbing),
    ],
)
def test_a_fault_is_found_by_its_check(
    sound: nn.Module, images: Images, check: str, broken: Callable[[nn.Module], nn.Module]
) -> None:
    Crumpled.clean = to_float(torch.tensor(images.x_test[:COUNT]))
    checks = _checks(broken(sound), images)
    assert checks[check].fired, checks
    assert checks[check].value > checks[check].limit
