"""Suites of attacks by name: their columns, cost and runner. Imports no torch.

A *column* is one attack at one strength. A *suite* is columns that are computed together, because they share gradients.
To add a suite: a function in a file of this folder, and an entry in `SUITES`. A *check* looks for one sign of gradient
masking. To add a check: a function in a file of this folder, and an entry in `CHECK_FUNCTIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dwf_cluster.data.registry import CORRUPTIONS
from dwf_cluster.evaluation.check_cost import check_cost
from dwf_cluster.evaluation.column import (
    CURVES,
    EXPERT_SUITE,
    curve_columns,
    curve_cost,
    in_ball,
    longest_pgd,
    paper_columns,
    titled,
)
from dwf_cluster.evaluation.column import Column as Column  # noqa: PLC0414 - part of this registry for its users
from dwf_cluster.evaluation.gate_cost import Parts, expert_cost, experts_cost, gate_cost, route_cost
from dwf_cluster.evaluation.settings import Evaluation, Norm, Threat

CHECKS = "checks"
"""The suite that looks for gradient masking; its rows are those of the `checks` table."""

PAPER = "paper"
"""The suite of the paper's table 3, which every model is measured by."""

TRANSFER = "transfer"
"""Not a suite: the `paper` suite tests its longest PGD's images on all other models too."""

ROUTE = "pgd_route"
"""The suite of the attack on expert and routing, which every model that selects one expert is measured by."""

CORRUPTION = "corruption_"
"""The attack of a corruption's column is this and its name; `steps` is the severity, 1 to 5."""

AUTOATTACK = "autoattack"
"""The suite of AutoAttack, which models of the paper's width are measured by."""

AUTOATTACK_EXAMPLES = 1000
"""Test images of `autoattack` where neither `evaluation.beyond` nor `evaluation.autoattack_examples` asks for it."""

WORST_CASE = "worst_case"
"""Not a suite: for each image, the worst case over the model's attacks (`evaluation.worst_case`)."""


@dataclass(frozen=True)
class Suite:
    """Columns that are computed together.

    Attributes:
        run: `module:function` of an `evaluation.run.Batch`; yields an `evaluation.run.Attacked` for each column. That
            of `checks` is a function of its own kind: see `evaluation.run.check`.
        columns: of (settings, threat model), the columns, strengths and iterations rising. Empty, as of `experts`: its
            columns have names of experts and tables of their own, and are run under the primary threat model.
        cost: of (settings, parts of the model), forward passes for one image that no attack fools: of one network,
            divided by the number of networks; a gradient counts as 2.
        needs_gate: whether it attacks `experts` and `gate` of a model, so that only models with a gate are measured.
        classes: the fewest classes that it is defined for.
        norms: that its columns can have.
        own_threat: whether it is measured in a ball of its own (`l2_epsilon`), whatever the threat model.
        examples: of the settings, how many test images it is measured on, the first ones; None: all.
    """

    run: str
    columns: Callable[[Evaluation, Threat], list[Column]]
    cost: Callable[[Evaluation, Parts], float]
    needs_gate: bool = False
    classes: int = 2
    norms: tuple[Norm, ...] = ("linf",)
    own_threat: bool = False
    examples: Callable[[Evaluation], int | None] = lambda evaluation: None


def _paper_cost(e: Evaluation, parts: Parts) -> float:
    run = 2 * max(longest_pgd(e), e.restart_steps, e.adaptive_steps if e.eot == 1 else 0)
    eot_run = 2 * e.eot * e.adaptive_steps if e.eot > 1 else 0
    return run + len(e.fgsm_epsilons) + 2 * (e.restarts - 1) * e.restart_steps + eot_run + 1


def _autoattack_examples(e: Evaluation) -> int | None:
    return e.autoattack_examples or (None if AUTOATTACK in e.beyond else AUTOATTACK_EXAMPLES)


_SUITES = "dwf_cluster.evaluation.suites"
_ANY: tuple[Norm, ...] = ("linf", "l2", "l1")

