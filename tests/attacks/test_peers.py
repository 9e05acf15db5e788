"""The attacks agree with other implementations: torchattacks, foolbox and pyautoattack, by AutoAttack's authors.

On an adversarially trained and an undefended model. Where an attack draws nothing, or can be given the peer's draws,
the examples are the same; in double precision, because rounding decides the sign of a small gradient. Where it draws
its own, as many images resist both, up to the noise of the draws: its size was measured on ten seeds of each side,
and a tolerance is three to four standard deviations of the difference of two runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import eagerpy
import foolbox
import numpy as np
import pyautoattack
import pytest
import torch
import torch.nn.functional as F
import torchattacks
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from pyautoattack.fab_projections import projection_linf
from pyautoattack.fab_pt import FABAttack_PT
from pyautoattack.square import SquareAttack
from scipy.optimize import linprog
from scipy.stats import ks_2samp
from sklearn.datasets import load_digits
from torch import nn

from dwf_cluster.attacks.apgd import apgd, targeted_dlr
from dwf_cluster.attacks.autoattack import autoattack
from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.fab import fab_targeted, project_to_hyperplane
from dwf_cluster.attacks.gradient import carlini_wagner, cross_entropy, differentiate, predict
from dwf_cluster.attacks.pgd import Iterate, Remaining, WorstCase, fgsm, pgd
from dwf_cluster.attacks.square import square
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.resnet import ResNet

from ..conftest import InDouble
from .test_l1 import projected_by_bisection

LINF, L2 = Ball("linf", 0.15), Ball("l2", 0.8)
NORMS = pytest.mark.parametrize(("ball", "norm"), [(LINF, "Linf"), (L2, "L2")], ids=["linf", "l2"])


@dataclass(frozen=True)
class Problem:
    """A trained model in evaluation mode and test images that it classifies correctly."""

    model: nn.Module
    x: torch.Tensor
    y: torch.Tensor

    def first(self, count: int) -> Problem:
        """With fewer images."""
        return replace(self, x=self.x[:count], y=self.y[:count])

    def double(self) -> Problem:
        """All of it in double precision."""
        return Problem(copy.deepcopy(self.model).double(), self.x.double(), self.y)

    def precise(self) -> Problem:
        """The model in double precision inside, for peers that insist on single precision."""
        return replace(self, model=_Precise(copy.deepcopy(self.model)))

    def robust(self, adversarial: torch.Tensor) -> int:
        """How many images the model classifies correctly."""
        return int((self.model(adversarial).argmax(1) == self.y).sum())

    def begun(self, seed: int = 0) -> WorstCase:
        """The worst case before any attack, with a generator for each image."""
        frozen_model = frozen(self.model)
        generators = [torch.Generator().manual_seed(seed * 10_000 + i) for i in range(len(self.y))]
        return WorstCase(frozen_model, self.x, self.y, predict(frozen_model, self.x), generators)


class _Precise(InDouble):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).float()


def _train(epsilon: float, epochs: int) -> Problem:
    """A ResNet-18 on scikit-learn's digits; against PGD, if epsilon is not zero."""
    torch.set_num_threads(1)
    digits = load_digits()
    x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        train, test = torch.randperm(len(x)).split([len(x) - 360, 360])
        model, ball = ResNet(10, (0.3,), (0.38,), width=8), Ball("linf", epsilon)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        batches = [batch for _ in range(epochs) for batch in train[torch.randperm(len(train))].split(64)]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=len(batches))
        for batch in batches:
            images, labels = x[batch], y[batch]
            if epsilon:
                frozen_model = frozen(model)
                images = _last(pgd(frozen_model, images, labels, ball, step_size=epsilon / 2, steps=2))
            optimizer.zero_grad()
            F.cross_entropy(model.train()(images), labels).backward()
            optimizer.step()
            schedule.step()
    model.eval()
    correct = test[model(x[test]).argmax(1) == y[test]]
    return Problem(model.requires_grad_(False), x[correct], y[correct])


@pytest.fixture(scope="module")
def defended() -> Problem:
    return _train(0.15, epochs=4)


@pytest.fixture(scope="module")
def undefended() -> Problem:
    return _train(0.0, epochs=3)


