"""Training and attacks in bfloat16: near float32, as strong as float32, and float32 where it matters."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import differentiate, predict
from dwf_cluster.attacks.pgd import pgd
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.data.sources import Images
from dwf_cluster.defences.build import untrained
from dwf_cluster.determinism import Draws
from dwf_cluster.models.advmoe import AdvMoE
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.refresh import FrozenModel
from dwf_cluster.models.resnet import BasicBlock, Normalize, ResNet, conv_norm
from dwf_cluster.presets import build
from dwf_cluster.training.step import Batch, attacked_model, train_batch

from .conftest import TINY

BFLOAT16 = torch.bfloat16
EPSILON, STEP_SIZE = 0.1, 0.015
LINF = Ball("linf", EPSILON)


def _resnet() -> nn.Module:
    return ResNet(10, (0.5,), (0.25,), width=4)


def _mixture() -> nn.Module:
    return Mixture([_resnet() for _ in range(3)], Gate(3, (1, 8, 8), (0.5,), (0.25,), hidden=8))


def _advmoe() -> nn.Module:
    return AdvMoE(ImageFormat((1, 8, 8), 10, (0.5,), (0.25,)), width=4, experts=2, ratio=0.5)


@pytest.mark.parametrize("batch_statistics", [False, True])
@pytest.mark.parametrize("make", [_resnet, _mixture, _advmoe])
def test_the_attack_in_bfloat16_is_near_float32_and_its_pixels_are_float32(
    make: Callable[[], nn.Module], batch_statistics: bool
) -> None:
    torch.manual_seed(0)
    model, x, y = make(), torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    for _ in range(3):
        model(x)
    exact = FrozenModel(model, batch_statistics=batch_statistics)()
    rounded = FrozenModel(model, batch_statistics=batch_statistics, dtype=BFLOAT16)()
    kinds = {type(module): module.weight.dtype for module in rounded.modules() if hasattr(module, "weight")}
    assert kinds[nn.Conv2d] == BFLOAT16
    assert kinds[nn.Linear] == torch.float32
    gradient, _, logits = differentiate(rounded, x, y)
    expected_gradient, _, expected = differentiate(exact, x, y)
    assert (gradient.dtype, logits.dtype) == (torch.float32, torch.float32)
    assert 0 < (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert (gradient.sign() == expected_gradient.sign()).double().mean() > 0.8
    *_, last = pgd(rounded, x, y, LINF, step_size=STEP_SIZE, steps=10)
    assert last.x.dtype == torch.float32
    assert bool((LINF.distance(x, last.x) <= EPSILON + 1e-6).all())
    assert 0 <= last.x.min() <= last.x.max() <= 1


def test_a_refreshed_model_in_bfloat16_equals_a_new_one() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(1, 1, 3), _resnet()), torch.rand(4, 1, 10, 10)  # one convolution is not folded
    frozen_model = FrozenModel(model, dtype=BFLOAT16)
    first = frozen_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    frozen_model.expire()
    assert frozen_model() is first
    new = FrozenModel(model, dtype=BFLOAT16)()
    for one, other in zip(first.parameters(), new.parameters(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(first(x), new(x))


def _watched(model: nn.Module) -> dict[type[nn.Module], set[torch.dtype]]:
    """Types of the outputs of blocks and linear layers in the training passes that follow."""
    dtypes: dict[type[nn.Module], set[torch.dtype]] = {BasicBlock: set(), nn.Linear: set()}

    def watch(module: nn.Module, _: object, output: torch.Tensor) -> None:
        if module.training:  # frozen models have these hooks too
            dtypes[type(module)].add(output.dtype)

    for module in model.modules():
        if type(module) in dtypes:
            module.register_forward_hook(watch)
    return dtypes


@pytest.mark.parametrize("name", ["pgd-1", "mixture"])
def test_a_training_step_in_bfloat16_is_near_that_in_float32(images: Images, name: str) -> None:
    losses, weights, before = {}, {}, {}
    for precision in ("float32", "bfloat16"):
        precisions = [f"experts.precision={precision}", f"joint.precision={precision}"]
        experiment = build("digits", 0, [*TINY, *precisions])
        spec = experiment.spec(name)
        parents = {parent: untrained(experiment.spec(parent), images.format, 0, {}) for parent in spec.parents}
        model = untrained(spec, images.format, 0, parents).train()
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        watched = _watched(model)
        data = DeviceImages(images, experiment.data, torch.device("cpu"))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        batch = Batch(torch.arange(32), Draws((0, name, 0, 0)))
        frozen_model = attacked_model(spec, model)
        losses[precision], _ = train_batch(spec, model, frozen_model, optimizer, data, batch)
        assert watched == {
            BasicBlock: {BFLOAT16 if precision == "bfloat16" else torch.float32},
            nn.Linear: {torch.float32},
        }
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert {state["momentum_buffer"].dtype for state in optimizer.state.values()} == {torch.float32}
        weights[precision] = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)
    assert losses["bfloat16"] != losses["float32"]
    step, difference = (
        torch.cat([(weights["float32"][key] - other[key]).flatten().float() for key in before]).norm()
        for other in (before, weights["bfloat16"])
    )
    assert difference < 0.25 * step


def _trained(seed: int, x: torch.Tensor, y: torch.Tensor) -> nn.Module:
    """A small network that is trained on images with noise."""
    torch.manual_seed(seed)
    features = (Normalize((0.3,), (0.38,)), conv_norm(1, 8, 3), nn.ReLU(), conv_norm(8, 16, 3, 2), nn.ReLU())
    model = nn.Sequential(*features, nn.Flatten(), nn.Linear(256, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    for _ in range(6):
        for part in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            noisy = (x[part] + EPSILON * torch.randn(x[part].shape)).clamp(0, 1)
            F.cross_entropy(model(noisy), y[part]).backward()
            optimizer.step()
    return model


def test_attacks_made_in_bfloat16_are_as_strong_as_in_float32() -> None:
    """Half a point of 2691 images; the images are judged in float32."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16).float().view(-1, 1, 8, 8), torch.tensor(labels)
    robust: dict[tuple[int, torch.dtype | None], list[torch.Tensor]] = {}
    for seed in range(3):
        model = _trained(seed, x[:900], y[:900])
        judge, images, targets = frozen(model), x[900:], y[900:]
        for dtype in (None, BFLOAT16):
            attacked = FrozenModel(copy.deepcopy(model), dtype=dtype)()
            for iterate in pgd(attacked, images, targets, LINF, step_size=STEP_SIZE, steps=20):
                if iterate.step in (10, 20):
                    correct = predict(judge, iterate.x).argmax(1) == targets
                    robust.setdefault((iterate.step, dtype), []).append(correct)
    for steps in (10, 20):
        exact, rounded = (100 * float(torch.cat(robust[steps, dtype]).double().mean()) for dtype in (None, BFLOAT16))
        assert 20 < exact < 90  # an attack that fools no image, or all, would show nothing
        assert abs(rounded - exact) <= 0.5


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_set_for_convolutions_only_and_all_of_torchs_settings_agree(tf32: bool) -> None:
    """In a process of its own: the settings are global."""
    lines = (
        "import torch",
        "from dwf_cluster.determinism import make_deterministic",
        f"make_deterministic(1, tf32={tf32})",
        "backends = torch.backends",
        "with backends.cudnn.flags(enabled=True): pass",  # reads the settings and restores them
        "print(backends.cudnn.conv.fp32_precision == 'tf32', backends.cudnn.allow_tf32)",
        "print(backends.cuda.matmul.fp32_precision == 'tf32', backends.cuda.matmul.allow_tf32)",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed == f"{tf32} {tf32}\nFalse False\n"
