"""A column of the result table, and the titles of the columns of one table. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dwf_cluster.evaluation.settings import Evaluation, Norm, Threat

CURVES = "curves"
"""The suite of accuracies over epsilon, steps and restarts. They are drawn; the result table does not have them."""

CURVE_STEPS = (1, 2, 5)
"""Iterations of `curve_steps`: these times the powers of ten, and `evaluation.curve_steps`."""


EXPERT_SUITE = "experts"
"""The suite of what a mixture's experts do; its columns are those of `expert_columns`."""

EXPERT = "expert_"
"""Attacks of the suite `experts` begin so. Their rows are about parts of a mixture, so no worst case of the mixture
counts them; `source` is an expert."""

EXPERT_CLEAN, EXPERT_PGD = f"{EXPERT}clean", f"{EXPERT}pgd"
"""The expert `source` alone: on clean images, and on the images of the mixture's PGD."""

EXPERT_TRANSFER = f"{EXPERT}transfer_"
"""Followed by an expert's name: that expert, on the images of PGD on the expert `source`."""

EXPERT_DROPPED_CLEAN, EXPERT_DROPPED_PGD = f"{EXPERT}dropped_clean", f"{EXPERT}dropped_pgd"
"""The mixture without the expert `source`: on clean images, and under PGD on what is left of the mixture."""


@dataclass(frozen=True)
class Column:
    """One attack at one strength; null where a setting has no meaning.

    Attributes:
        attack: `clean`, `fgsm`, `pgd`, `pgd_restarts`, `pgd_adaptive`, one of `evaluation.beyond`, `worst_case`, an
            attack of `experts` (`EXPERT`), or a curve: `curve_epsilon`, `curve_apgd`, `curve_steps`, `curve_restarts`.
        source: for `transfer`, the model that the images were made on; for attacks of `experts`, an expert.
        epsilon, step_size: radius of the ball and length of one step, in `norm`, pixels in [0, 1].
        steps: iterations; queries for `square`; for `curve_restarts`, the iterations of all starts together.
        restarts, eot: counts.
        norm: of the ball; None for clean images.
        mark: what `title` adds where a table has columns that differ in their ball only (`titled`); such as `@0.1`.
    """

    attack: str
    source: str | None = None
    epsilon: float | None = None
    step_size: float | None = None
    steps: int | None = None
    restarts: int | None = None
    eot: int | None = None
    norm: Norm | None = "linf"
    mark: str = field(default="", compare=False)

    @property
    def settings(self) -> dict[str, Any]:
        """As columns of the tables."""
        names = ("attack", "source", "norm", "epsilon", "step_size", "steps", "restarts", "eot")
        return {name: getattr(self, name) for name in names}

    @property
    def title(self) -> str:
        """Two short lines for a table's head."""
        below = {
            "fgsm": f"{self.epsilon:.3g}" if self.epsilon else "",
            "pgd_restarts": f"{self.steps}x{self.restarts}",
        }.get(self.attack, str(self.steps or ""))
        return f"{self.attack.removeprefix('pgd_')}\n{f'{below} {self.mark}'.strip()}"


def titled(columns: Iterable[Column]) -> list[Column]:
    """The columns of one table, each once; those that differ in their ball only have its epsilon in their titles.

    Epsilons have as many digits as tell them apart, and the norm if that differs too: `pgd`, `40 @0.1` and `40 @0.2`.
    """
    listed = [replace(column, mark="") for column in dict.fromkeys(columns)]
    balls: dict[str, set[tuple[str, float]]] = {}
    for column in listed:
        balls.setdefault(column.title, set()).add((column.norm or "", column.epsilon or 0.0))
    marks = {title: _marks(several) for title, several in balls.items() if len(several) > 1}
    return [
        replace(column, mark=marks[column.title][column.norm or "", column.epsilon or 0.0])
        if column.title in marks
        else column
        for column in listed
    ]


def _marks(balls: Collection[tuple[str, float]]) -> dict[tuple[str, float], str]:
    """A mark for each (norm, epsilon), all different."""
    has_norms = len({norm for norm, _ in balls}) > 1
    for digits in range(3, 18):
        marks = {(norm, e): f"@{f'{norm} ' if has_norms else ''}{e:.{digits}g}" for norm, e in balls}
        if len(set(marks.values())) == len(balls):
            break
    return marks