@pytest.fixture(autouse=True)
def _peers_random_state_stays_here() -> Iterator[None]:
    with torch.random.fork_rng():
        yield


def _last(run: Iterator[Iterate]) -> torch.Tensor:
    *_, end = run
    return end.x


def _assert_same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_the_problem_is_one_where_attacks_can_differ(defended: Problem, undefended: Problem) -> None:
    for problem, low, high in ((defended, 0.3, 0.8), (undefended, 0.0, 0.1)):
        assert len(problem.y) > 300
        last = _last(pgd(problem.model, problem.x, problem.y, LINF, step_size=0.0375, steps=20))
        assert low <= problem.robust(last) / len(problem.y) <= high


@pytest.mark.parametrize("epsilon", [0.03, 0.08, 0.15, 0.3])
def test_fgsm_is_torchattacks(defended: Problem, undefended: Problem, epsilon: float) -> None:
    for problem in (defended.first(150).double(), undefended.first(150).double()):
        gradient, _, _ = differentiate(problem.model, problem.x, problem.y)
        theirs = torchattacks.FGSM(problem.model, eps=epsilon)(problem.x, problem.y)
        _assert_same(fgsm(problem.x, gradient, epsilon), theirs)


@pytest.mark.parametrize("steps", [10, 20])
def test_pgd_is_torchattacks(defended: Problem, undefended: Problem, steps: int) -> None:
    for problem in (defended.first(60).double(), undefended.first(60).double()):
        ours = pgd(problem.model, problem.x, problem.y, LINF, step_size=0.04, steps=steps)
        theirs = torchattacks.PGD(problem.model, eps=0.15, alpha=0.04, steps=steps, random_start=False)
        _assert_same(_last(ours), theirs(problem.x, problem.y))


def test_folding_batch_norm_changes_at_most_one_prediction_in_a_thousand(
    defended: Problem, undefended: Problem
) -> None:
    examples = different = 0
    for problem in (defended, undefended):
        model, x, y = problem.model, problem.x, problem.y
        frozen_model = frozen(model)
        assert any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen_model.modules())
        pairs = [
            (
                _last(pgd(frozen_model, x, y, LINF, step_size=0.0375, steps=steps)),
                torchattacks.PGD(model, eps=0.15, alpha=0.0375, steps=steps, random_start=False),
            )
            for steps in (10, 20)
        ]
        gradient, _, _ = differentiate(frozen_model, x, y)
        pairs += [
            (fgsm(x, gradient, epsilon), torchattacks.FGSM(model, eps=epsilon)) for epsilon in (0.03, 0.08, 0.15, 0.3)
        ]
        for ours, peer in pairs:
            examples += len(y)
            different += int((frozen_model(ours).argmax(1) != model(peer(x, y)).argmax(1)).sum())
    assert examples > 3600
    assert different <= examples / 1000


def test_momentum_pgd_is_torchattacks_mifgsm(defended: Problem) -> None:
    problem = defended.first(100).double()
    ours = pgd(problem.model, problem.x, problem.y, LINF, step_size=0.02, steps=15, momentum=1.0)
    theirs = torchattacks.MIFGSM(problem.model, eps=0.15, alpha=0.02, steps=15, decay=1.0)
    _assert_same(_last(ours), theirs(problem.x, problem.y))


def test_l2_pgd_is_torchattacks(defended: Problem) -> None:
    problem = defended.first(100).double()
    ours = pgd(problem.model, problem.x, problem.y, L2, step_size=0.2, steps=15)
    theirs = torchattacks.PGDL2(problem.model, eps=0.8, alpha=0.2, steps=15, random_start=False, eps_for_division=1e-30)
    _assert_same(_last(ours), theirs(problem.x, problem.y))


class _FoolboxSlide(foolbox.attacks.SparseL1DescentAttack):  # type: ignore[misc,name-defined]
    """The peer's own projection takes one value too many into its threshold, so it ends up to 2 % outside the ball."""

    def project(self, x: object, x0: object, epsilon: float) -> object:
        change = (x.raw - x0.raw).numpy()  # type: ignore[attr-defined]
        projected = np.stack([projected_by_bisection(each, epsilon) for each in change])
        return eagerpy.astensor(x0.raw + torch.tensor(projected))  # type: ignore[attr-defined]


