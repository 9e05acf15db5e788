"""Adding a thing is adding a file and one entry: one toy of each kind, in a copy of the packages, through a whole run.

Nothing but the new files and the entries differs from the packages: plan, schedule, checkpoints, tables, progress and
figures follow from the registries.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pytest

from . import PATIENCE
from .conftest import TINY

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Addition:
    """What is added.

    Attributes:
        file: path of the new file.
        content: of it.
        registry: path of the file with the registry.
        declaration: the line that opens the registry.
        entry: the line that is added to it.
    """

    file: str
    content: str
    registry: str
    declaration: str
    entry: str


BACKBONE = Addition(
    "dwf_cluster/models/toy.py",
    """
from torch import nn

from dwf_cluster.models.resnet import Normalize


def linear(images, width):
    channels, height, columns = images.shape
    pixels = channels * height * columns
    return nn.Sequential(Normalize(images.mean, images.std), nn.Flatten(), nn.Linear(pixels, images.classes))
""",
    "dwf_cluster/models/registry.py",
    "BACKBONES: Mapping[str, Backbone] = {",
    '"toy": Backbone("dwf_cluster.models.toy:linear", lambda width, shape: 1e4, lambda width, channels: 650),',
)
METHOD = Addition(
    "dwf_cluster/defences/toy.py",
    """
import torch.nn.functional as F

from dwf_cluster.defences.adversarial import build
from dwf_cluster.defences.loss import Loss

__all__ = ["build"]


def losses(spec, model, frozen, x, y, draws):
    for _ in range(2):
        yield Loss(F.cross_entropy(model(x), y, reduction="sum", label_smoothing=0.1), len(y))
""",
    "dwf_cluster/defences/registry.py",
    "METHODS: Mapping[str, Method] = {",
    '"smooth": Method("dwf_cluster.defences.toy:build", "dwf_cluster.defences.toy:losses", lambda spec: 6.0),',
)
DEFENCE = Addition(
    "dwf_cluster/defences/toy_pair.py",
    """
from dataclasses import replace

from dwf_cluster.defences.registry import model


def recipe(settings):
    parent = model("parent", "smooth", settings)
    return parent, replace(parent, name="child", method="pgd", options=model("", "pgd", settings).options)
""",
    "dwf_cluster/defences/registry.py",
    "DEFENCES: Mapping[str, Callable[[DefenceSettings], tuple[ModelSpec, ...]]] = {",
    '"pair": lambda settings: pkgutil.resolve_name("dwf_cluster.defences.toy_pair:recipe")(settings),',
)
SUITE = Addition(
    "dwf_cluster/evaluation/toy.py",
    """
from dwf_cluster.attacks.toy import darker
from dwf_cluster.evaluation.run import Attacked


def dark(batch):
    (column,) = batch.columns
    yield Attacked(column, darker(batch.x, column.epsilon))
""",
    "dwf_cluster/evaluation/registry.py",
    "SUITES: Mapping[str, Suite] = {",
    '"dark": Suite("dwf_cluster.evaluation.toy:dark", lambda e, threat: [Column("dark", epsilon=threat.epsilon)], '
    "lambda e, networks: 1.0),",
)
ATTACK = '''
def darker(x, epsilon):
    return (x - epsilon).clamp(0, 1)
'''
DATASET = Addition(
    "dwf_cluster/data/toy.py",
    """
import numpy as np

from dwf_cluster.data.sources import Raw


def stripes(folder):
    random = np.random.default_rng(0)
    y = np.arange(140) % 7
    x = (random.integers(0, 60, (140, 8, 8)) + 28 * y[:, None, None]).astype(np.uint8)
    return Raw(x[:100], y[:100], x[100:], y[100:])
""",
    "dwf_cluster/data/registry.py",
    "DATASETS: Mapping[str, Dataset] = {",
    '"stripes": Dataset(100, 40, (1, 8, 8), 7, "dwf_cluster.data.toy:stripes"),',
)
ADDITIONS = (BACKBONE, METHOD, DEFENCE, SUITE, DATASET)
