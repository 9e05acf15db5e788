"""ResNet-18 and the mixture: pixels in, logits out."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.resnet import ResNet
from dwf_cluster.plan.jobs import forward_flops
from dwf_cluster.presets import build

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def test_width_64_has_the_papers_11_17_million_parameters() -> None:
    model = ResNet(10, MEAN, STD)
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_173_962


def test_any_image_size_and_width_gives_one_logit_a_class() -> None:
    for shape in ((1, 8, 8), (3, 32, 32), (2, 9, 7)):
        model = ResNet(7, (0.5,) * shape[0], (0.2,) * shape[0], width=3).eval()
        assert model(torch.rand(2, *shape)).shape == (2, 7)


def test_normalisation_is_inside_and_saved_as_buffers() -> None:
    model = ResNet(10, MEAN, STD, width=4).eval()
    assert {"normalize.mean", "normalize.std"} <= set(model.state_dict())
    plain = ResNet(10, (0.0,) * 3, (1.0,) * 3, width=4).eval()
    plain.load_state_dict({**model.state_dict(), **{k: v for k, v in plain.state_dict().items() if "normalize" in k}})
    x = torch.rand(2, 3, 8, 8)
    by_hand = (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    torch.testing.assert_close(model(x), plain(by_hand))


def test_mixture_is_equation_1_the_gates_weighted_sum_of_logits() -> None:
    experts = [ResNet(10, MEAN, STD, width=width).eval() for width in (2, 3, 4)]
    mixture = Mixture(experts, Gate(3, (3, 8, 8), MEAN, STD, hidden=5)).eval()
    x = torch.rand(4, 3, 8, 8)
    weights = mixture.gate(x)
    slow = torch.stack([sum(weights[n, i] * experts[i](x[n : n + 1])[0] for i in range(3)) for n in range(4)])
    torch.testing.assert_close(mixture(x), slow)


def test_gate_is_equation_2_a_softmax_over_experts() -> None:
    weights = Gate(5, (3, 8, 8), MEAN, STD, hidden=16)(torch.rand(6, 3, 8, 8))
    assert weights.shape == (6, 5)
    assert bool((weights > 0).all())
    torch.testing.assert_close(weights.sum(1), torch.ones(6))


def test_the_operation_count_of_the_plan_is_that_of_the_network() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    for width, shape in ((64, (3, 32, 32)), (8, (1, 9, 9))):
        model = ResNet(10, (0.5,) * shape[0], (0.2,) * shape[0], width)
        with FlopCounterMode(display=False) as counter:
            model.eval()(torch.rand(1, *shape))
        counted = counter.get_total_flops() - 2 * 8 * width * 10  # the plan leaves the last layer out
        assert forward_flops(build("cifar10", 0, [f"model.width={width}"]).defended, shape) == counted


@pytest.mark.parametrize("width", [1, 3, 4, 8])
def test_weight_gradients_in_channels_last_are_those_of_the_plain_layout(width: int) -> None:
    """oneDNN corrupted memory here for few channels (its issue 6035), and gave wrong gradients before that."""
    torch.manual_seed(0)
    plain = ResNet(10, (0.5,), (0.25,), width)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    x, y = torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    for _ in range(5):
        for model, images in ((plain, x), (last, x.contiguous(memory_format=torch.channels_last))):
            model.zero_grad()
            F.cross_entropy(model(images), y).backward()
    for (name, one), other in zip(plain.named_parameters(), last.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_hard_gate_trusts_one_expert_and_has_the_soft_gates_gradient() -> None:
    soft = Gate(5, (3, 8, 8), MEAN, STD, hidden=16)
    hard = Gate(5, (3, 8, 8), MEAN, STD, hidden=16, hard=True)
    hard.load_state_dict(soft.state_dict())
    x = torch.rand(6, 3, 8, 8, requires_grad=True)
    weights, chosen = soft(x), hard(x)
    assert torch.equal(chosen, torch.eye(5)[weights.argmax(1)])
    along = torch.randn(6, 5)
    (expected,) = torch.autograd.grad((weights * along).sum(), x)
    (gradient_of_hard,) = torch.autograd.grad((chosen * along).sum(), x)
    assert torch.equal(gradient_of_hard, expected)
    assert float(expected.abs().max()) > 0
