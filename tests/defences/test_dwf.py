"""Algorithm 3: three versions of each image in one batch, experts and gate end to end; and the baselines' batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dwf_cluster.attacks.ball import Ball
from dwf_cluster.attacks.gradient import differentiate
from dwf_cluster.attacks.pgd import fgsm, pgd
from dwf_cluster.data.device import DeviceImages
from dwf_cluster.data.sources import Images, load
from dwf_cluster.defences import adversarial, dwf
from dwf_cluster.defences.build import to_train, trained, untrained
from dwf_cluster.determinism import Draws
from dwf_cluster.experiment import Experiment
from dwf_cluster.models.frozen import frozen
from dwf_cluster.models.mixture import Mixture
from dwf_cluster.presets import build
from dwf_cluster.store import Store, checkpoints, tables
from dwf_cluster.training.loop import _optimizer, train

from ..conftest import TINY, task_for, untrained_model

CPU = torch.device("cpu")


def _untrained_mixture(experiment: Experiment, images: Images) -> Mixture:
    mixture = untrained_model(experiment, images, "mixture")
    assert isinstance(mixture, Mixture)
    return mixture


def _train(experiment: Experiment, images: Images, store: Store, *names: str) -> None:
    for name in names:
        model = to_train(experiment.models, name, images.format, experiment.seed, store)
        train(task_for(experiment, store, name), model, DeviceImages(images, experiment.data, CPU))


def _weights(store: Store, name: str) -> dict[str, torch.Tensor]:
    checkpoint = checkpoints.load_latest(store, name)
    assert checkpoint is not None
    return checkpoint.weights


class Recorder(nn.Module):
    """Keeps the images that it is trained on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.images, self.logits = x, self.model(x)
        return self.logits


def test_the_batch_is_clean_fgsm_and_pgd_side_by_side(tiny: Experiment, images: Images) -> None:
    mixture = _untrained_mixture(tiny, images)
    frozen_model, recorder = frozen(mixture), Recorder(mixture)
    x, y = DeviceImages(images, tiny.data, CPU).train_batch(torch.arange(12), Draws((0,)))
    draws = Draws((0, "mixture", 0, 0))
    (loss,) = dwf.losses(tiny.defended, recorder, lambda: frozen_model, x, y, draws)
    fgsm_examples = fgsm(x, differentiate(frozen_model, x, y)[0], draws.choice("epsilon", tiny.fgsm.epsilons))
    steps, ball = draws.choice("steps", tiny.pgd.steps), Ball("linf", tiny.pgd.epsilon)
    *_, last = pgd(frozen_model, x, y, ball, step_size=tiny.pgd.step_size, steps=steps)
    assert torch.equal(recorder.images, torch.cat([x, fgsm_examples, last.x]))
    labels = torch.cat([y, y, y])
    assert loss.rows == len(labels)
    assert torch.equal(loss.total, nn.functional.cross_entropy(recorder.logits, labels, reduction="sum"))


def test_the_baselines_attack_half_of_the_batch(images: Images) -> None:
    experiment = build("digits", 0, [*TINY, "baselines=fgsm-at,pgd-at"])
    x, y = torch.full((9, 1, 8, 8), 0.5), torch.arange(9)
    for name, losses in (("fgsm-at", adversarial.fgsm), ("pgd-at", adversarial.pgd)):
        spec = experiment.spec(name)
        recorder = Recorder(untrained(spec, images.format, 0, {}))
        frozen_model = frozen(recorder.model)
        (loss,) = losses(spec, recorder, lambda model=frozen_model: model, x, y, Draws((0,)))  # type: ignore[misc]
        assert (recorder.images != x).flatten(1).any(1).tolist() == [True] * 5 + [False] * 4
        assert loss.rows == 9
        assert torch.equal(loss.total, nn.functional.cross_entropy(recorder.logits, y, reduction="sum"))


def test_fgsms_gradient_is_pgds_first(tiny: Experiment, images: Images) -> None:
    mixture, frozen_model = _untrained_mixture(tiny, images), frozen(_untrained_mixture(tiny, images))
    calls: list[int] = []
    frozen_model.register_forward_pre_hook(lambda *_: calls.append(1))
    x, y = DeviceImages(images, tiny.data, CPU).train_batch(torch.arange(4), Draws((0,)))
    draws = Draws((0, "mixture", 0, 0))
    list(dwf.losses(tiny.defended, mixture, lambda: frozen_model, x, y, draws))
    assert len(calls) == draws.choice("steps", tiny.pgd.steps)


