"""`--slurm`: hand experiments to SLURM, look on, and judge by the store what has come of them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

from dwf_cluster.cluster import slurm
from dwf_cluster.data import sources
from dwf_cluster.experiment import Experiment
from dwf_cluster.plan import select, unfinished
from dwf_cluster.store import Store


def run(
    experiments: Sequence[Experiment],
    storage: str,
    stages: Sequence[str],
    request: slurm.Request,
    arguments: Callable[[Experiment], tuple[str, ...]],
    again: str,
) -> int:
    """Submit what is not done and not in the queue yet, follow it to its end; returns the exit status.

    Args:
        experiments: one job each.
        storage: URL below which each has its folder.
        stages: some of `experiment.STAGES`.
        request: what to ask SLURM for.
        arguments: what an experiment's job passes to `dwf_cluster.launch`.
        again: the command that comes back, for people.

    Raises:
        InvalidInput: if SLURM does not take it.
    """
    stores = {experiment: Store(storage, experiment.folder) for experiment in experiments}
    sizes = sources.sizes(experiments[0].data)

    def is_done(experiment: Experiment) -> bool:
        return not select(unfinished(experiment, stores[experiment], sizes), stages)

    runs = {e: slurm.Run(e.folder, arguments(e), again) for e in experiments if not is_done(e)}
    say = functools.partial(print, flush=True)
    jobs = slurm.submit(list(runs.values()), request, say)
    if jobs:
        say(f"Ctrl-C ends the looking on, not the job. Come back: {again}")
    try:
        slurm.follow(jobs, request, say)
    except KeyboardInterrupt:
        print(f"the job goes on. Come back: {again}", file=sys.stderr)
        return 130
    failed = [experiment for experiment in runs if not is_done(experiment)]
    for experiment in failed:
        job = jobs[runs[experiment]]
        word = slurm.last_word(job)
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
    request: slurm.Request,
    arguments: Callable[[Experiment], tuple[str, ...]],
    again: str,
) -> str:
    """The batch script that `run` would hand to sbatch if nothing were done; arguments as there."""
    return slurm.script([slurm.Run(e.folder, arguments(e), again) for e in experiments], request)
