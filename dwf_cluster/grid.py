"""The columns of the result table: which attacks, at which strengths. Needs neither torch nor ray."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dwf_cluster.experiment import MIXTURE, Experiment

CHECKS = "checks"
"""The family that looks for gradient masking; its rows are those of the `checks` table."""

CHECK_QUERIES = 300
"""Forward passes of the checks' black-box attack, for one image."""

AUTOATTACK_CLASSES = 4
"""The fewest classes that `autoattack`'s targeted difference of logits ratio is defined for."""


@dataclass(frozen=True)
class Column:
    """One column: the attack and its settings, null where one has no meaning.

    Attributes:
        attack: `clean`, `fgsm`, `pgd`, `pgd_restarts`, `pgd_adaptive`, or one of `evaluation.beyond`.
        source: for `transfer`, the model that the images were made on.
        epsilon, step_size: pixels in [0, 1]; Euclidean length for the attacks whose name ends in `_l2`.
        steps: iterations; queries for `square`.
        restarts, eot: counts.
    """

    attack: str
    source: str | None = None
    epsilon: float | None = None
    step_size: float | None = None
    steps: int | None = None
    restarts: int | None = None
    eot: int | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """As columns of the tables."""
        return asdict(self)

    @property
    def title(self) -> str:
        """Two short lines for a table's head."""
        below = {
            "fgsm": f"{self.epsilon:.3g}" if self.epsilon else "",
            "pgd_restarts": f"{self.steps}x{self.restarts}",
        }.get(self.attack, str(self.steps or ""))
        return f"{self.attack.removeprefix('pgd_')}\n{below}"


def families(experiment: Experiment, model: str) -> tuple[str, ...]:
    """What a model is evaluated by. Columns of a family are computed together, because they share gradients.

    `paper` is the paper's table 3, with `transfer` where that is asked for; `pgd_gate` and `pgd_expert` need a
    mixture; the last is `CHECKS`.
    """
    beyond = dict.fromkeys(name for name in experiment.evaluation.beyond if name != "transfer")
    return ("paper", *(f for f in beyond if model == MIXTURE or f not in ("pgd_gate", "pgd_expert")), CHECKS)


def columns(experiment: Experiment, family: str) -> list[Column]:
    """The columns of a family, strengths and iterations rising; `transfer` has a table of its own."""
    evaluation, pgd = experiment.evaluation, experiment.pgd
    most = max(evaluation.pgd_steps)

    def linf(attack: str, steps: int | None, **settings: int) -> Column:
        return Column(attack, None, pgd.epsilon, pgd.step_size, steps, **settings)

    if family == "paper":
        return [
            Column("clean"),
            *(Column("fgsm", epsilon=e) for e in sorted(set(evaluation.fgsm_epsilons))),
            *(linf("pgd", steps) for steps in sorted(set(evaluation.pgd_steps))),
            linf("pgd_restarts", evaluation.restart_steps, restarts=evaluation.restarts),
            linf("pgd_adaptive", evaluation.adaptive_steps, eot=evaluation.eot),
        ]
    beyond = {
        "pgd_gate": linf("pgd_gate", evaluation.adaptive_steps),
        "pgd_expert": linf("pgd_expert", evaluation.adaptive_steps),
        "pgd_momentum": linf("pgd_momentum", most),
        "pgd_cw": linf("pgd_cw", most),
        "pgd_l2": Column("pgd_l2", None, evaluation.l2_epsilon, evaluation.l2_step_size, most),
        "apgd": Column("apgd", epsilon=pgd.epsilon, steps=evaluation.apgd_steps),
        "apgd_l2": Column("apgd_l2", epsilon=evaluation.l2_epsilon, steps=evaluation.apgd_steps),
        "square": Column("square", epsilon=pgd.epsilon, steps=evaluation.square_queries),
        "autoattack": Column("autoattack", epsilon=pgd.epsilon),
        "noise": Column("noise", epsilon=pgd.epsilon),
    }
    return [beyond[family]] if family in beyond else []


def transfer(experiment: Experiment, source: str) -> Column:
    """The column of PGD images, of the longest run, that were made on another model."""
    pgd, steps = experiment.pgd, max(experiment.evaluation.pgd_steps)
    return Column("transfer", source, pgd.epsilon, pgd.step_size, steps)