def test_l1_pgd_is_foolboxs_sparse_l1_descent_with_an_exact_projection(defended: Problem) -> None:
    problem = defended.first(60).double()
    last = _last(pgd(problem.model, problem.x, problem.y, Ball("l1", 3.0), step_size=0.7, steps=12))
    peer = _FoolboxSlide(abs_stepsize=0.7, steps=12)
    wrapped = foolbox.PyTorchModel(problem.model, bounds=(0, 1))
    _assert_same(last, peer.run(wrapped, problem.x, foolbox.criteria.Misclassification(problem.y), epsilon=3.0))
    assert float(Ball("l1", 3.0).distance(problem.x, last).max()) == pytest.approx(3.0)  # the projection was needed


class _FoolboxCarliniWagner(foolbox.attacks.LinfPGD):  # type: ignore[misc,name-defined]
    def get_loss_fn(self, model: Callable[..., object], labels: object) -> Callable[..., object]:
        def loss(inputs: object) -> object:
            logits, true = model(inputs).raw, labels.raw  # type: ignore[attr-defined]
            others = torch.stack([row[torch.arange(10) != y].max() for row, y in zip(logits, true, strict=True)])
            return eagerpy.astensor((others - logits[torch.arange(len(true)), true]).sum())

        return loss


def test_carlini_wagner_pgd_is_foolboxs_with_that_loss(defended: Problem) -> None:
    problem = defended.first(100).double()
    objective = carlini_wagner
    ours = pgd(problem.model, problem.x, problem.y, LINF, step_size=0.04, steps=10, objective=objective)
    peer = _FoolboxCarliniWagner(abs_stepsize=0.04, steps=10, random_start=False)
    wrapped = foolbox.PyTorchModel(problem.model, bounds=(0, 1))
    theirs = peer.run(wrapped, problem.x, foolbox.criteria.Misclassification(problem.y), epsilon=0.15)
    _assert_same(_last(ours), theirs)


def test_restarts_from_torchattacks_random_starts_give_the_same_adversarial_images(defended: Problem) -> None:
    problem = defended.first(100).double()
    model, x, y = problem.model, problem.x, problem.y
    runs = [torchattacks.PGD(model, eps=0.15, alpha=0.04, steps=3, random_start=True) for _ in range(4)]
    torch.manual_seed(0)
    theirs = torchattacks.MultiAttack(runs)(x, y)

    worst = WorstCase(model, x, y, model(x))

    def from_their_start(rest: Remaining) -> Iterator[Iterate]:
        start = (rest.x + torch.empty_like(rest.x).uniform_(-0.15, 0.15)).clamp(0, 1)
        *_, end = pgd(model, rest.x, rest.y, LINF, step_size=0.04, steps=3, start=start)
        yield end  # the peer evaluates no other iterate

    torch.manual_seed(0)
    for _ in runs:
        worst.attack(from_their_start)
    fooled = model(theirs).argmax(1) != y
    assert torch.equal(~worst.robust, fooled)
    _assert_same(worst.x[fooled], theirs[fooled])


def test_restarts_leave_as_many_images_robust_as_torchattacks(defended: Problem) -> None:
    """Ten seeds, of 322: 228.1 for the peer, 227.6 here, deviation 2.5; after the first of the five runs 248."""
    runs = [torchattacks.PGD(defended.model, eps=0.15, alpha=0.0375, steps=3, random_start=True) for _ in range(5)]
    torch.manual_seed(0)
    theirs = defended.robust(torchattacks.MultiAttack(runs)(defended.x, defended.y))
    worst, frozen_model = defended.begun(), frozen(defended.model)

    def restart(rest: Remaining) -> Iterator[Iterate]:
        start = LINF.random_point(rest.x, rest.generators)
        return pgd(frozen_model, rest.x, rest.y, LINF, step_size=0.0375, steps=3, start=start, drop_fooled=True)

    for _ in runs:
        worst.attack(restart)
    assert abs(int(worst.robust.sum()) - theirs) <= 10


