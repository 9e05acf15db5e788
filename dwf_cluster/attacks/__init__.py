"""Attacks: pure functions of (model, x, y, ball, ...) that yield or return adversarial examples.

Inputs are float NCHW in [0, 1], labels int64; epsilon and step size are in those pixel units. The model must be
a frozen view (`frozen`): evaluation mode, no parameter gradients. Nothing of the model and nothing of the
global random state changes. Random draws come from one generator an image, so no result depends on the batch.

To add an attack: a function here that yields its iterates, its column in `grid.py`, its call in `evaluation.py`.
"""

from dwf_cluster.attacks.apgd import apgd, targeted_dlr
from dwf_cluster.attacks.autoattack import autoattack
from dwf_cluster.attacks.ball import Ball, uniform
from dwf_cluster.attacks.fab import fab_targeted
from dwf_cluster.attacks.gradient import NotLogits, carlini_wagner, cross_entropy, differentiate, margin, predict
from dwf_cluster.attacks.mixture import gate_aimed
from dwf_cluster.attacks.pgd import Iterate, Standing, WorstCase, fgsm, pgd, with_logits
from dwf_cluster.attacks.square import square
from dwf_cluster.attacks.view import frozen

__all__ = [
    "Ball",
    "Iterate",
    "NotLogits",
    "Standing",
    "WorstCase",
    "apgd",
    "autoattack",
    "carlini_wagner",
    "cross_entropy",
    "differentiate",
    "fab_targeted",
    "fgsm",
    "frozen",
    "gate_aimed",
    "margin",
    "pgd",
    "predict",
    "square",
    "targeted_dlr",
    "uniform",
    "with_logits",
]
