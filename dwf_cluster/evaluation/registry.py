"""Suites of attacks by name: their columns, cost and runner; and the settings that choose them. Imports no torch.

A *column* is one attack at one strength. A *suite* is columns that are computed together, because they share gradients.
To add a suite: a function in a file of this folder, and an entry in `SUITES`. A *check* looks for one sign of gradient
masking. To add a check: a function in a file of this folder, and an entry in `CHECK_FUNCTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from dwf_cluster.settings import Count, Counts, OneOf, Settings, Strengths, as_tuple

Norm = Literal["linf", "l2"]

CHECKS = "checks"
"""The suite that looks for gradient masking; its rows are those of the `checks` table."""

PAPER = "paper"
"""The suite of the paper's table 3, which every model is measured by."""

TRANSFER = "transfer"
"""Not a suite: the `paper` suite tests its longest PGD's images on all other models too."""

CHECK_QUERIES = 300
"""Forward passes of the checks' black-box attack, for one image."""


class Evaluation(Settings):
    """The columns of the result table."""

    fgsm_epsilons: Strengths = (0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09)
    """FGSM columns, pixels in [0, 1]."""
    pgd_steps: Counts = (10, 20, 30, 40, 50)
    """PGD columns, iterations, at the bound and step size of `pgd`."""
    restarts: Count = 3
    """Starts of the `pgd_restarts` column, the image itself and then random points of the ball; an image counts as
    correct if it resists every iterate of each."""
    restart_steps: Count = 100
    """Iterations from each start."""
    adaptive_steps: Count = 100
    """Iterations of `pgd_adaptive`, through experts, gate and routing weights; of `pgd_gate` and `pgd_expert`."""
    eot: Count = 1
    """Gradients averaged in each adaptive iteration (expectation over transformation)."""
    beyond: Annotated[
        tuple[Annotated[str, OneOf(lambda: extra_names())], ...],  # noqa: PLW0108, declared below
        BeforeValidator(as_tuple),
    ] = ("pgd_gate", "pgd_expert")
    """Columns beside the paper's: `pgd_gate` aims at the mixture's gate, `pgd_expert` at its experts one by one;
    `pgd_momentum`; `pgd_cw` (Carlini-Wagner loss); `pgd_l2`; `apgd`, `apgd_l2`; `square` (black box);
    `autoattack` (its authors' standard set); `transfer` (made on one model, tested on each other); `noise` (random
    signs, the floor of every attack)."""
    l2_epsilon: Annotated[float, Field(gt=0, le=1000)] = 0.5
    """Radius of the L2 ball, Euclidean length over an image's pixels in [0, 1]."""
    l2_step_size: Annotated[float, Field(gt=0, le=1000)] = 0.1
    """Length of one step of `pgd_l2`."""
    apgd_steps: Count = 100
    """Iterations of `apgd` and `apgd_l2`."""
    square_queries: Count = 5000
    """Forward passes of `square`."""
    check_examples: Count = 128
    """First test images that each model is checked for gradient masking on."""
    shard_examples: Count | None = None
    """Test images of one evaluation task, rounded up to whole batches; null takes as many as keep a CPU core busy
    for minutes."""
    batch_size: Count = 512
    """Images attacked at once."""
    probe_examples: Count = 256
    """Test images of the small PGD probe that follows every epoch of training."""
    probe_steps: Count = 10
    """Iterations of the probe."""


@dataclass(frozen=True)
class Threat:
    """The L-infinity threat model that a model is evaluated under.

    Attributes:
        epsilon: radius of the ball, pixels in [0, 1].
        step_size: length of one step of PGD, pixels in [0, 1].
    """

    epsilon: float
    step_size: float


