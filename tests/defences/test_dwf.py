"""Algorithm 3: three parts in one batch, experts and gate end to end."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.attacks.pgd import fgsm, pgd
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images
from dwf_cluster.defences import adversarial, dwf
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment, build
from dwf_cluster.models.frozen import frozen
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.training import Task, _optimizer, weights

from ..conftest import TINY

CPU = torch.device("cpu")


def _experts(experiment: Experiment, images: Images, store: Store) -> None:
    for regime in experiment.regimes:
        task = Task(experiment, store, "experts", regime.name, experiment.experts)
        adversarial.train_expert(task, images, regime, CPU)


def test_the_batch_is_clean_fgsm_and_pgd_side_by_side(tiny: Experiment, images: Images) -> None:
    view = frozen(dwf.build(tiny, images))
    x, y = DeviceImages(images, tiny.data, CPU).train_batch(torch.arange(12), Draws((0,)))
    draws = Draws((0, "mixture", 0, 0))
    found, labels = dwf.three_parts(tiny)(lambda: view, x, y, draws)
    fgsm = fgsm(x, differentiate(view, x, y)[0], draws.choice("epsilon", tiny.fgsm.epsilons))
    steps, ball = draws.choice("steps", tiny.pgd.steps), Ball("linf", tiny.pgd.epsilon)
    *_, last = pgd(view, x, y, ball, step_size=tiny.pgd.step_size, steps=steps)
    assert torch.equal(found, torch.cat([x, fgsm, last.x]))
    assert torch.equal(labels, torch.cat([y, y, y]))


def test_fgsms_gradient_is_pgds_first(tiny: Experiment, images: Images) -> None:
    view = frozen(dwf.build(tiny, images))
    calls: list[int] = []
    view.register_forward_pre_hook(lambda *_: calls.append(1))
    x, y = DeviceImages(images, tiny.data, CPU).train_batch(torch.arange(4), Draws((0,)))
    draws = Draws((0, "mixture", 0, 0))
    dwf.three_parts(tiny)(lambda: view, x, y, draws)
    assert len(calls) == draws.choice("steps", tiny.pgd.steps)


def test_it_starts_from_the_trained_experts_and_changes_all_of_them_and_the_gate(
    tiny: Experiment, images: Images, store: Store
) -> None:
    _experts(tiny, images, store)
    dwf.train_joint(Task(tiny, store, "joint", "mixture", tiny.joint), images, CPU)
    mixture = checkpoints.load_latest(store, "mixture")
    assert mixture is not None
    fresh = dwf.build(tiny, images).state_dict()
    trained = weights(mixture)
    assert any(not torch.equal(fresh[name], trained[name]) for name in fresh if name.startswith("gate.layers.2"))
    for number, regime in enumerate(tiny.mixture_regimes):
        before = checkpoints.load_latest(store, regime.name)
        assert before is not None
        name = "stem.0.weight"
        change = (trained[f"experts.{number}.{name}"] - weights(before)[name]).abs().max()
        assert 0 < float(change) < 0.5
    assert [row["stage"] for row in tables.read(store, "metrics", ["mixture"]).to_pylist()] == ["joint", "joint"]


def test_with_no_good_checkpoint_left_it_starts_from_the_experts_again(
    tiny: Experiment, images: Images, store: Store
) -> None:
    _experts(tiny, images, store)
    task = Task(tiny, store, "joint", "mixture", tiny.joint)
    dwf.train_joint(task, images, CPU)
    first = checkpoints.load_latest(store, "mixture")
    for epoch in store.names("checkpoints/joint"):
        store.write(f"checkpoints/joint/{epoch}/tensors.safetensors", b"damaged")
    dwf.train_joint(task, images, CPU)
    again = checkpoints.load_latest(store, "mixture")
    assert first is not None
    assert again is not None
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())


def test_it_does_not_start_before_every_expert_is_trained(tiny: Experiment, images: Images, store: Store) -> None:
    with pytest.raises(checkpoints.CheckpointLost, match="benign is not trained to the end"):
        dwf.train_joint(Task(tiny, store, "joint", "mixture", tiny.joint), images, CPU)


def test_the_gate_has_a_learning_rate_and_weight_decay_of_its_own(images: Images) -> None:
    experiment = build("digits", 0, [*TINY, "gate.learning_rate=0.5", "gate.weight_decay=0.25"])
    mixture = dwf.build(experiment, images)
    experts, gate = _optimizer(mixture, experiment.joint, experiment.gate).param_groups
    assert (gate["lr"], gate["weight_decay"]) == (0.5, 0.25)
    assert (experts["lr"], experts["weight_decay"]) == (0.01, 5e-4)
    assert [id(p) for p in gate["params"]] == [id(p) for p in mixture.gate.parameters()]
    assert len(experts["params"]) + len(gate["params"]) == len(list(mixture.parameters()))


def test_experts_of_different_names_start_from_different_weights(tiny: Experiment, images: Images) -> None:
    first, again, other = (adversarial.build(tiny, images, name) for name in ("pgd-1", "pgd-1", "pgd-2"))

    def stem(model: nn.Module) -> torch.Tensor:
        return model.state_dict()["stem.0.weight"]

    assert torch.equal(stem(first), stem(again))
    assert not torch.equal(stem(first), stem(other))


def test_frozen_experts_stay_as_they_were_to_the_last_statistic_and_the_gate_learns(
    images: Images, store: Store
) -> None:
    frozen = build("digits", 0, [*TINY, "dwf.freeze_experts=true"])
    own = Store(store.url, frozen.folder)
    _experts(frozen, images, own)
    dwf.train_joint(Task(frozen, own, "joint", "mixture", frozen.joint), images, CPU)
    mixture = checkpoints.load_latest(own, "mixture")
    assert mixture is not None
    trained, fresh = weights(mixture), dwf.build(frozen, images).state_dict()
    for number, regime in enumerate(frozen.mixture_regimes):
        before = checkpoints.load_latest(own, regime.name)
        assert before is not None
        for name, tensor in weights(before).items():
            assert torch.equal(trained[f"experts.{number}.{name}"], tensor), name
    assert not torch.equal(trained["gate.layers.2.weight"], fresh["gate.layers.2.weight"])


def test_a_hard_gate_is_trained_by_the_same_algorithm(images: Images, store: Store) -> None:
    hard = build("digits", 0, [*TINY, "gate.kind=hard"])
    own = Store(store.url, hard.folder)
    _experts(hard, images, own)
    dwf.train_joint(Task(hard, own, "joint", "mixture", hard.joint), images, CPU)
    trained = checkpoints.load_latest(own, "mixture")
    assert trained is not None
    mixture = dwf.build(hard, images)
    fresh = mixture.gate.layers[2].weight.clone()
    mixture.load_state_dict(weights(trained))
    assert set(mixture.gate(torch.rand(8, 1, 8, 8)).unique().tolist()) <= {0.0, 1.0}
    assert not torch.equal(mixture.gate.layers[2].weight, fresh)