@pytest.mark.parametrize(
    "peer", ["torchattacks-linf", "foolbox-l2", "foolbox-l1", "pyautoattack-linf", "pyautoattack-l2"]
)
def test_random_starts_are_distributed_as_the_peers(peer: str) -> None:
    """By a Kolmogorov-Smirnov test of single values and of whole lengths, on images far from 0 and 1."""
    model, x, y = (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        torch.full((1000, 1, 8, 8), 0.5),
        torch.arange(1000) % 10,
    )
    ball = Ball(peer.partition("-")[2], 0.3)  # type: ignore[arg-type]
    generators = [torch.Generator().manual_seed(i) for i in range(len(y))]
    torch.manual_seed(0)
    if peer == "torchattacks-linf":
        ours, theirs = ball.random_point(x, generators), torchattacks.PGD(model, eps=0.3, steps=0)(x, y)
    elif peer.startswith("foolbox"):
        kind = {"l2": foolbox.attacks.L2PGD, "l1": foolbox.attacks.SparseL1DescentAttack}[ball.norm]
        attack, wrapped = kind(steps=0, random_start=True), foolbox.PyTorchModel(model.eval(), bounds=(0, 1))
        ours = ball.random_point(x, generators)
        theirs = attack.run(wrapped, x, foolbox.criteria.Misclassification(y), epsilon=0.3)
    else:
        norm = {"linf": "Linf", "l2": "L2"}[ball.norm]
        attack, starts = APGDAttack(model, n_iter=1, norm=norm, eps=0.3, device="cpu"), []
        model.register_forward_pre_hook(lambda _, inputs: starts.append(inputs[0].detach().clone()))
        attack.init_hyperparam(x)
        attack.attack_single_run(x, y)
        ours, theirs = ball.random_surface_point(x, generators), starts[0]
    for measure in (lambda change: change.flatten(), lambda change: ball.distance(torch.zeros_like(change), change)):
        pair = (measure(start - x).round(decimals=5).numpy() for start in (ours, theirs))
        assert ks_2samp(*pair).pvalue > 0.001


class _Apgd(APGDAttack):  # type: ignore[misc]
    """Compares the first step's loss with the start's, as the paper's condition 1 does.

    The peer's buffer has no row for the start's loss: it compares with a zero in the buffer's last row.
    """

    start_loss: torch.Tensor

    def check_oscillation(self, losses: torch.Tensor, step: int, period: int, *rest: object, **more: object) -> object:
        if step == period - 1:
            losses[-1] = self.start_loss
        return super().check_oscillation(losses, step, period, *rest, **more)


@NORMS
@pytest.mark.parametrize(
    ("targeted", "authors_code"),
    [(False, True), (True, True), (False, False)],
    ids=["cross-entropy", "targeted-dlr", "cross-entropy-as-in-the-paper"],
)
def test_apgd_has_its_authors_iterates_from_the_same_start(
    defended: Problem, ball: Ball, norm: str, targeted: bool, authors_code: bool
) -> None:
    problem, steps = defended.first(80).precise(), 30
    model, x, y = problem.model, problem.x, problem.y
    target = model(x).argsort(1, descending=True)[:, 1] if targeted else None
    objective = targeted_dlr if targeted else cross_entropy
    generators = [torch.Generator().manual_seed(i) for i in range(len(y))]
    options = {"steps": steps, "objective": objective, "target": target, "authors_code": authors_code}
    ours = list(apgd(model, x, y, ball, generators, **options))

    attack = (APGDAttack_targeted if targeted else APGDAttack) if authors_code else _Apgd
    peer = attack(model, n_iter=steps, norm=norm, eps=ball.epsilon, device="cpu")
    peer.init_hyperparam(x)
    peer.y_target = target
    peer.start_loss, _ = objective(model, ours[0].x, y if target is None else torch.stack([y, target], 1))
    theirs: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: theirs.append(inputs[0].detach().clone()))
    _, robust, _, _ = peer.attack_single_run(x, y, x_init=ours[0].x)

    differs, fooled = torch.zeros(len(y), dtype=torch.bool), torch.zeros(len(y), dtype=torch.bool)
    for iterate, their_iterate in zip(ours, theirs, strict=True):  # only the peer continues with fooled images
        differs[iterate.index] |= LINF.distance(iterate.x, their_iterate[iterate.index]) > 1e-4
        fooled[iterate.index] = iterate.logits.argmax(1) != y[iterate.index]
    assert 10 < int(fooled.sum()) < 70
    assert int(differs.sum()) <= 1  # rounding may decide on a step size
    assert int((fooled == robust).sum()) <= 1