SUITES: Mapping[str, Suite] = {
    PAPER: Suite(f"{_SUITES}:paper", paper_columns, _paper_cost, norms=_ANY),
    "pgd_gate": Suite(
        f"{_SUITES}:pgd_gate",
        lambda e, threat: [in_ball("pgd_gate", threat, e.adaptive_steps)],
        gate_cost,
        needs_gate=True,
        norms=_ANY,
    ),
    "pgd_expert": Suite(
        f"{_SUITES}:pgd_expert",
        lambda e, threat: [in_ball("pgd_expert", threat, e.adaptive_steps)],
        expert_cost,
        needs_gate=True,
        norms=_ANY,
    ),
    ROUTE: Suite(
        f"{_SUITES}:pgd_route",
        lambda e, threat: [in_ball(ROUTE, threat, e.adaptive_steps)],
        route_cost,
        needs_gate=True,
        norms=_ANY,
    ),
    "pgd_momentum": Suite(
        f"{_SUITES}:pgd_variant",
        lambda e, threat: [in_ball("pgd_momentum", threat, longest_pgd(e))],
        lambda e, parts: 2 * longest_pgd(e) + 1,
        norms=_ANY,
    ),
    "pgd_cw": Suite(
        f"{_SUITES}:pgd_variant",
        lambda e, threat: [in_ball("pgd_cw", threat, longest_pgd(e))],
        lambda e, parts: 2 * longest_pgd(e) + 1,
        norms=_ANY,
    ),
    "pgd_l2": Suite(
        f"{_SUITES}:pgd_variant",
        lambda e, threat: [Column("pgd_l2", None, e.l2_epsilon, e.l2_step_size, longest_pgd(e), norm="l2")],
        lambda e, parts: 2 * longest_pgd(e) + 1,
        norms=("l2",),
        own_threat=True,
    ),
    "pgd_l1": Suite(
        f"{_SUITES}:pgd_variant",
        lambda e, threat: [Column("pgd_l1", None, e.l1_epsilon, e.l1_step_size, longest_pgd(e), norm="l1")],
        lambda e, parts: 2 * longest_pgd(e) + 1,
        norms=("l1",),
        own_threat=True,
    ),
    "pgd_targeted": Suite(
        f"{_SUITES}:pgd_targeted",
        lambda e, threat: [in_ball("pgd_targeted", threat, longest_pgd(e))],
        lambda e, parts: 2 * longest_pgd(e) * e.targets + 1,
        norms=_ANY,
    ),
    "apgd": Suite(
        f"{_SUITES}:auto_pgd",
        lambda e, threat: [Column("apgd", epsilon=threat.epsilon, steps=e.apgd_steps, norm=threat.norm)],
        lambda e, parts: 2 * e.apgd_steps + 1,
        norms=("linf", "l2"),  # its algorithm for L1 is another one (Croce and Hein 2021)
    ),
    "apgd_l2": Suite(
        f"{_SUITES}:auto_pgd",
        lambda e, threat: [Column("apgd_l2", epsilon=e.l2_epsilon, steps=e.apgd_steps, norm="l2")],
        lambda e, parts: 2 * e.apgd_steps + 1,
        norms=("l2",),
        own_threat=True,
    ),
    "square": Suite(
        f"{_SUITES}:square",
        lambda e, threat: [Column("square", epsilon=threat.epsilon, steps=e.square_queries)],
        lambda e, parts: e.square_queries,
    ),
    AUTOATTACK: Suite(
        f"{_SUITES}:autoattack",
        lambda e, threat: [Column(AUTOATTACK, epsilon=threat.epsilon)],
        # APGD on one loss and nine targets, FAB on nine, Square.
        lambda e, parts: 2 * 1900 + 900 + 5000,
        classes=4,  # that its targeted difference of logits ratio is defined for
        examples=_autoattack_examples,
    ),
    "noise": Suite(
        f"{_SUITES}:noise",
        lambda e, threat: [Column("noise", epsilon=threat.epsilon, norm=threat.norm)],
        lambda e, parts: 1,
        norms=_ANY,
    ),
    CURVES: Suite(
        "dwf_cluster.evaluation.curves:curves",
        curve_columns,
        lambda e, parts: curve_cost(e),
        norms=_ANY,
        examples=lambda e: e.curve_examples,
    ),
    EXPERT_SUITE: Suite(
        "dwf_cluster.evaluation.experts:experts",
        lambda e, threat: [],
        experts_cost,
        needs_gate=True,
        norms=_ANY,
    ),
    "corruptions": Suite(
        "dwf_cluster.evaluation.corruptions:corruptions",
        lambda e, threat: [
            Column(CORRUPTION + name, steps=severity, norm=None)
            for name in CORRUPTIONS
            for severity in sorted(set(e.corruption_severities))
        ],
        # The weights of the gate are recorded in every column.
        lambda e, parts: len(CORRUPTIONS) * len(set(e.corruption_severities)) * (1 + parts.gate / parts.networks),
        norms=_ANY,
    ),
    CHECKS: Suite(
        "dwf_cluster.evaluation.run:check",
        lambda e, threat: [],
        lambda e, parts: check_cost(e),
        norms=_ANY,
        examples=lambda e: e.check_examples,
    ),
}
"""Suites by name, in the order of the result table."""


