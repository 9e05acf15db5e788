"""The column `worst_case`: for each test image the worst case over the attacks of a model. No attack is run for it.

An image counts as correct only if the model classifies it correctly under every attack that stays within the threat
model: on the clean image, and under each attack of the same norm whose epsilon is at most the threat model's, images
of other models (`transfer`) and `noise` included. Suites that measure a curve or a mixture's experts do not count, nor
do common corruptions. An attack that was run on a part of the test set counts for the images of that part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dwf_cluster.evaluation.column import EXPERT
from dwf_cluster.evaluation.registry import WORST_CASE, worst_case_column
from dwf_cluster.evaluation.settings import Threat

NOT_COUNTED = ("curve", "corruption", EXPERT, WORST_CASE)
"""How the names of the attacks begin that are no part of the worst case."""

CLEAN = "clean"


@dataclass(frozen=True)
class WorstCaseFile:
    """A file of `evaluations`, and of `predictions`, with the worst case of a model.

    Attributes:
        model: name of the model.
        threats: the threat models; each has a column.
        shards: the files of `shards` and of `predictions` that hold the model's attacks, in the order of the result
            table. They may have rows of other models too.
    """

    model: str
    threats: tuple[Threat, ...] = ()
    shards: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """Its name, without `.parquet`."""
        return f"evaluate-{self.model}-{WORST_CASE}"

    @property
    def check_file(self) -> str:
        """The file of `checks` that is written with it."""
        return f"evaluate-{self.model}-stronger"


def worst_cases(predictions: pa.Table, model: str, threats: Iterable[Threat]) -> pa.Table:
    """The worst case of a model for each threat model and image, as rows of `predictions`.

    A row has prediction, margin, confidence and gate of the first attack that fools the model; if none does, of the
    attack that leaves the smallest margin.

    Args:
        predictions: rows of the table `predictions`, the attacks in the order of the result table; rows of other
            models are ignored.
        model: name of the model.
        threats: the threat models.

    Returns:
        One row for each threat model and image, images in rising order. A threat model that no attack counts for has
        no rows.
    """
    own = predictions.filter(pc.equal(predictions["model"], model))
    return pa.concat_tables([predictions.slice(0, 0), *(_worst_case(own, threat) for threat in threats)])


def largest_perturbation(shards: pa.Table, model: str, threat: Threat) -> float:
    """The largest distance from the clean image over the attacks that count, in the norm of the threat model.

    Args:
        shards: rows of the table `shards`; rows of other models are ignored.
        model: name of the model.
        threat: the threat model.
    """
    own = shards.filter(pc.and_(pc.equal(shards["model"], model), counts(shards, threat)))
    return float(pc.max(own["perturbation"]).as_py() or 0.0)


def _worst_case(rows: pa.Table, threat: Threat) -> pa.Table:
    rows = rows.filter(counts(rows, threat))
    example, margin = rows["example"].to_numpy(), rows["margin"].to_numpy()
    fooled = rows["prediction"].to_numpy() != rows["label"].to_numpy()
    # Of an image's rows, those that fool the model first, in their order; then the others by their margin.
    order = np.lexsort((np.where(fooled, -np.inf, margin), ~fooled, example))
    _, first = np.unique(example[order], return_index=True)
    worst = rows.take(pa.array(order[first]))
    column = worst_case_column(threat).settings
    for name in set(column) & set(worst.column_names):
        field = worst.schema.field(name)
        values = pa.repeat(pa.scalar(column[name], field.type), len(worst))
        worst = worst.set_column(worst.schema.get_field_index(name), field, values)
    return worst


def counts(rows: pa.Table, threat: Threat) -> pa.Array:
    """Which rows are of attacks that count for a threat model."""
    excluded = _any([pc.starts_with(rows["attack"], name) for name in NOT_COUNTED])
    within = pc.and_(pc.equal(rows["norm"], threat.norm), pc.less_equal(rows["epsilon"], threat.epsilon))
    counts = pc.or_(pc.equal(rows["attack"], CLEAN), pc.fill_null(within, False))
    return pc.and_(counts, pc.invert(excluded))


def _any(conditions: Sequence[pa.Array]) -> pa.Array:
    first, *others = conditions
    for condition in others:
        first = pc.or_(first, condition)
    return first
