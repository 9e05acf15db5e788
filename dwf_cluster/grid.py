"""The columns of the result table: which attacks, at which strengths. Needs neither torch nor ray."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dwf_cluster.experiment import Experiment

FAMILIES = ("fgsm", "pgd", "pgd_restarts", "pgd_adaptive")
"""Columns that are computed together, because they share gradients; `fgsm` includes `clean`."""


@dataclass(frozen=True)
class Column:
    """One column: the attack and its settings, null where one has no meaning.

    Attributes:
        attack: `clean`, `fgsm`, `pgd`, `pgd_restarts` or `pgd_adaptive`.
        epsilon, step_size: pixels in [0, 1].
        steps, restarts, eot: counts.
    """

    attack: str
    epsilon: float | None = None
    step_size: float | None = None
    steps: int | None = None
    restarts: int | None = None
    eot: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """As columns of the `evaluations` table."""
        return asdict(self)

    @property
    def title(self) -> str:
        """Two short lines for a table's head."""
        below = {
            "clean": "",
            "fgsm": f"{self.epsilon:.3g}" if self.epsilon else "",
            "pgd_restarts": f"{self.steps}x{self.restarts}",
        }.get(self.attack, str(self.steps))
        above = {"pgd_restarts": "restarts", "pgd_adaptive": "adaptive"}.get(self.attack, self.attack)
        return f"{above}\n{below}"


def columns(experiment: Experiment, family: str) -> list[Column]:
    """The columns of one of `FAMILIES`, strengths and iterations rising."""
    evaluation, pgd = experiment.evaluation, experiment.pgd
    return {
        "fgsm": [Column("clean"), *(Column("fgsm", epsilon=e) for e in sorted(set(evaluation.fgsm_epsilons)))],
        "pgd": [Column("pgd", pgd.epsilon, pgd.step_size, steps) for steps in sorted(set(evaluation.pgd_steps))],
        "pgd_restarts": [
            Column("pgd_restarts", pgd.epsilon, pgd.step_size, evaluation.restart_steps, evaluation.restarts)
        ],
        "pgd_adaptive": [
            Column("pgd_adaptive", pgd.epsilon, pgd.step_size, evaluation.adaptive_steps, eot=evaluation.eot)
        ],
    }[family]
