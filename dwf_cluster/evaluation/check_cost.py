"""What the checks for gradient masking cost, in forward passes of one image. Imports no torch."""

from __future__ import annotations

from dwf_cluster.evaluation.settings import Evaluation

MIN_QUERIES, MAX_QUERIES = 300, 5000
"""Smallest and largest number of queries of the checks' black-box attack, for one image."""

CIFAR10_VALUES = 3 * 32 * 32
"""Values of an image of CIFAR-10, which AutoAttack gives 5,000 queries."""


def check_queries(values: int) -> int:
    """Forward passes of the checks' black-box attack for one image: 5,000 for CIFAR-10, in proportion for others.

    Args:
        values: of an image: channels x height x width.

    Returns:
        At least 300, at most 5,000: AutoAttack gives images of any size 5,000.
    """
    return min(MAX_QUERIES, max(MIN_QUERIES, MAX_QUERIES * values // CIFAR10_VALUES))


def check_cost(evaluation: Evaluation, values: int = CIFAR10_VALUES) -> float:
    """Forward passes of the checks for one image that no attack fools, without those of `transfer`.

    Args:
        evaluation: the settings.
        values: of an image: channels x height x width; by default CIFAR-10's.
    """
    runs = 4 + 4 + 4 + 2  # the long run, a restart, the margin's run, the huge epsilon; of `probe_steps` each
    return 2 * runs * evaluation.probe_steps + check_queries(values)


def check_transfer_cost(evaluation: Evaluation) -> float:
    """Forward passes of the check `transfer` for one image and each network that images are made on."""
    return 2 * evaluation.probe_steps