@dataclass(frozen=True)
class Column:
    """One attack at one strength; null where a setting has no meaning.

    Attributes:
        attack: `clean`, `fgsm`, `pgd`, `pgd_restarts`, `pgd_adaptive`, or one of `evaluation.beyond`.
        source: for `transfer`, the model that the images were made on.
        epsilon, step_size: radius of the ball and length of one step, in `norm`, pixels in [0, 1].
        steps: iterations; queries for `square`.
        restarts, eot: counts.
        norm: of the ball: the largest change of a value, or the Euclidean length.
    """

    attack: str
    source: str | None = None
    epsilon: float | None = None
    step_size: float | None = None
    steps: int | None = None
    restarts: int | None = None
    eot: int | None = None
    norm: Norm = "linf"

    @property
    def settings(self) -> dict[str, Any]:
        """As columns of the tables."""
        names = ("attack", "source", "epsilon", "step_size", "steps", "restarts", "eot")
        return {name: getattr(self, name) for name in names}

    @property
    def title(self) -> str:
        """Two short lines for a table's head."""
        below = {
            "fgsm": f"{self.epsilon:.3g}" if self.epsilon else "",
            "pgd_restarts": f"{self.steps}x{self.restarts}",
        }.get(self.attack, str(self.steps or ""))
        return f"{self.attack.removeprefix('pgd_')}\n{below}"


@dataclass(frozen=True)
class Suite:
    """Columns that are computed together.

    Attributes:
        run: `module:function` of an `evaluation.run.Batch`; yields an `evaluation.run.Attacked` for each column. That
            of `checks` is a function of its own kind: see `evaluation.run.check`.
        columns: of (settings, threat model), the columns, strengths and iterations rising.
        cost: of (settings, number of networks of the model), forward passes of one network for one image that no
            attack fools; a gradient counts as 2.
        needs_gate: whether it attacks `experts` and `gate` of a model, so that only models with a gate are measured.
        classes: the fewest classes that it is defined for.
        norm: of all its columns.
    """

    run: str
    columns: Callable[[Evaluation, Threat], list[Column]]
    cost: Callable[[Evaluation, int], float]
    needs_gate: bool = False
    classes: int = 2
    norm: Norm = "linf"


def _linf(
    attack: str, threat: Threat, steps: int | None, restarts: int | None = None, eot: int | None = None
) -> Column:
    return Column(attack, None, threat.epsilon, threat.step_size, steps, restarts, eot)


def _paper_columns(evaluation: Evaluation, threat: Threat) -> list[Column]:
    return [
        Column("clean"),
        *(Column("fgsm", epsilon=e) for e in sorted(set(evaluation.fgsm_epsilons))),
        *(_linf("pgd", threat, steps) for steps in sorted(set(evaluation.pgd_steps))),
        _linf("pgd_restarts", threat, evaluation.restart_steps, restarts=evaluation.restarts),
        _linf("pgd_adaptive", threat, evaluation.adaptive_steps, eot=evaluation.eot),
    ]


def _paper_cost(e: Evaluation, networks: int) -> float:
    run = 2 * max(longest_pgd(e), e.restart_steps, e.adaptive_steps if e.eot == 1 else 0)
    eot_run = 2 * e.eot * e.adaptive_steps if e.eot > 1 else 0
    return run + len(e.fgsm_epsilons) + 2 * (e.restarts - 1) * e.restart_steps + eot_run + 1


_SUITES = "dwf_cluster.evaluation.suites"

