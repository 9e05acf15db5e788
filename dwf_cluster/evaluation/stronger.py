"""The check `stronger`: attacks of the result table that fool images which resist PGD with restarts.

It reads the predictions of a model's columns, so it is computed where the worst case is: when all of them exist.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dwf_cluster.evaluation.settings import Threat
from dwf_cluster.evaluation.significance import WIDE_TOLERANCE, beyond
from dwf_cluster.evaluation.worst_case import counts

CHECK = "stronger"
REFERENCE = "pgd_restarts"


def stronger(predictions: pa.Table, model: str, threat: Threat) -> list[dict[str, Any]]:
    """Test whether the other attacks within a threat model together fool images that resist PGD with restarts.

    An attack that was run on fewer images than the restarts cuts the test to the images that every attack was run on.

    Args:
        predictions: rows of the table `predictions`, of all attacks; rows of other models are ignored.
        model: name of the model.
        threat: the threat model.

    Returns:
        A row of the table `checks`; none if there is no PGD with restarts, or nothing beside it.
    """
    own = predictions.filter(pc.equal(predictions["model"], model))
    key = ["attack", "epsilon", "source", "steps"]
    rows = own.filter(counts(own, threat)).select([*key, "example", "label", "prediction"]).to_pandas()
    rows["resists"] = rows.label == rows.prediction
    rows["column"] = rows.groupby(key, dropna=False, sort=False).ngroup()
    table = rows.pivot(index="example", columns="column", values="resists").dropna().astype(bool)
    attacks = rows.drop_duplicates("column").set_index("column")
    reference = attacks.index[(attacks.attack == REFERENCE) & np.isclose(attacks.epsilon, threat.epsilon)]
    others = table.drop(columns=reference)
    if len(reference) != 1 or others.empty:
        return []
    left = table[reference[0]]
    fooled = (~others).loc[left].sum()
    strongest = attacks.attack[fooled.idxmax()]
    both = left & others.all(axis=1)
    meaning = (
        f"PGD with restarts leaves {left.mean():.1%}, it and all other attacks of the table {both.mean():.1%}; "
        f"the strongest beside it is {strongest}"
    )
    check = beyond(CHECK, left.to_numpy(), ~both.to_numpy(), meaning, WIDE_TOLERANCE)
    return [check.row(model, len(left))]
