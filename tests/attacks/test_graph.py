"""PGD by a captured iteration equals PGD bit for bit.

On a CPU the capture is replaced by the function itself, which works on the same tensors: a value that is read before it
is written, or that belongs to another attack, shows there as it would in a replay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from dwf_cluster.attacks import graph
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import NotLogits
from dwf_cluster.attacks.pgd import Iterate, pgd
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Gate, Mixture
from dwf_cluster.models.refresh import FrozenModel
from dwf_cluster.models.resnet import ResNet

LINF = Ball("linf", 0.1)
BATCH = 8


class Captures:
    """Stands for the capture: counts, calls the function as torch's warm-up does, and returns it."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        self.count += 1
        run()
        return run


def _mixture() -> nn.Module:
    experts = [ResNet(10, (0.5,), (0.25,), width=4) for _ in range(2)]
    return Mixture(experts, Gate(2, (1, 8, 8), (0.5,), (0.25,), hidden=8)).eval()


def _images(count: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(count, 1, 8, 8, device=device), torch.randint(10, (count,), device=device)


def _assert_equal(run: Iterator[Iterate], expected: Iterator[Iterate]) -> None:
    first, last = run
    expected_first, *_, expected_last = expected
    assert (first.step, last.step) == (expected_first.step, expected_last.step)
    for name in ("index", "x", "logits", "gradient"):
        assert torch.equal(getattr(first, name), getattr(expected_first, name)), name
    assert torch.equal(last.x, expected_last.x)
    assert not torch.equal(first.x, last.x)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_every_attack_of_a_training_equals_pgd_bit_for_bit(dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    captures = Captures()
    models = [_mixture(), _mixture()]
    frozen_models = [FrozenModel(model, dtype=dtype) for model in models]
    for attack in range(3):
        for model, frozen_model in zip(models, frozen_models, strict=True):
            for count in (BATCH, BATCH - 1):
                x, y = _images(count)
                start = LINF.random_point(x, [torch.Generator() for _ in y]) if attack == 1 else None
                options = {"step_size": 0.02 + 0.01 * attack, "steps": 1 + 2 * attack, "start": start}
                run = graph.pgd(frozen_model(), x, y, LINF, capture=lambda: captures, **options)
                _assert_equal(run, pgd(FrozenModel(model, dtype=dtype)(), x, y, LINF, **options))
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * torch.randn_like(parameter))
            frozen_model.expire()
    assert captures.count == 2 * 2  # for each model and number of images


def test_an_iteration_is_captured_again_for_other_tensors() -> None:
    torch.manual_seed(0)
    captures, model, (x, y) = Captures(), _mixture(), _images(BATCH)
    frozen_model = FrozenModel(model)
    list(graph.pgd(frozen_model(), x, y, LINF, step_size=0.02, steps=2, capture=lambda: captures))
    for parameter in model.parameters():
        parameter.data = parameter.data + 0.01 * torch.randn_like(parameter)
    frozen_model.expire()
    run = graph.pgd(frozen_model(), x, y, LINF, step_size=0.02, steps=2, capture=lambda: captures)
    _assert_equal(run, pgd(FrozenModel(model)(), x, y, LINF, step_size=0.02, steps=2))
    assert captures.count == 2


def test_two_attacks_on_a_model_that_are_read_in_turn_keep_their_images() -> None:
    torch.manual_seed(0)
    frozen_model, one, other = FrozenModel(_mixture())(), _images(BATCH), _images(BATCH)
    runs = [
        graph.pgd(frozen_model, *images, LINF, step_size=0.02, steps=3, capture=Captures) for images in (one, other)
    ]
    for images, iterates in zip((one, other), zip(*zip(*runs, strict=True), strict=True), strict=True):
        _assert_equal(iter(iterates), pgd(frozen_model, *images, LINF, step_size=0.02, steps=3))


def test_no_step_gives_the_start_alone_and_probabilities_are_refused() -> None:
    x, y = _images(BATCH)
    (only,) = graph.pgd(FrozenModel(_mixture())(), x, y, LINF, step_size=0.02, steps=0)
    assert torch.equal(only.x, x)
    assert only.logits is None
    probabilities = frozen(nn.Sequential(_mixture(), nn.Softmax(1)))
    with pytest.raises(NotLogits):
        list(graph.pgd(probabilities, x, y, LINF, step_size=0.02, steps=2, capture=Captures))


def test_training_on_a_cpu_uses_no_graph() -> None:
    assert not graph.is_used(torch.nn.Identity(), torch.zeros(1))


@pytest.mark.cuda
def test_a_replayed_cuda_graph_equals_pgd_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = _mixture().cuda()
    frozen_model = FrozenModel(model)
    for steps in (1, 5, 10):
        for count in (BATCH, BATCH - 1):
            x, y = _images(count, "cuda")
            run = graph.pgd(frozen_model(), x, y, LINF, step_size=0.02, steps=steps)
            _assert_equal(run, pgd(FrozenModel(model)(), x, y, LINF, step_size=0.02, steps=steps))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        frozen_model.expire()