SUITES: Mapping[str, Suite] = {
    PAPER: Suite(f"{_SUITES}:paper", _paper_columns, _paper_cost),
    "pgd_gate": Suite(
        f"{_SUITES}:pgd_gate",
        lambda e, threat: [_linf("pgd_gate", threat, e.adaptive_steps)],
        lambda e, networks: 2 * e.adaptive_steps + 1,
        needs_gate=True,
    ),
    "pgd_expert": Suite(
        f"{_SUITES}:pgd_expert",
        lambda e, threat: [_linf("pgd_expert", threat, e.adaptive_steps)],
        lambda e, networks: 2 * e.adaptive_steps + networks,
        needs_gate=True,
    ),
    "pgd_momentum": Suite(
        f"{_SUITES}:pgd_variant",
        lambda e, threat: [_linf("pgd_momentum", threat, longest_pgd(e))],
        lambda e, networks: 2 * longest_pgd(e) + 1,
    ),
    "pgd_cw": Suite(
        f"{_SUITES}:pgd_variant",
        lambda e, threat: [_linf("pgd_cw", threat, longest_pgd(e))],
        lambda e, networks: 2 * longest_pgd(e) + 1,
    ),
    "pgd_l2": Suite(
        f"{_SUITES}:pgd_variant",
        lambda e, threat: [Column("pgd_l2", None, e.l2_epsilon, e.l2_step_size, longest_pgd(e), norm="l2")],
        lambda e, networks: 2 * longest_pgd(e) + 1,
        norm="l2",
    ),
    "apgd": Suite(
        f"{_SUITES}:auto_pgd",
        lambda e, threat: [Column("apgd", epsilon=threat.epsilon, steps=e.apgd_steps)],
        lambda e, networks: 2 * e.apgd_steps + 1,
    ),
    "apgd_l2": Suite(
        f"{_SUITES}:auto_pgd",
        lambda e, threat: [Column("apgd_l2", epsilon=e.l2_epsilon, steps=e.apgd_steps, norm="l2")],
        lambda e, networks: 2 * e.apgd_steps + 1,
        norm="l2",
    ),
    "square": Suite(
        f"{_SUITES}:square",
        lambda e, threat: [Column("square", epsilon=threat.epsilon, steps=e.square_queries)],
        lambda e, networks: e.square_queries,
    ),
    "autoattack": Suite(
        f"{_SUITES}:autoattack",
        lambda e, threat: [Column("autoattack", epsilon=threat.epsilon)],
        # APGD on one loss and nine targets, FAB on nine, Square.
        lambda e, networks: 2 * 1900 + 900 + 5000,
        classes=4,  # that its targeted difference of logits ratio is defined for
    ),
    "noise": Suite(
        f"{_SUITES}:noise",
        lambda e, threat: [Column("noise", epsilon=threat.epsilon)],
        lambda e, networks: 1,
    ),
    CHECKS: Suite(
        "dwf_cluster.evaluation.run:check",
        lambda e, threat: [],
        lambda e, networks: 2 * 7 * e.probe_steps + CHECK_QUERIES,
    ),
}
"""Suites by name, in the order of the result table."""


_MASKING = "dwf_cluster.evaluation.masking"

CHECK_FUNCTIONS: Mapping[str, str] = {
    "nan": f"{_MASKING}:nan",
    "probabilities": f"{_MASKING}:probabilities",
    "random": f"{_MASKING}:random",
    "train_mode": f"{_MASKING}:train_mode",
    "zero_gradients": f"{_MASKING}:zero_gradients",
    "one_step": f"{_MASKING}:one_step",
    "more_steps": f"{_MASKING}:more_steps",
    "restarts": f"{_MASKING}:restarts",
    "perturbation": f"{_MASKING}:perturbation",
    "black_box": f"{_MASKING}:black_box",
    "huge_epsilon": f"{_MASKING}:huge_epsilon",
}
"""`module:function` of each check by name, in the order in which they run: the random draws of `restarts` and of
`black_box` come from the same generators. A function takes an `evaluation.masking.Inspection` and yields
`evaluation.masking.Check`."""


def extra_names() -> tuple[str, ...]:
    """Names that `evaluation.beyond` accepts: every suite that is not always measured, and `TRANSFER`."""
    return (*(name for name in SUITES if name not in (PAPER, CHECKS)), TRANSFER)


def longest_pgd(evaluation: Evaluation) -> int:
    """Iterations of the longest of the PGD columns."""
    return max(evaluation.pgd_steps)


def suite_names(evaluation: Evaluation, has_gate: bool) -> tuple[str, ...]:
    """Names of the suites that a model is measured by: the paper's, those of `evaluation.beyond`, the checks.

    Args:
        evaluation: the settings.
        has_gate: whether the model has a gate; others are not measured by suites that need one.
    """
    extra = dict.fromkeys(name for name in evaluation.beyond if name != TRANSFER)
    return (PAPER, *(name for name in extra if has_gate or not SUITES[name].needs_gate), CHECKS)


def columns(evaluation: Evaluation, threat: Threat, suite: str) -> list[Column]:
    """The columns of a suite; `transfer` has a table of its own."""
    return SUITES[suite].columns(evaluation, threat)


def all_columns(evaluation: Evaluation, threat: Threat, has_gate: bool = True) -> list[Column]:
    """The columns of every suite that a model is measured by, in the order of the result table."""
    names = suite_names(evaluation, has_gate)
    return [column for name in names for column in columns(evaluation, threat, name)]


def transfer_column(evaluation: Evaluation, threat: Threat, source: str) -> Column:
    """The column of PGD images, of the longest run, that were made on another model."""
    return Column(TRANSFER, source, threat.epsilon, threat.step_size, longest_pgd(evaluation))
