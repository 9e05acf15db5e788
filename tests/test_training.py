"""The epoch loop against a plain PyTorch loop, resumed against uninterrupted, many workers against one."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.attacks.pgd import fgsm, pgd
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images, load
from dwf_cluster.defences import adversarial
from dwf_cluster.defences.registry import ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment, build
from dwf_cluster.models.frozen import frozen
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.training import NonFiniteLoss, Stopped, Task, train, weights

from .conftest import TINY, InDouble
from .gloo import run_workers

CPU = torch.device("cpu")
BENIGN = ModelSpec("benign", "benign")
FGSM = ModelSpec("fgsm-1", "fgsm", epsilons=(0.06, 0.2))
PGD = ModelSpec("pgd-1", "pgd", steps=(1, 2))


class NoNorm(nn.Module):
    """A small network without BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 16), nn.Tanh(), nn.Linear(16, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layers(x)
        return logits


def _seeded(model: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model()


def _train(
    experiment: Experiment,
    images: Images,
    store: Store,
    regime: ModelSpec,
    model: nn.Module,
    stopping: Callable[[], bool] = lambda: False,
) -> nn.Module:
    task = Task(experiment, store, "experts", regime.name, experiment.experts, stopping=stopping)
    return train(task, model, DeviceImages(images, experiment.data, CPU), adversarial.adversary(regime, experiment.pgd))


@pytest.mark.parametrize("regime", [BENIGN, FGSM, PGD], ids=lambda regime: regime.attack)
def test_it_equals_the_plain_pytorch_loop(images: Images, store: Store, regime: ModelSpec) -> None:
    """In double precision: what rounding differs by must not decide on which side of zero a ReLU's input lies."""
    tiny = build("digits", 0, [*TINY, "experts.learning_rate=0.01", "experts.epochs=2"])
    model = InDouble(adversarial.build(tiny, images, regime.name))
    slow = copy.deepcopy(model)
    _train(tiny, images, store, regime, model)

    data, training = DeviceImages(images, tiny.data, CPU), tiny.experts
    optimizer = torch.optim.SGD(
        slow.parameters(), training.learning_rate, momentum=training.momentum, weight_decay=training.weight_decay
    )
    steps = training.epochs * math.ceil(96 / training.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(training.epochs):
        for index, indices in enumerate(data.epoch(training.batch_size, Draws((0, regime.name, epoch)))):
            draws = Draws((0, regime.name, epoch, index))
            x, y = data.train_batch(indices, draws)
            if regime.attack != "benign":
                target = copy.deepcopy(slow).eval()  # BatchNorm unfolded, in evaluation mode
                if regime.attack == "fgsm":
                    gradient, _, _ = differentiate(target, x, y)
                    x = fgsm(x, gradient, draws.choice("epsilon", regime.epsilons))
                else:
                    count = draws.choice("steps", regime.steps)
                    ball = Ball("linf", tiny.pgd.epsilon)
                    *_, last = pgd(target, x, y, ball, step_size=tiny.pgd.step_size, steps=count)
                    x = last.x
            slow.train()
            optimizer.zero_grad()
            F.cross_entropy(slow(x), y).backward()
            optimizer.step()
            schedule.step()
    for name, tensor in slow.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("regime", [BENIGN, PGD], ids=lambda regime: regime.attack)
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(
    tiny: Experiment, images: Images, tmp_path: Path, regime: ModelSpec
) -> None:
    whole = _train(tiny, images, Store(str(tmp_path), "whole"), regime, adversarial.build(tiny, images, regime.name))

    class Interrupt(Exception):
        pass

    def interrupt(row: dict[str, object]) -> None:
        if row["epoch"] == 2:
            raise Interrupt

    store = Store(str(tmp_path), "interrupted")
    data, perturb = DeviceImages(images, tiny.data, CPU), adversarial.adversary(regime, tiny.pgd)
    task = Task(tiny, store, "experts", regime.name, tiny.experts, report=interrupt)
    with pytest.raises(Interrupt):
        train(task, adversarial.build(tiny, images, regime.name), data, perturb)
    resumed = _train(tiny, images, store, regime, _other(adversarial.build(tiny, images, "another name")))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert [row["epoch"] for row in tables.read(store, "metrics").to_pylist()] == [1, 2, 3]


@pytest.mark.parametrize("steps", [[1], [2, 3, 2], [8]], ids=str)
def test_asked_to_stop_it_saves_the_step_it_is_at_and_goes_on_from_there(
    tiny: Experiment, images: Images, tmp_path: Path, steps: list[int]
) -> None:
    """Three epochs of three steps."""
    whole = _train(tiny, images, Store(str(tmp_path), "whole"), PGD, adversarial.build(tiny, images, "pgd-1"))
    store = Store(str(tmp_path), "stopped")
    for last, done in zip(steps, itertools.accumulate(steps), strict=True):
        asked = itertools.count(1)
        with pytest.raises(Stopped):
            _train(
                tiny, images, store, PGD, adversarial.build(tiny, images, "pgd-1"), lambda n=asked, m=last: next(n) >= m
            )
        epoch, step = divmod(done, 3)
        assert store.names("checkpoints/pgd-1")[-1] == f"epoch-{epoch:05d}-step-{step:06d}"
    resumed = _train(tiny, images, store, PGD, adversarial.build(tiny, images, "pgd-1"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    one, other = (tables.read(Store(str(tmp_path), name), "metrics") for name in ("whole", "stopped"))
    timings = ["seconds", "images_per_second"]
    assert one.drop_columns(timings) == other.drop_columns(timings)


@pytest.mark.parametrize("steps", [2, 4, 8])
def test_killed_in_the_middle_of_a_long_epoch_it_goes_on_from_the_last_minutes_checkpoint(
    tiny: Experiment, images: Images, tmp_path: Path, steps: int
) -> None:
    """Three epochs of three steps, each of them longer than `checkpoint_minutes`."""
    whole = _train(tiny, images, Store(str(tmp_path), "whole"), PGD, adversarial.build(tiny, images, "pgd-1"))
    often = build("digits", 0, [*TINY, "checkpoint_minutes=1e-6"])
    store, asked = Store(str(tmp_path), "killed"), itertools.count(1)

    class Killed(BaseException):
        pass

    def kill() -> bool:
        if next(asked) > steps:
            raise Killed
        return False

    with pytest.raises(Killed):
        _train(often, images, store, PGD, adversarial.build(tiny, images, "pgd-1"), kill)
    epoch, step = divmod(steps, 3)
    assert store.names("checkpoints/pgd-1")[-1] == f"epoch-{epoch:05d}-step-{step:06d}"
    resumed = _train(often, images, store, PGD, adversarial.build(tiny, images, "another name"))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def _other(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        nn.init.constant_(parameter, 3.0)
    return model


def test_restored_momentum_has_the_strides_of_its_parameter(
    tiny: Experiment, images: Images, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With other strides the optimizer would take other kernels than an uninterrupted run."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    step = torch.optim.SGD.step

    def watched(optimizer: torch.optim.SGD) -> None:
        step(optimizer)
        found.extend((p.stride(), state["momentum_buffer"].stride()) for p, state in optimizer.state.items())

    asked = itertools.count(1)
    with pytest.raises(Stopped):
        _train(tiny, images, store, BENIGN, adversarial.build(tiny, images, "benign"), lambda: next(asked) == 2)
    monkeypatch.setattr(torch.optim.SGD, "step", watched)
    _train(tiny, images, store, BENIGN, adversarial.build(tiny, images, "benign"))
    assert len(found) == 7 * len(list(adversarial.build(tiny, images, "benign").parameters()))
    assert all(parameter == momentum for parameter, momentum in found)


def test_training_that_attacks_nothing_builds_no_frozen_model(
    tiny: Experiment, images: Images, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[nn.Module] = []
    frozen = frozen

    def counted(model: nn.Module) -> nn.Module:
        built.append(model)
        return frozen(model)

    monkeypatch.setattr(attacks, "frozen", counted)
    _train(tiny, images, store, BENIGN, adversarial.build(tiny, images, "benign"))
    assert len(built) == 3  # for the probe after each epoch
    _train(tiny, images, store, PGD, adversarial.build(tiny, images, "pgd-1"))
    assert len(built) == 3 + 3 + 9  # and once a step, however many parts the batch has


@pytest.mark.parametrize("parts", [2, 5])
def test_accumulated_gradients_are_the_batchs_without_batchnorm(
    tiny: Experiment, images: Images, tmp_path: Path, parts: int
) -> None:
    whole = _train(tiny, images, Store(str(tmp_path), "1"), PGD, _seeded(NoNorm))
    cut = build("digits", 0, [*TINY, f"experts.accumulation={parts}"])
    accumulated = _train(cut, images, Store(str(tmp_path), "n"), PGD, _seeded(NoNorm))
    for one, other in zip(whole.parameters(), accumulated.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_each_epoch_leaves_a_row_and_a_checkpoint(tiny: Experiment, images: Images, store: Store) -> None:
    _train(tiny, images, store, FGSM, adversarial.build(tiny, images, "fgsm-1"))
    rows = tables.read(store, "metrics").to_pylist()
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6), (3, 9)]
    assert all(0 <= row["probe_pgd_accuracy"] <= row["clean_accuracy"] <= 1 for row in rows)
    assert rows[-1]["learning_rate"] == pytest.approx(0.1 * (1 + math.cos(math.pi * 8 / 9)) / 2)
    assert checkpoints.latest_epoch(store, "fgsm-1") == 3


def test_a_loss_that_is_not_finite_names_step_model_and_last_good_checkpoint(
    tiny: Experiment, images: Images, store: Store
) -> None:
    perturb = adversarial.adversary(BENIGN, tiny.pgd)

    def broken(
        frozen: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = perturb(frozen, x, y, draws)
        return (x * float("nan") if draws.key[-2:] == (1, 1) else x), y

    task = Task(tiny, store, "experts", "benign", tiny.experts)
    with pytest.raises(NonFiniteLoss) as error:
        train(task, adversarial.build(tiny, images, "benign"), DeviceImages(images, tiny.data, CPU), broken)
    path = store.path("checkpoints/benign/epoch-00001")
    assert str(error.value) == f"the loss became nan in epoch 2, step 5 of benign; last good checkpoint: {path}"
    assert checkpoints.latest_epoch(store, "benign") == 1


class OverflowsUnderAttack(NoNorm):
    """Its logits are infinite in evaluation mode, which attacks use, from its fifth training step on."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
            return super().forward(x)
        return super().forward(x) * (torch.inf if self.steps >= 4 else 1)


def test_infinite_logits_under_attack_name_step_model_and_last_good_checkpoint(
    tiny: Experiment, images: Images, store: Store
) -> None:
    """The model decides when they come: with weights that explode, rounding decides whether the loss is first."""
    with pytest.raises(NonFiniteLoss) as error:
        _train(tiny, images, store, PGD, _seeded(OverflowsUnderAttack))
    path = store.path("checkpoints/pgd-1/epoch-00001")
    assert str(error.value) == (
        f"the model's outputs contain NaN or infinity in epoch 2, step 5 of pgd-1; last good checkpoint: {path}"
    )


def test_the_baselines_attack_half_of_the_batch() -> None:
    perturb = adversarial.adversary(ModelSpec("fgsm-at", "fgsm", (0.1,), fraction=0.5), build("digits").pgd)
    x, y = torch.full((9, 1, 8, 8), 0.5), torch.arange(9)
    trained, labels = perturb(lambda: frozen(_seeded(NoNorm)), x, y, Draws((0,)))
    assert (trained != x).flatten(1).any(1).tolist() == [True] * 5 + [False] * 4
    assert torch.equal(labels, y)


def test_strengths_are_drawn_for_each_batch_from_the_whole_set() -> None:
    drawn = {Draws((0, "fgsm-1", 0, step)).choice("epsilon", (0.1, 0.2, 0.3)) for step in range(40)}
    assert drawn == {0.1, 0.2, 0.3}
    assert len({Draws((0, name, 0, 0)).generator("order").initial_seed() for name in ("fgsm-1", "fgsm-2")}) == 2


# ------------------------------------------------------------------------------------ two gloo workers


def _two_workers(folder: Path, norm: bool) -> None:
    """Train to the end, with a pause that only the second worker asks for."""
    experiment = build("digits", 0, TINY)
    asked = itertools.count(1)
    with pytest.raises(Stopped):  # on both
        _run(experiment, folder, "two", norm, lambda: dist.get_rank() == 1 and next(asked) == 2)
    dist.barrier()  # the first worker has saved
    assert Store(str(folder), "two").names(f"checkpoints/{'benign' if norm else 'pgd-1'}") == [
        "epoch-00000-step-000002"
    ]
    _run(experiment, folder, "two", norm)


def _run(
    experiment: Experiment, folder: Path, name: str, norm: bool, stopping: Callable[[], bool] = lambda: False
) -> None:
    images = load(experiment.data, folder)
    model = adversarial.build(experiment, images, "benign") if norm else _seeded(NoNorm)
    _train(experiment, images, Store(str(folder), name), BENIGN if norm else PGD, model, stopping)


@pytest.mark.parametrize("norm", [False, True], ids=["without BatchNorm", "with BatchNorm"])
def test_two_workers_with_half_the_batch_follow_one_worker_on_the_whole(tmp_path: Path, norm: bool) -> None:
    """Without BatchNorm the weights agree up to rounding. With it, they agree with those of one worker that
    accumulates two halves: what is left between the two and the whole batch is the statistics of the halves."""
    run_workers(2, _two_workers, tmp_path, norm)
    one = build("digits", 0, [*TINY, f"experts.accumulation={2 if norm else 1}"])
    _run(one, tmp_path, "one", norm)
    found = {}
    for name in ("one", "two"):
        checkpoint = checkpoints.load_latest(Store(str(tmp_path), name), "benign" if norm else "pgd-1")
        assert checkpoint is not None
        found[name] = weights(checkpoint)
    for name, tensor in found["one"].items():
        if "running" not in name and "tracked" not in name:
            torch.testing.assert_close(found["two"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
