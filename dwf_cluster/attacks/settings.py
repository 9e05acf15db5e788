"""Settings of the attacks that models are trained against."""

from __future__ import annotations

from dwf_cluster.settings import Counts, Pixels, Settings, Strengths


class Fgsm(Settings):
    """FGSM, equation (3), in the training of the FGSM experts and of the joint stage."""

    epsilons: Strengths = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)
    """The set that a batch's epsilon is drawn from (one value: a fixed strength), pixels in [0, 1]."""


class Pgd(Settings):
    """PGD, equations (4) and (5), in the training of the PGD experts and of the joint stage."""

    epsilon: Pixels = 8 / 255
    """Radius of the L-infinity ball, pixels in [0, 1] (our assumption: the field's standard)."""
    step_size: Pixels = 2 / 255
    """Length of one step, pixels in [0, 1] (our assumption: the field's standard)."""
    steps: Counts = (10, 20, 30, 40, 50)
    """The set that a batch's number of iterations is drawn from (one value: a fixed number)."""
