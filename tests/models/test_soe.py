"""Synergy of Experts: the surest sub-model decides, and attacks that ask for the choice see what is wrong with it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwf_cluster import api
from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.attacks.routing import routed
from dwf_cluster.evaluation.experts import WithoutExpert
from dwf_cluster.evaluation.run import evaluate
from dwf_cluster.evaluation.settings import Evaluation, Threat
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import mix
from dwf_cluster.models.resnet import ResNet
from dwf_cluster.models.soe import SynergyOfExperts

CLASSES = 4
THREAT = Threat(0.1, 0.03)
SETTINGS = Evaluation(adaptive_steps=6, pgd_steps=(6,), restart_steps=6, beyond=("pgd_expert", "pgd_route"))


def _ensemble(count: int = 3) -> SynergyOfExperts:
    """Of tiny ResNets in double precision, with statistics of random images; each is the surest on some images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SynergyOfExperts(ResNet(CLASSES + 1, (0.5,), (0.25,), width=2) for _ in range(count)).double()
        for _ in range(4):
            model(torch.rand(32, 1, 8, 8, dtype=torch.float64) * 2)
    return model.eval()


def _images(count: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.rand((count, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.arange(count) % CLASSES


def _surest(model: SynergyOfExperts, x: torch.Tensor) -> list[int]:
    """The slow, obvious way: sub-model by sub-model, image by image."""
    chosen = []
    with torch.no_grad():
        for image in x:
            outputs = [network(image[None])[0] for network in model.networks]
            chosen.append(
                max(
                    range(len(outputs)),
                    key=lambda i: float(outputs[i][:-1].softmax(0).max() * outputs[i][-1].sigmoid()),
                )
            )
    return chosen


def test_the_logits_are_those_of_the_sub_model_with_the_largest_confidence() -> None:
    model, (x, _) = _ensemble(), _images()
    chosen = _surest(model, x)
    assert set(chosen) == {0, 1, 2}
    with torch.no_grad():
        expected = torch.stack([model.networks[i](image[None])[0, :-1] for i, image in zip(chosen, x, strict=True)])
        torch.testing.assert_close(model(x), expected)
        assert model.gate(x).argmax(1).tolist() == chosen
        assert model.gate.log_weights(x).argmax(1).tolist() == chosen
        torch.testing.assert_close(mix(model.gate(x), model.experts(x)), expected)
        torch.testing.assert_close(model.gate.log_weights(x).exp().sum(1), torch.ones(len(x), dtype=x.dtype))
    assert sorted(model.gate(x).unique().tolist()) == [0, 1]


def test_the_gradient_reaches_the_chosen_sub_model_only() -> None:
    model, (x, y) = _ensemble(), _images()
    chosen = _surest(model, x)
    gradient, _, _ = differentiate(frozen(model), x, y)
    for i, image in enumerate(x):
        leaf = image[None].clone().requires_grad_()
        F.cross_entropy(model.networks[chosen[i]](leaf)[:, :-1], y[i : i + 1]).backward()  # type: ignore[no-untyped-call]
        assert leaf.grad is not None
        torch.testing.assert_close(gradient[i : i + 1], leaf.grad)
    model.zero_grad()
    F.cross_entropy(model(x[:1]), y[:1]).backward()  # type: ignore[no-untyped-call]
    for i, network in enumerate(model.networks):
        assert any(bool(p.grad.any()) for p in network.parameters() if p.grad is not None) == (i == chosen[0])
    head = model.networks[chosen[0]].classifier.weight.grad[-1]  # type: ignore[union-attr, index]
    assert not bool(head.any())  # the confidence itself gets none


@pytest.mark.parametrize("count", [24, 300], ids=["stacked", "one by one"])
def test_the_frozen_model_has_the_logits_choice_and_gradients_of_the_model_however_it_computes_them(count: int) -> None:
    model, (x, y) = _ensemble(), _images(count)
    slow, fast = copy.deepcopy(model), frozen(model.train())
    assert isinstance(fast, SynergyOfExperts)
    assert not any(parameter.requires_grad for parameter in fast.parameters())
    torch.testing.assert_close(differentiate(fast, x, y), differentiate(slow, x, y))
    torch.testing.assert_close(differentiate(fast, x, y, routed(1)), differentiate(slow, x, y, routed(1)))
    with torch.no_grad():
        assert torch.equal(fast.gate(x), slow.gate(x))
        torch.testing.assert_close(fast.experts(x), slow.experts(x))
    assert model.training


def test_each_sub_model_runs_once_for_the_logits_of_a_batch() -> None:
    model, (x, _) = _ensemble(), _images()
    calls: list[int] = []
    for i, network in enumerate(model.networks):
        network.register_forward_hook(lambda *_, i=i: calls.append(i))
    model(x)
    assert calls == [0, 1, 2]


def test_a_state_dict_names_every_tensor_once() -> None:
    model = _ensemble()
    assert all(name.startswith("networks.") for name in model.state_dict())
    assert len(model.state_dict()) == 3 * len(model.networks[0].state_dict())
    other = _ensemble()
    nn.init.zeros_(next(other.parameters()))
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(_images()[0]), model(_images()[0]))


def test_without_a_sub_model_the_surest_of_the_others_decides() -> None:
    model, (x, y) = _ensemble(), _images()
    for dropped in range(3):
        kept = [i for i in range(3) if i != dropped]
        slow = SynergyOfExperts(model.networks[i] for i in kept).eval()
        rest = frozen(WithoutExpert(frozen(model), dropped))  # type: ignore[arg-type]
        torch.testing.assert_close(differentiate(rest, x, y), differentiate(slow, x, y))


class _Fixed(nn.Module):
    """Right about every image (bright is 1, dark is 0), far from its boundary; or, reversed, wrong.

    The first pixel is the confidence head's alone.
    """

    def __init__(self, sign: float, slope: float, offset: float) -> None:
        super().__init__()
        self.sign, self.slope, self.offset = sign, slope, offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        score = 10 * self.sign * (x.flatten(1)[:, 1:].mean(1) - 0.5)
        return torch.stack([-score, score, score - 9, score - 9, self.slope * x[:, 0, 0, 0] + self.offset], 1)


def _hiding() -> tuple[SynergyOfExperts, torch.Tensor, torch.Tensor]:
    """A right sub-model, and a wrong one that is the surest where the first pixel is at 0.3 or more; images below."""
    x = torch.full((8, 1, 4, 4), 0.9)
    x[4:] = 0.1
    x[:, 0, 0, 0] = 0.22
    model = SynergyOfExperts([_Fixed(1.0, 0.0, 0.5), _Fixed(-1.0, 2000.0, -600.0)]).eval()
    return model, x, torch.tensor([1] * 4 + [0] * 4)


def test_pgd_route_finds_a_wrong_sub_model_that_the_selection_hides_from_the_standard_columns() -> None:
    model, x, y = _hiding()
    fooled = {}
    for suite in ("paper", "pgd_gate", "pgd_expert", "pgd_route"):
        options = {"seed": 0, "device": torch.device("cpu")}
        rows, _ = evaluate({"soe": model}, "soe", suite, x.numpy(), y.numpy(), SETTINGS, (THREAT,), **options)  # type: ignore[arg-type]
        fooled |= {row["attack"]: len(y) - row["correct"] for row in rows if row["epsilon"] in (None, THREAT.epsilon)}
    assert fooled["clean"] == 0
    assert fooled["pgd"] == fooled["pgd_gate"] == fooled["pgd_expert"] == 0
    assert fooled["pgd_route"] == len(y)


def test_the_python_interface_attacks_the_selection_too() -> None:
    model, x, y = _hiding()
    with pytest.warns(UserWarning, match="upper bounds, so pgd_route is measured too"):
        result = api.evaluate(model, x, y, "linf", 0.1, 0.03, suites=("pgd_momentum",), progress=False)
    assert dict(zip(result.evaluations.attack, result.evaluations.correct, strict=True)) == {
        "pgd_momentum": 8,
        "pgd_route": 0,
        "worst_case": 0,
    }
    gates = result.predictions[result.predictions.attack != "worst_case"].groupby("attack").gate.agg(list)
    assert np.array_equal(np.stack(gates["pgd_momentum"]), [[1, 0]] * 8)
    assert np.array_equal(np.stack(gates["pgd_route"]), [[0, 1]] * 8)