def in_ball(
    attack: str, threat: Threat, steps: int | None, restarts: int | None = None, eot: int | None = None
) -> Column:
    """A column of PGD under a threat model."""
    return Column(attack, None, threat.epsilon, threat.step_size, steps, restarts, eot, threat.norm)


def paper_columns(evaluation: Evaluation, threat: Threat) -> list[Column]:
    """The 17 columns of the paper's table 3. FGSM's are L-infinity under every threat model."""
    return [
        Column("clean", norm=None),
        *(Column("fgsm", epsilon=e) for e in sorted(set(evaluation.fgsm_epsilons))),
        *(in_ball("pgd", threat, steps) for steps in sorted(set(evaluation.pgd_steps))),
        in_ball("pgd_restarts", threat, evaluation.restart_steps, restarts=evaluation.restarts),
        in_ball("pgd_adaptive", threat, evaluation.adaptive_steps, eot=evaluation.eot),
    ]


def curve_columns(evaluation: Evaluation, threat: Threat) -> list[Column]:
    """Columns of the curves over epsilon (PGD, APGD), steps and restarts, each rising; of the primary threat model."""
    if evaluation.epsilon and threat.epsilon != evaluation.epsilon[0]:
        return []
    epsilons = sorted({threat.epsilon * multiple for multiple in evaluation.curve_multiples})
    if threat.norm == "linf":
        epsilons = [*(epsilon for epsilon in epsilons if epsilon < 1), 1.0]
    balls = [Threat(epsilon, threat.step_size * epsilon / threat.epsilon, threat.norm) for epsilon in epsilons]
    longest, restart_steps = evaluation.curve_steps, evaluation.restart_steps
    powers = (10**n for n in range(len(str(longest))))
    steps = {step for power in powers for first in CURVE_STEPS if (step := first * power) < longest}
    return [
        *(in_ball("curve_epsilon", ball, restart_steps) for ball in balls),
        *(
            Column("curve_apgd", epsilon=ball.epsilon, steps=evaluation.apgd_steps, norm=ball.norm)
            for ball in balls
            if ball.norm != "l1"  # APGD's algorithm for L1 is another one
        ),
        *(in_ball("curve_steps", threat, step) for step in sorted({*steps, longest})),
        *(
            in_ball("curve_restarts", threat, starts * restart_steps, restarts=starts)
            for starts in range(1, evaluation.curve_restarts + 1)
        ),
    ]


def curve_cost(evaluation: Evaluation) -> float:
    """Forward passes of the curves for one image that no attack fools, as `Suite.cost`."""
    balls = len(set(evaluation.curve_multiples)) + 1
    gradients = balls * (evaluation.restart_steps + evaluation.apgd_steps) + evaluation.curve_steps
    return 2.0 * (gradients + evaluation.curve_restarts * evaluation.restart_steps)


def longest_pgd(evaluation: Evaluation) -> int:
    """Iterations of the longest of the PGD columns."""
    return max(evaluation.pgd_steps)


def expert_columns(evaluation: Evaluation, threat: Threat, experts: Sequence[str]) -> list[Column]:
    """The columns of the suite `experts`: of the clean images and of PGD of the longest run.

    Args:
        evaluation, threat: the settings, and the primary threat model.
        experts: their names, in the order of the gate's outputs.
    """

    def under_pgd(attack: str, source: str) -> Column:
        return Column(attack, source, threat.epsilon, threat.step_size, longest_pgd(evaluation), norm=threat.norm)

    dropped = experts if len(experts) > 1 else ()
    return [
        *(Column(EXPERT_CLEAN, source=name, norm=None) for name in experts),
        *(under_pgd(EXPERT_PGD, name) for name in experts),
        *(under_pgd(EXPERT_TRANSFER + name, source) for source in experts for name in experts),
        *(Column(EXPERT_DROPPED_CLEAN, source=name, norm=None) for name in dropped),
        *(under_pgd(EXPERT_DROPPED_PGD, name) for name in dropped),
    ]