@NORMS
def test_apgd_from_its_own_start_leaves_as_many_images_robust_as_its_authors(
    defended: Problem, ball: Ball, norm: str
) -> None:
    """Ten seeds, of 322: L-infinity 168.3 for the peer, 168.6 here, deviation 2.0; L2 121.4 and 122.9, 2.2."""
    peer = APGDAttack(defended.model, n_iter=20, norm=norm, n_restarts=1, eps=ball.epsilon, seed=0, device="cpu")
    theirs = defended.robust(peer.perturb(defended.x, defended.y))
    worst, frozen_model = defended.begun(), frozen(defended.model)
    worst.attack(lambda rest: apgd(frozen_model, rest.x, rest.y, ball, rest.generators, steps=20))
    assert abs(int(worst.robust.sum()) - theirs) <= 10


def test_targeted_apgd_from_its_own_start_leaves_as_many_images_robust_as_its_authors(defended: Problem) -> None:
    """Ten seeds, of 322, two targets: 179.7 for the peer, 179.2 here, deviation 1.6."""
    peer = APGDAttack_targeted(defended.model, n_iter=20, eps=0.15, n_target_classes=2, seed=0, device="cpu")
    theirs = defended.robust(peer.perturb(defended.x, defended.y))
    worst, frozen_model = defended.begun(), frozen(defended.model)
    targets = worst.logits.argsort(1, descending=True)

    def at(rest: Remaining, rank: int) -> Iterator[Iterate]:
        goal = targets[rest.index, rank]
        arguments = (frozen_model, rest.x, rest.y, LINF, rest.generators)
        return apgd(*arguments, steps=20, objective=targeted_dlr, target=goal)

    for rank in (1, 2):
        worst.attack(lambda rest, rank=rank: at(rest, rank))
    assert abs(int(worst.robust.sum()) - theirs) <= 7


@pytest.mark.parametrize("rank", [1, 2])
def test_targeted_fab_fools_those_whose_smallest_change_by_the_authors_is_inside_the_ball(
    defended: Problem, rank: int
) -> None:
    problem, steps = defended.first(80).precise(), 12
    model, x, y = problem.model, problem.x, problem.y
    peer = FABAttack_PT(model, norm="Linf", n_restarts=1, n_iter=steps, eps=0.15, targeted=True, device="cpu")
    peer.target_class = rank + 1
    examples = peer.attack_single_run(x, y, is_targeted=True)
    distance = LINF.distance(x, examples).where(model(examples).argmax(1) != y, torch.inf)
    sizes = distance[distance.isfinite()].sort().values
    assert len(sizes) > 30
    target = model(x).argsort(1, descending=True)[:, rank]
    for share in (0.25, 0.5, 0.75):  # of these, so the median change is the same
        rank_of_size = int(share * len(sizes))
        epsilon = float(sizes[rank_of_size - 1 : rank_of_size + 1].mean())  # between two, that rounding may not decide
        fooled = torch.zeros(len(y), dtype=torch.bool)
        for iterate in fab_targeted(model, x, y, epsilon, target, steps=steps):
            fooled[iterate.index] = True
            assert bool((LINF.distance(x[iterate.index], iterate.x) <= epsilon).all())
            assert bool((model(iterate.x).argmax(1) != y[iterate.index]).all())
        assert torch.equal(fooled, distance <= epsilon)


