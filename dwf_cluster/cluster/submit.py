"""`--slurm`: submit experiments to SLURM and follow their jobs. The store says whether an experiment is done."""

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
    resume_command: str,
) -> int:
    """Submit the experiments that are neither done nor queued, and follow all jobs; returns the exit status.

    Args:
        experiments: each becomes one job.
        storage: URL of the folder that contains the folder of each experiment.
        stages: to run, of `plan.jobs.STAGES`.
        request: options of the jobs.
        arguments: what an experiment's job passes to `dwf_cluster.launch`.
        resume_command: follows the jobs again; for people.

    Raises:
        InvalidInput: if SLURM refuses a job.
    """
    stores = {experiment: experiment.store(storage) for experiment in experiments}
    sizes = sources.sizes(experiments[0].data)

    def is_done(experiment: Experiment) -> bool:
        return not select(pending(experiment, stores[experiment], sizes), stages)

    jobs = {e: sbatch.SlurmJob(e.folder, arguments(e), resume_command) for e in experiments if not is_done(e)}
    print_line = functools.partial(print, flush=True)
    handles = sbatch.submit(list(jobs.values()), request, print_line)
    if handles:
        print_line(f"Ctrl-C stops following; the job continues. Follow it again: {resume_command}")
    try:
        sbatch.follow(handles, request, print_line)
    except KeyboardInterrupt:
        print(f"the job continues. Follow it again: {resume_command}", file=sys.stderr)
        return 130
    failed = [handles[job] for experiment, job in jobs.items() if not is_done(experiment)]
    states = sbatch.sacct_states(failed)
    for handle in failed:
        state = states.get(handle.job_id)
        print(
            f"failed: job {handle.job_id} ended before all was done{f' ({state})' if state else ''}; "
            f"log: {handle.paths.stdout}\nresume: {resume_command}",
            file=sys.stderr,
        )
    for store in stores.values() if not failed else ():
        print(store.root)
    return 1 if failed else 0


def script(
    experiments: Sequence[Experiment],
    request: sbatch.SlurmOptions,
    arguments: Callable[[Experiment], tuple[str, ...]],
    resume_command: str,
) -> str:
    """The batch script that `run` would submit if no job were done; arguments as there."""
    return sbatch.script([sbatch.SlurmJob(e.folder, arguments(e), resume_command) for e in experiments], request)