_OUTPUTS, _ATTACKS = "dwf_cluster.evaluation.masking", "dwf_cluster.evaluation.attack_checks"

CHECK_FUNCTIONS: Mapping[str, str] = {
    "nan": f"{_OUTPUTS}:nan",
    "probabilities": f"{_OUTPUTS}:probabilities",
    "random": f"{_OUTPUTS}:random",
    "train_mode": f"{_OUTPUTS}:train_mode",
    "zero_gradients": f"{_OUTPUTS}:zero_gradients",
    "one_step": f"{_ATTACKS}:one_step",
    "more_steps": f"{_ATTACKS}:more_steps",
    "converged": f"{_ATTACKS}:converged",
    "restarts": f"{_ATTACKS}:restarts",
    "scale_free": f"{_ATTACKS}:scale_free",
    "perturbation": f"{_OUTPUTS}:perturbation",
    "transfer": f"{_ATTACKS}:transfer",
    "black_box": f"{_ATTACKS}:black_box",
    "huge_epsilon": f"{_ATTACKS}:huge_epsilon",
}
"""`module:function` of each check by name, in the order in which they run: the random draws of `restarts` and of
`black_box` come from the same generators. A function takes an `evaluation.inspection.Inspection` and yields
`evaluation.significance.Check`. The check `stronger` reads the predictions of all columns: `evaluation.stronger`."""


def extra_names() -> tuple[str, ...]:
    """Names that `evaluation.beyond` accepts: every suite that is not always measured, and `TRANSFER`."""
    return (*(name for name in SUITES if name not in (PAPER, CHECKS)), TRANSFER)


def suites_of_norm(norm: Norm) -> tuple[str, ...]:
    """Names that `evaluation.beyond` accepts under threat models of a norm."""
    return tuple(n for n in extra_names() if n == TRANSFER or SUITES[n].own_threat or norm in SUITES[n].norms)


def suite_names(evaluation: Evaluation, has_gate: bool, default: Iterable[str] = ()) -> tuple[str, ...]:
    """Names of the suites that a model is measured by: the paper's, those of `evaluation.beyond`, the checks.

    Args:
        evaluation: the settings.
        has_gate: whether the model has a gate; others are not measured by suites that need one.
        default: suites that the model is measured by even if `evaluation.beyond` does not name them.
    """
    extra = dict.fromkeys(name for name in (*evaluation.beyond, *default) if name != TRANSFER)
    return (PAPER, *(name for name in extra if has_gate or not SUITES[name].needs_gate), CHECKS)


def columns(evaluation: Evaluation, threats: Sequence[Threat], suite: str) -> list[Column]:
    """The columns of a suite under each threat model, every column once; `transfer` has a table of its own."""
    return titled(column for threat in threats for column in SUITES[suite].columns(evaluation, threat))


def all_columns(evaluation: Evaluation, threats: Sequence[Threat], suites: Iterable[str]) -> list[Column]:
    """The columns of these suites, in the order of the result table, without the curves; `worst_case` is the last."""
    listed = [c for suite in suites if suite != CURVES for c in columns(evaluation, threats, suite)]
    return titled([*listed, *map(worst_case_column, threats)])


def worst_case_column(threat: Threat) -> Column:
    """The column of the worst case over all attacks of a model that stay within a threat model."""
    return Column(WORST_CASE, epsilon=threat.epsilon, norm=threat.norm)


def threat_count(evaluation: Evaluation, threats: Sequence[Threat], suite: str) -> int:
    """Number of threat models that a suite attacks under: 1 if its columns do not follow the threat model."""
    listed = (tuple(SUITES[suite].columns(evaluation, threat)) for threat in threats)
    return max(1, len({columns for columns in listed if columns}))


def transfer_column(evaluation: Evaluation, threat: Threat, source: str) -> Column:
    """The column of PGD images, of the longest run, that were made on another model."""
    return Column(TRANSFER, source, threat.epsilon, threat.step_size, longest_pgd(evaluation), norm=threat.norm)
