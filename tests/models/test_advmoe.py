"""ADVMoE's network: its size, the split by expert against all experts behind masks, its view for attacks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.attacks.routing import gate_aimed
from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.evaluation.experts import WithoutExpert
from dwf_cluster.models import advmoe_size
from dwf_cluster.models.advmoe import AdvMoE
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import mix

COLOUR = ImageFormat((3, 32, 32), 10, (0.5,) * 3, (0.2,) * 3)
GREY = ImageFormat((1, 8, 8), 10, (0.5,), (0.25,))
ROUTERS = pytest.mark.parametrize("per_layer", [False, True], ids=["shared", "per layer"])


def _network(per_layer: bool, experts: int = 3) -> AdvMoE:
    """In double precision, with BatchNorm statistics of some batches and a router that uses every expert."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = AdvMoE(GREY, 6, experts, 0.5, per_layer).double()
        with torch.no_grad():
            for _ in range(4):
                network(torch.rand(32, 1, 8, 8, dtype=torch.float64) * 2)
        scores = network.eval().gate.scores(_images()).detach()
        # Each score's mean becomes 0, so that no expert is without images.
        network.gate.classifier.bias.data -= scores.mean(0).flatten()
    return network


def _images(count: int = 16) -> torch.Tensor:
    return torch.rand((count, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _behind_masks(network: AdvMoE, x: torch.Tensor) -> torch.Tensor:
    """The slow, obvious way: all experts' filters see all images, a mask with the scores' gradient keeps one each."""
    scores = network.gate.scores(x)
    choice = scores.argmax(2)
    masks = F.one_hot(choice, scores.shape[2]) + (scores - scores.detach())

    def convolve(number: int, features: torch.Tensor) -> torch.Tensor:
        layer, router = network.layers[number], number if network.per_layer else 0
        every = torch.stack([convolution(features) for convolution in layer.convolutions], 1)
        masked = every * masks[:, router, :, None, None, None]
        return layer.norm(torch.stack([masked[i, choice[i, router]] for i in range(len(x))]))

    out = F.relu(network.stem(network.normalize(x)))
    for block, shortcut in enumerate(network.shortcuts):
        stride = network.layers[2 * block].convolutions[0].stride[0]
        skipped = shortcut(out[:, :, ::stride, ::stride])
        out = F.relu(convolve(2 * block + 1, F.relu(convolve(2 * block, out))) + skipped)
    logits: torch.Tensor = network.classifier(out.mean((2, 3)))
    return logits


@pytest.mark.parametrize(
    ("experts", "ratio", "parameters", "pathway"),
    [(2, 0.5, 5_565_450, 0.152), (5, 0.5, 13_832_202, 0.152), (2, 1.0, 22_159_434, 0.555)],
)
def test_parameters_and_operations_are_those_of_the_release(
    experts: int, ratio: float, parameters: int, pathway: float
) -> None:
    with torch.device("meta"):
        network = AdvMoE(COLOUR, 64, experts, ratio).eval()
        image = torch.rand(1, 3, 32, 32)
    router = sum(p.numel() for p in network.gate.parameters())
    assert router == (269_202 if experts == 2 else 269_397)
    assert sum(p.numel() for p in network.parameters()) - router == parameters
    assert advmoe_size.parameters(64, ratio, experts, 1, 3) == parameters + router
    for part, flops, gmacs in zip(
        (network.experts[0], network.gate), advmoe_size.flops(64, ratio, (3, 32, 32)), (pathway, 0.041), strict=True
    ):
        with FlopCounterMode(display=False) as counter:
            part(image)
        last_layer = 2 * sum(p.numel() for n, p in part.named_parameters() if n == "classifier.weight")
        assert counter.get_total_flops() - last_layer == flops
        assert round(flops / 2e9, 3) == gmacs


@pytest.mark.parametrize("shape", [(1, 9, 7), (3, 8, 8)])
def test_size_functions_hold_for_small_networks_with_a_router_per_layer(shape: tuple[int, int, int]) -> None:
    images = ImageFormat(shape, 10, (0.5,) * shape[0], (0.2,) * shape[0])
    network = AdvMoE(images, 10, 3, 0.25, per_layer=True).eval()
    built = sum(parameter.numel() for parameter in network.parameters())
    assert advmoe_size.parameters(10, 0.25, 3, advmoe_size.LAYERS, shape[0]) == built
    for part, flops in zip((network.experts[0], network.gate), advmoe_size.flops(10, 0.25, shape), strict=True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            part(torch.rand(1, *shape))
        last_layer = 2 * sum(p.numel() for n, p in part.named_parameters() if n == "classifier.weight")
        assert counter.get_total_flops() - last_layer == flops


@ROUTERS
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_split_by_expert_has_logits_and_gradients_of_all_experts_behind_masks(
    per_layer: bool, training: bool
) -> None:
    network, x = _network(per_layer), _images()
    assert set(network.gate.scores(x).argmax(2).flatten().tolist()) == {0, 1, 2}
    slow = copy.deepcopy(network.train(training))
    gradients = []
    for forward in (network, lambda x: _behind_masks(slow, x)):
        leaf = x.clone().requires_grad_()
        logits = forward(leaf)
        (logits.cos() * torch.arange(10)).sum().backward()
        gradients.append((logits.detach(), leaf.grad))
    torch.testing.assert_close(gradients[0], gradients[1])
    for (name, one), other in zip(network.named_parameters(), slow.parameters(), strict=True):
        gradient = torch.zeros_like(one) if one.grad is None else one.grad  # of an expert without images
        torch.testing.assert_close(gradient, other.grad, msg=name)
    torch.testing.assert_close(network.state_dict(), slow.state_dict())


@ROUTERS
def test_only_the_chosen_score_has_a_gradient(per_layer: bool) -> None:
    network = _network(per_layer)
    x = _images()
    scores = network.gate.scores(x).detach().requires_grad_()
    network.routed(x, scores).square().sum().backward()
    assert scores.grad is not None
    chosen = F.one_hot(scores.argmax(2), 3).bool()
    assert bool((scores.grad[chosen] != 0).all())
    assert bool((scores.grad[~chosen] == 0).all())


@ROUTERS
def test_the_frozen_view_has_logits_and_gradients_of_evaluation_mode(per_layer: bool) -> None:
    network = _network(per_layer).train()
    view, slow, x, y = frozen(network), copy.deepcopy(network).eval(), _images(), torch.arange(16) % 10
    assert isinstance(view, AdvMoE)
    torch.testing.assert_close(differentiate(view, x, y), differentiate(slow, x, y))
    assert not any(parameter.requires_grad for parameter in view.parameters())
    assert not any(module.training for module in view.modules())
    for number, expert in enumerate(view.experts):
        torch.testing.assert_close(differentiate(expert, x, y), differentiate(slow.experts[number], x, y))
    parts = torch.cat([view(part) for part in x.split(5)])
    torch.testing.assert_close(parts, slow(x))
    assert all(module.training for module in network.modules())


def test_a_shared_router_gives_each_image_to_the_pathway_of_the_gate() -> None:
    network, x = _network(per_layer=False), _images()
    weights = network.gate(x)
    assert bool(((weights == 0) | (weights == 1)).all())
    assert torch.equal(weights.argmax(1), network.gate.log_weights(x).argmax(1))
    torch.testing.assert_close(mix(weights, network.experts(x)), network(x))
    names = list(network.state_dict())
    assert not any(name.startswith("experts") for name in names)


def test_a_router_per_layer_gives_the_gate_the_share_of_the_layers() -> None:
    network, x = _network(per_layer=True), _images()
    choice = network.gate.scores(x).argmax(2)
    shares = torch.stack([(choice == number).double().mean(1) for number in range(3)], 1)
    torch.testing.assert_close(network.gate(x), shares)
    assert not torch.allclose(mix(shares, network.experts(x)), network(x))


def test_a_pathway_is_the_network_whose_layers_all_choose_it() -> None:
    network, x = _network(per_layer=True), _images()
    for number, expert in enumerate(network.experts):
        scores = F.one_hot(torch.full((16, 16), number), 3).double()
        torch.testing.assert_close(expert(x), network.routed(x, scores))


@ROUTERS
def test_attacks_on_the_gate_are_judged_by_the_networks_own_logits(per_layer: bool) -> None:
    view, x, y = frozen(_network(per_layer)), _images(), torch.arange(16) % 10
    torch.testing.assert_close(gate_aimed(view, x, y)[1], view(x))


def test_without_an_expert_its_images_pass_the_next_best_one() -> None:
    view, x = frozen(_network(per_layer=False)), _images()
    assert isinstance(view, AdvMoE)
    scores = view.gate.scores(x)[:, 0]
    scores[:, 1] = -torch.inf
    expected = view.experts(x)[torch.arange(16), scores.argmax(1)]
    torch.testing.assert_close(frozen(WithoutExpert(view, 1))(x), expected)
