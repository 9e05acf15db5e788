"""Settings of the attacks that models are trained against."""

from __future__ import annotations

from typing import Literal

from dwf_cluster.settings import Counts, Pixels, Settings, Strengths


class Fgsm(Settings):
    """FGSM, equation (3), in the training of the FGSM experts and of the joint stage."""

    epsilons: Strengths = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)
    """The set that a batch's epsilon is drawn from (one value: a fixed strength), pixels in [0, 1].
    Our assumption: the nine values of the paper's columns, where its text says "between 0.01 to 0.09"."""
    draw: Literal["set", "range"] = "set"
    """`set`: one of `epsilons`, each equally likely; `range`: any number between the smallest and the largest of them,
    uniformly. Our assumption: `set`."""


class Pgd(Settings):
    """PGD, equations (4) and (5), in the training of the PGD experts and of the joint stage."""

    epsilon: Pixels = 8 / 255
    """Radius of the L-infinity ball, pixels in [0, 1]. Our assumption: 8/255, the field's standard for CIFAR-10. The
    paper's cells of defended models fit 0.02 with steps of 0.005."""
    step_size: Pixels = 2 / 255
    """Length of one step, pixels in [0, 1]. Our assumption: 2/255, the field's standard for CIFAR-10."""
    step_sizes: Strengths | None = None
    """The set that a batch's length of a step is drawn from in training, pixels in [0, 1]; null: always `step_size`,
    which the evaluation follows in any case. Our assumption: null; the paper's section 4 says that the step size is
    random, its section 5 gives one."""
    random_start: bool = False
    """Start PGD in training at a random point of the ball. Our assumption: it starts at the image; most of the field
    starts at a random point (Madry et al. 2018)."""
    steps: Counts = (10, 20, 30, 40, 50)
    """The set that a batch's number of iterations is drawn from (one value: a fixed number)."""
