"""Settings of the evaluation: which columns the result table has, and the threat model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from dwf_cluster.settings import Count, Counts, OneOf, Settings, Strengths, as_tuple

Norm = Literal["linf", "l2", "l1"]

Radius = Annotated[float, Field(gt=0, le=1000)]
Radii = Annotated[tuple[Radius, ...], BeforeValidator(as_tuple), Field(min_length=1)]


def _extra_names() -> Iterable[str]:
    from dwf_cluster.evaluation.registry import extra_names  # which imports this module

    return extra_names()


class Evaluation(Settings):
    """The columns of the result table."""

    norm: Norm = "linf"
    """Norm of the threat model: `linf` (the largest change of a value), `l2` or `l1`."""
    epsilon: Radii | None = None
    """Radius of the ball, in `norm`, pixels in [0, 1]; several give a column each, and the first one is that of probes
    and checks. Null: the radius that is trained with (`pgd.epsilon`; `l2_epsilon`, `l1_epsilon`)."""
    step_size: Radius | None = None
    """Length of one step of PGD at the first `epsilon`; at others in proportion. Null: the length that is trained with
    (`pgd.step_size`; `l2_step_size`, `l1_step_size`), in proportion to the radius."""
    random_start: bool = False
    """Start the PGD columns and the probe at a random point of the ball. Our assumption: they start at the image."""
    fgsm_epsilons: Strengths = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)
    """FGSM columns, pixels in [0, 1]."""
    pgd_steps: Counts = (10, 20, 30, 40, 50)
    """PGD columns, iterations, under each threat model."""
    restarts: Count = 3
    """Starts of the `pgd_restarts` column, the image itself and then random points of the ball; an image counts as
    correct if it resists every iterate of each. Our assumption: this rule; the paper says "3 restarts"."""
    restart_steps: Count = 100
    """Iterations from each start."""
    adaptive_steps: Count = 100
    """Iterations of `pgd_adaptive`, through experts, gate and routing weights; of `pgd_gate` and `pgd_expert`."""
    eot: Count = 1
    """Gradients averaged in each adaptive iteration (expectation over transformation)."""
    beyond: Annotated[
        tuple[Annotated[str, OneOf(_extra_names)], ...],
        BeforeValidator(as_tuple),
    ] = ("pgd_gate", "pgd_expert")
    """Columns beside the paper's: `pgd_gate` aims at the mixture's gate, `pgd_expert` at its experts one by one,
    `pgd_route` at an expert and at the gate's weight for it (a hard gate always has this column); `pgd_momentum`;
    `pgd_cw` (Carlini-Wagner loss); `pgd_targeted` (towards each other label); `pgd_l2`, `pgd_l1`; `apgd`, `apgd_l2`;
    `square` (black box); `autoattack` (its authors' standard set); `transfer` (made on one model, tested on each
    other); `noise` (random signs, the floor of every attack); `corruptions` (fifteen common corruptions). Not in the
    result table: `curves` (PGD and APGD over epsilon, PGD over steps and over restarts) and `experts` (the mixture's
    experts alone, against each other's PGD images, and the mixture without each of them)."""
    l2_epsilon: Radius = 0.5
    """Radius of the L2 ball, Euclidean length over an image's pixels in [0, 1]."""
    l2_step_size: Radius = 0.1
    """Length of one step of `pgd_l2`."""
    l1_epsilon: Radius = 12.0
    """Radius of the L1 ball, sum of the changes of an image's values in [0, 1]."""
    l1_step_size: Radius = 1.0
    """Length of one step of PGD in the L1 ball."""
    autoattack_examples: Count | None = None
    """Run AutoAttack on the first n test images. Null: on all, if `beyond` names it; else on 1,000 if the networks have
    the paper's width of 64 or more and the data set is a named one, else not at all."""
    apgd_steps: Count = 100
    """Iterations of `apgd` and `apgd_l2`."""
    targets: Count = 9
    """Labels that `pgd_targeted` aims at in turn: the most likely ones beside the true one, or all if there are fewer.
    Our assumption: nine, as in AutoAttack; with ten classes that is all of them."""
    square_queries: Count = 5000
    """Forward passes of `square`."""
    curve_examples: Count = 1000
    """First test images that `curves` is measured on."""
    curve_multiples: Radii = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0)
    """Radii of the curves over epsilon, as multiples of the first `epsilon`. In L-infinity those of 1 or more are
    replaced by 1, where the ball has every image, so that accuracy must fall to 0 %. Our assumption: in L2 and L1 the
    last of the default multiples is large enough for that too."""
    curve_steps: Count = 1000
    """Iterations of the run of the curve over steps: accuracy after 1, 2, 5, 10, 20, 50, ... of them."""
    curve_restarts: Annotated[int, Field(ge=1, le=1000)] = 20
    """Starts of the curve over restarts, of `restart_steps` iterations each: the worst case over 1, 2, 3, ... of
    them."""
    corruptions: Literal["generated", "files"] = "generated"
    """Where the images of the suite `corruptions` come from: `generated` from the test images, some corruptions in a
    simpler form; `files`: those of CIFAR-10-C, its fifteen `.npy` files and `labels.npy` in the folder `CIFAR-10-C` of
    the data folder."""
    corruption_severities: Annotated[
        tuple[Annotated[int, Field(ge=1, le=5)], ...], BeforeValidator(as_tuple), Field(min_length=1)
    ] = (3,)
    """Severities of the corruptions, 1 to 5, a column each. Our assumption: the middle one; the benchmark's mean is
    over all five."""
    check_examples: Count = 128
    """Test images that each model is checked for gradient masking on: the first ones of a named data set, a
    class-balanced draw from those of an `.npz` file."""
    shard_examples: Count | None = None
    """Test images of one evaluation task, rounded up to whole batches; null takes as many as keep a CPU core busy
    for minutes."""
    batch_size: Count = 512
    """Images attacked at once."""
    probe_examples: Count = 256
    """Images of the small PGD probe that follows every epoch of training: a fixed, class-balanced draw of validation
    images or, without `data.validation_examples`, of training images without augmentation; never of test images."""
    probe_steps: Count = 10
    """Iterations of the probe."""

    @field_validator("epsilon", "step_size")
    @classmethod
    def _lengths_are_of_the_norm(cls, value: Any, info: ValidationInfo) -> Any:
        """Pixels are in [0, 1], so no change of one is larger than 1 (a radius of 8 means 8/255)."""
        lengths = value if isinstance(value, tuple) else () if value is None else (value,)
        if info.data.get("norm") == "linf" and any(length > 1 for length in lengths):
            raise ValueError("allowed with evaluation.norm=linf are numbers up to 1, pixels are in [0, 1]")
        return value

    @field_validator("beyond")
    @classmethod
    def _suites_can_follow_the_norm(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        from dwf_cluster.evaluation.registry import suites_of_norm  # which imports this module

        allowed = suites_of_norm(norm := info.data.get("norm", "linf"))
        if refused := next((name for name in value if name not in allowed), None):
            raise ValueError(
                f"{refused} has no norm {norm}, allowed with evaluation.norm={norm} are {', '.join(allowed)}"
            )
        return value


@dataclass(frozen=True)
class Threat:
    """The threat model that a model is evaluated under.

    Attributes:
        epsilon: radius of the ball, in `norm`, pixels in [0, 1].
        step_size: length of one step of PGD, in `norm`, pixels in [0, 1].
        norm: of the ball.
    """

    epsilon: float
    step_size: float
    norm: Norm = "linf"


def threats(evaluation: Evaluation, trained: Threat) -> tuple[Threat, ...]:
    """The threat models of an evaluation, the primary one first.

    Args:
        evaluation: gives norm, epsilons and step size, where they are not null.
        trained: the L-infinity threat model that is trained against.
    """
    default = {
        "linf": trained,
        "l2": Threat(evaluation.l2_epsilon, evaluation.l2_step_size, "l2"),
        "l1": Threat(evaluation.l1_epsilon, evaluation.l1_step_size, "l1"),
    }[evaluation.norm]
    epsilons = evaluation.epsilon or (default.epsilon,)
    reference = default if evaluation.step_size is None else Threat(epsilons[0], evaluation.step_size, evaluation.norm)
    return tuple(
        reference
        if epsilon == reference.epsilon  # exactly: a quotient would be rounded
        else Threat(epsilon, reference.step_size * epsilon / reference.epsilon, evaluation.norm)
        for epsilon in dict.fromkeys(epsilons)
    )
