"""`--slurm`: submit experiments to SLURM, follow their jobs, and read from the store whether they are done."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from dwf_cluster.cluster import sbatch
from dwf_cluster.data import sources
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan.jobs import pending, select


def run(
    experiments: Sequence[Experiment],
    storage: str,
    stages: Sequence[str],
    request: sbatch.SlurmOptions,
    arguments: Callable[[Experiment], tuple[str, ...]],
    again: str,
) -> int:
    """Submit the experiments that are neither done nor queued, follow all to their ends; returns the exit status.

    Args:
        experiments: each becomes one job.
        storage: URL below which each has its folder.
        stages: some of `experiment.STAGES`.
        request: what to ask SLURM for.
        arguments: what an experiment's job passes to `dwf_cluster.launch`.
        again: the command that follows the jobs again, for people.

    Raises:
        InvalidInput: if SLURM refuses a job.
    """
    stores = {experiment: experiment.store(storage) for experiment in experiments}
    sizes = sources.sizes(experiments[0].data)

    def is_done(experiment: Experiment) -> bool:
        return not select(pending(experiment, stores[experiment], sizes), stages)

    runs = {e: sbatch.SlurmJob(e.folder, arguments(e), again) for e in experiments if not is_done(e)}
    say = functools.partial(print, flush=True)
    jobs = sbatch.submit(list(runs.values()), request, say)
    if jobs:
        say(f"Ctrl-C stops following; the job continues. Follow it again: {again}")
    try:
        sbatch.follow(jobs, request, say)
    except KeyboardInterrupt:
        print(f"the job continues. Follow it again: {again}", file=sys.stderr)
        return 130
    failed = [experiment for experiment in runs if not is_done(experiment)]
    words = sbatch.sacct_states(jobs[runs[experiment]] for experiment in failed)
    for experiment in failed:
        job = jobs[runs[experiment]]
        word = words.get(job.job_id)
        print(
            f"failed: job {job.job_id} ended before all was done{f' ({word})' if word else ''}; "
            f"log: {job.paths.stdout}\nresume: {again}",
            file=sys.stderr,
        )
    for store in stores.values() if not failed else ():
        print(store.root)
    return 1 if failed else 0


def script(
    experiments: Sequence[Experiment],
    request: sbatch.SlurmOptions,
    arguments: Callable[[Experiment], tuple[str, ...]],
    again: str,
) -> str:
    """The batch script that `run` would submit if nothing were done; arguments as there."""
    return sbatch.script([sbatch.SlurmJob(e.folder, arguments(e), again) for e in experiments], request)