class _SquareWithDraws(SquareAttack):  # type: ignore[misc]
    """The peer with the draws of an image's generator here: signs of the stripes; for each query places and signs."""

    def __init__(self, model: nn.Module, shape: torch.Size, generator: torch.Generator, queries: int) -> None:
        super().__init__(model, n_queries=queries, eps=0.15, device="cpu", resc_schedule=False)
        channels, _, width = shape
        self._stripes = torch.randint(2, (1, channels, 1, width), generator=generator) * 2.0 - 1
        draws = torch.rand((queries + 1, 2 + channels), generator=generator)[1:]
        self._places, self._signs = iter(draws[:, :2].flatten()), iter(draws[:, 2:])

    def random_choice(self, shape: Sequence[int]) -> torch.Tensor:
        if len(shape) == 4:
            return self._stripes
        return torch.where(next(self._signs) < 0.5, -1.0, 1.0).view(*shape)

    def random_int(self, low: int = 0, high: int = 1, shape: Sequence[int] = (1,)) -> torch.Tensor:
        return (low + (high - low) * next(self._places)).long()


def test_square_as_its_authors_code_tries_their_images_with_the_same_draws(defended: Problem) -> None:
    queries = 60  # the squares' sizes change after 10 and 50
    problem = defended.first(12).precise()
    model, x, y = problem.model, problem.x, problem.y
    generators = [torch.Generator().manual_seed(i) for i in range(len(y))]
    ours: list[list[torch.Tensor]] = [[] for _ in y]
    for iterate in square(model, x, y, 0.15, generators, queries=queries + 1, planned=10_000, authors_code=True):
        for index, candidate in zip(iterate.index.tolist(), iterate.x, strict=True):
            ours[index].append(candidate)
    tried: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: tried.append(inputs[0][0].clone()))
    for i, candidates in enumerate(ours):
        tried.clear()
        peer = _SquareWithDraws(model, x.shape[1:], torch.Generator().manual_seed(i), queries)
        peer.init_hyperparam(x)
        peer.attack_single_run(x[i : i + 1], y[i : i + 1])
        _assert_same(torch.stack(candidates), torch.stack(tried))
    assert {len(candidates) == queries + 1 for candidates in ours} == {True, False}  # some resist, some do not


def test_square_leaves_as_many_images_robust_as_its_authors(defended: Problem) -> None:
    """As in the paper, with squares that may touch the last row and column; the peer leaves those out.

    Ten seeds, of 120: 57.2 for the peer with such squares, 57.1 here, deviation 1.7.
    """
    problem = defended.first(120)
    peer = SquareAttack(problem.model, n_queries=400, eps=0.15, seed=0, device="cpu")
    peer.random_int = lambda low, high: (low + (high + 1 - low) * torch.rand(1)).long()
    theirs = problem.robust(peer.perturb(problem.x, problem.y))
    worst, frozen_model = problem.begun(), frozen(problem.model)
    worst.attack(lambda rest: square(frozen_model, rest.x, rest.y, 0.15, rest.generators, queries=400))
    assert abs(int(worst.robust.sum()) - theirs) <= 7


_Change = Callable[[torch.Tensor], torch.Tensor]


class _Around(nn.Module):
    """A model with something before and after it."""

    def __init__(self, model: nn.Module, before: _Change, after: _Change) -> None:
        super().__init__()
        self.model, self.before, self.after = model, before, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.after(self.model(self.before(x)))


def _same(x: torch.Tensor) -> torch.Tensor:
    return x


def _saturated(logits: torch.Tensor) -> torch.Tensor:
    return logits * 1e5


def _crowded(logits: torch.Tensor) -> torch.Tensor:
    return torch.cat([logits, (logits.amax(1, keepdim=True) - 0.01).expand(-1, 9)], 1)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    return (x * 64).round() / 64


def _rounded_off_the_images(x: torch.Tensor) -> torch.Tensor:
    rounded = _rounded(x)
    clean = (x == rounded).flatten(1).all(1)  # digits are multiples of 1 / 16
    return torch.where(clean[:, None, None, None], x, rounded)


