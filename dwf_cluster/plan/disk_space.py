"""How much experiments store."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dwf_cluster.data.registry import Sizes
from dwf_cluster.defences.registry import METHODS
from dwf_cluster.evaluation.column import EXPERT_SUITE, expert_columns
from dwf_cluster.evaluation.registry import columns
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import STAGES, deduplicate, jobs
from dwf_cluster.store import checkpoints

_ROW_BYTES, _FILE_BYTES = 11, 5000
"""Measured sizes of a row of `predictions` without its gate, and of a file of a few rows."""


def stored_bytes(experiments: Sequence[Experiment], sizes: Sizes) -> tuple[float, float]:
    """Estimate what experiments store when they are done.

    Returns:
        Bytes of checkpoints (for each trained model the newest, and the one before with its momentum and best
        weights; models that experiments share count once), and bytes of tables and of adversarial images.
    """
    every = [job for experiment in experiments for stage in STAGES for job in jobs(experiment, stage, sizes)]
    in_checkpoints = in_tables = 0.0
    for job in deduplicate(every):
        experiment, spec = job.experiment, job.spec
        has_gate = METHODS[spec.method].has_gate
        in_tables += _FILE_BYTES * (1 + len(job.tables))
        if job.suite is not None:
            others = (len(experiment.models) - 1) * len(experiment.threats) if job.tests_transfer else 0
            listed = columns(experiment.evaluation, experiment.threats, job.suite)
            if job.suite == EXPERT_SUITE:
                listed = expert_columns(experiment.evaluation, experiment.threat, spec.experts)
            rows = (len(listed) + others) * (job.stop - job.first)
            in_tables += rows * (_ROW_BYTES + (4 * spec.networks if has_gate else 0))
            if job.keeps_images:
                images = (job.stop - job.first) * sum(c.source is None and c.norm is not None for c in listed)
                in_tables += images * math.prod(sizes.shape) * (4 if experiment.save_adversarial == "float" else 1)
        elif not job.copy_of:
            # The statistics of BatchNorm are a small part, and not counted.
            parameters = METHODS[spec.method].parameters(spec, sizes.shape)
            copies = 3 if spec.training.keep == "best" else 2  # in a checkpoint before the last epoch
            in_checkpoints += 4 * parameters * (1 + copies * (checkpoints.KEPT - 1))
    return in_checkpoints, in_tables
