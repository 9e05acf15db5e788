"""Models from their specs: untrained, ready to be trained from their parents' weights, or trained."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from dwf_cluster.data.registry import ImageFormat
from dwf_cluster.defences.registry import METHODS, ModelSpec
from dwf_cluster.determinism import Draws
from dwf_cluster.store import Store, checkpoints


def untrained(spec: ModelSpec, images: ImageFormat, seed: int, parents: Mapping[str, nn.Module]) -> nn.Module:
    """A model before its training; models of different names start from different weights.

    Args:
        spec: the model.
        images: what it classifies.
        seed: of the experiment.
        parents: models that it starts from, in the order of `spec.parents`; they become part of it.
    """
    build = pkgutil.resolve_name(METHODS[spec.method].build)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Draws((seed, spec.name)).generator("weights").initial_seed())
        model: nn.Module = build(spec, images, parents)
    return model


def to_train(specs: Sequence[ModelSpec], name: str, images: ImageFormat, seed: int, store: Store) -> nn.Module:
    """A model before its training, with the trained weights of its parents.

    Args:
        specs: the model and its parents, at least.
        name: of the model.
        images, seed: as for `untrained`.
        store: has the parents' checkpoints.

    Raises:
        CheckpointLost: if a parent is not trained.
    """
    spec = _spec(specs, name)
    parents = {parent: trained(specs, parent, images, seed, store) for parent in spec.parents}
    return untrained(spec, images, seed, parents)


def trained(
    specs: Sequence[ModelSpec],
    name: str,
    images: ImageFormat,
    seed: int,
    store: Store,
    loaded: dict[str, nn.Module] | None = None,
) -> nn.Module:
    """A trained model, or one that is built from trained ones.

    Args:
        specs, name, images, seed, store: as for `to_train`.
        loaded: models that this function has returned before, by name, which are not loaded again; this one is added.
            Models that are built from others share their modules.

    Raises:
        CheckpointLost: if the model, or one that it is built from, is not trained to its last epoch.
    """
    loaded = {} if loaded is None else loaded
    if name not in loaded:
        spec = _spec(specs, name)
        if METHODS[spec.method].losses is None:
            parents = {parent: trained(specs, parent, images, seed, store, loaded) for parent in spec.parents}
            loaded[name] = untrained(spec, images, seed, parents)
        else:
            model = _structure(specs, spec, images, seed)
            model.load_state_dict(checkpoints.load_trained(store, name, spec.training.epochs).weights)
            loaded[name] = model
    return loaded[name]


def _structure(specs: Sequence[ModelSpec], spec: ModelSpec, images: ImageFormat, seed: int) -> nn.Module:
    """A model and, as parts of it, its parents, all untrained: a trained model's checkpoint holds its parts too."""
    parents = {name: _structure(specs, _spec(specs, name), images, seed) for name in spec.parents}
    return untrained(spec, images, seed, parents)


def _spec(specs: Sequence[ModelSpec], name: str) -> ModelSpec:
    return next(spec for spec in specs if spec.name == name)