def test_the_joint_stage_starts_from_the_trained_experts_and_changes_them_and_the_gate(
    tiny: Experiment, images: Images, store: Store
) -> None:
    _train(tiny, images, store, *tiny.names)
    untrained_weights, mixture = _untrained_mixture(tiny, images).state_dict(), _weights(store, "mixture")
    gate = [name for name in mixture if name.startswith("gate.layers.2")]
    assert any(not torch.equal(untrained_weights[name], mixture[name]) for name in gate)
    for number, expert in enumerate(tiny.defended.parents):
        name = "stem.0.weight"
        change = (mixture[f"experts.{number}.{name}"] - _weights(store, expert)[name]).abs().max()
        assert 0 < float(change) < 0.5
    assert [row["stage"] for row in tables.read(store, "metrics", ["mixture"]).to_pylist()] == ["joint", "joint"]
    loaded = trained(tiny.models, "mixture", images.format, tiny.seed, store).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in mixture.items())


def test_with_no_good_checkpoint_left_the_joint_stage_starts_from_the_experts_again(
    tiny: Experiment, images: Images, store: Store
) -> None:
    _train(tiny, images, store, *tiny.names)
    first = _weights(store, "mixture")
    for epoch in store.names("checkpoints/joint"):
        store.write(f"checkpoints/joint/{epoch}/tensors.safetensors", b"damaged")
    _train(tiny, images, store, "mixture")
    second = _weights(store, "mixture")
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_the_joint_stage_does_not_start_before_every_expert_is_trained(
    tiny: Experiment, images: Images, store: Store
) -> None:
    with pytest.raises(checkpoints.CheckpointLost, match="benign is not trained to the end"):
        _train(tiny, images, store, "mixture")


def test_the_gate_has_a_learning_rate_and_weight_decay_of_its_own(images: Images) -> None:
    experiment = build("digits", 0, [*TINY, "gate.learning_rate=0.5", "gate.weight_decay=0.25"])
    mixture = _untrained_mixture(experiment, images)
    experts, gate = _optimizer(mixture, experiment.defended).param_groups
    assert (gate["lr"], gate["peak"], gate["weight_decay"]) == (0.5, 0.5, 0.25)
    assert (experts["lr"], experts["peak"], experts["weight_decay"]) == (0.01, 0.01, 5e-4)
    assert [id(p) for p in gate["params"]] == [id(p) for p in mixture.gate.parameters()]
    assert len(experts["params"]) + len(gate["params"]) == len(list(mixture.parameters()))
    (benign,) = _optimizer(mixture.experts[0], experiment.spec("benign")).param_groups
    assert (benign["lr"], benign["weight_decay"]) == (0.1, 5e-4)


def test_models_of_different_names_start_from_different_weights(tmp_path: Path) -> None:
    experiment = build("digits", 0, [*TINY, "experts.pgd=2"])
    images = load(experiment.data, tmp_path)
    first, again, other = (
        untrained(experiment.spec(name), images.format, 0, {}).state_dict()["stem.0.weight"]
        for name in ("pgd-1", "pgd-1", "pgd-2")
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_frozen_experts_keep_every_tensor_and_the_gate_learns(images: Images, store: Store) -> None:
    experiment = build("digits", 0, [*TINY, "joint.freeze_experts=true"])
    own_store = experiment.store(store.url)
    _train(experiment, images, own_store, *experiment.names)
    mixture, untrained_weights = _weights(own_store, "mixture"), _untrained_mixture(experiment, images).state_dict()
    for number, expert in enumerate(experiment.defended.parents):
        for name, tensor in _weights(own_store, expert).items():
            assert torch.equal(mixture[f"experts.{number}.{name}"], tensor), name
    assert not torch.equal(mixture["gate.layers.2.weight"], untrained_weights["gate.layers.2.weight"])


def test_a_hard_gate_is_trained_by_the_same_algorithm(images: Images, store: Store) -> None:
    experiment = build("digits", 0, [*TINY, "gate.kind=hard"])
    own_store = experiment.store(store.url)
    _train(experiment, images, own_store, *experiment.names)
    mixture = trained(experiment.models, "mixture", images.format, 0, own_store)
    assert isinstance(mixture, Mixture)
    assert set(mixture.gate(torch.rand(8, 1, 8, 8)).unique().tolist()) <= {0.0, 1.0}
    fresh = _untrained_mixture(experiment, images)
    assert not torch.equal(mixture.gate.layers[2].weight, fresh.gate.layers[2].weight)