@pytest.mark.parametrize(
    ("before", "after", "steps", "queries", "tolerance"),
    [
        pytest.param(_same, _same, 5, 50, 5, id="plain"),
        pytest.param(_same, _crowded, 5, 1, 5, id="crowded"),
        pytest.param(_same, _saturated, 5, 1, 5, id="saturated"),
        pytest.param(_rounded_off_the_images, _same, 2, 1, 2, id="flat-off-the-images"),
        pytest.param(_rounded, _same, 2, 80, 12, id="flat"),
    ],
)
def test_autoattack_leaves_as_many_images_robust_as_its_authors_standard_set(
    defended: Problem, before: _Change, after: _Change, steps: int, queries: int, tolerance: int
) -> None:
    """Ten seeds, of 90, the peer and here.

    - plain: 40.8 and 41.1, deviation 1.0
    - crowded by nine classes just behind the first, so that all targets are in vain: 44.4 and 45.2, 1.1; 81 without
      the untargeted APGD
    - saturated, so that the cross-entropy has no gradient: 41.7 and 41.8, 1.2; 50 without the targeted APGD
    - flat off the images, so that FAB alone starts where there is a gradient: 57.0 and 56.9, 0.3; 82 without it
    - flat, no gradient anywhere: 62.9 and 63.1, 2.7; 83 without Square
    """
    problem = defended.first(90)
    problem = replace(problem, model=_Around(problem.model, before, after).eval())
    peer = pyautoattack.AutoAttack(problem.model, eps=0.15, norm="Linf", version="standard", seed=0, device="cpu")
    fewer = {"n_iter": steps, "eps": 0.15, "device": "cpu", "logger": peer.logger}  # than 100, on both sides
    peer.apgd, peer.apgd_targeted = APGDAttack(problem.model, **fewer), APGDAttack_targeted(problem.model, **fewer)
    peer.fab.n_iter = steps
    peer.square = SquareAttack(problem.model, n_queries=queries, eps=0.15, device="cpu", resc_schedule=False)
    theirs, _ = peer.run_standard_evaluation(problem.x, problem.y)
    worst = problem.begun()
    autoattack(frozen(problem.model), 0.15, worst, steps=steps, queries=queries)
    assert abs(int(worst.robust.sum()) - problem.robust(theirs)) <= tolerance


def _hyperplanes(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images with values at 0 and 1, normals with zeros in them, and heights that about every other can reach."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 1, 3, 4, generator=generator, dtype=torch.float64)
    x[::3] = (x[::3] * 3).round() / 3
    normal = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    normal = normal.where(torch.rand(x.shape, generator=generator) < 0.8, 0)
    normal[0] = 0
    height = (torch.rand(count, generator=generator, dtype=torch.float64) * 2 - 1) * normal.abs().sum((1, 2, 3))
    height[1] = 0
    return x, normal, height


def test_the_projection_to_a_hyperplane_solves_the_linear_programme() -> None:
    infeasible = 0
    problems = _hyperplanes(150)
    for x, w, h, d in zip(
        *(t.flatten(1).numpy() if t.dim() > 1 else t.numpy() for t in (*problems, project_to_hyperplane(*problems))),
        strict=True,
    ):
        assert (x + d).min() >= -1e-12
        assert (x + d).max() <= 1 + 1e-12
        one, box = np.ones((len(x), 1)), [(-v, 1 - v) for v in x]
        best = linprog(  # d and the bound t of all |d|; least t
            [0] * len(x) + [1],
            A_ub=np.block([[np.eye(len(x)), -one], [-np.eye(len(x)), -one]]),
            b_ub=np.zeros(2 * len(x)),
            A_eq=[[*w, 0]],
            b_eq=[-h],
            bounds=[*box, (0, None)],
        )
        if best.status == 2:  # out of reach: as near as can be
            infeasible += 1
            furthest = linprog(w * np.sign(h), bounds=box)
            np.testing.assert_allclose(np.sign(h) * (w @ d), furthest.fun, atol=1e-9)
        else:
            assert best.status == 0
            np.testing.assert_allclose(w @ d, -h, atol=1e-9)
            np.testing.assert_allclose(np.abs(d).max(), best.fun, atol=1e-9)
    assert 40 < infeasible < 110


def test_the_projection_to_a_hyperplane_is_its_authors() -> None:
    x, normal, height = (t.float() for t in _hyperplanes(1000))
    flat, w = x.flatten(1), normal.flatten(1)
    theirs = projection_linf(flat, w, (flat * w).sum(1) - height)
    torch.testing.assert_close(project_to_hyperplane(x, normal, height).flatten(1), theirs, rtol=0, atol=1e-5)
