"""Run a sweep: an experiment for each combination of values, as trials of Ray Tune.

    ray job submit --working-dir . -- python jobs/sweep.py seeds=0..4 gate.kind=soft gate.kind=hard ...

The varied fields come first, then options of dwf_cluster.launch, such as --storage /shared/runs. Outside a Ray job, it
runs on this machine.
"""

import sys

from dwf_cluster.launch import job

if __name__ == "__main__":
    sys.exit(job("sweep", "--sweep"))
