"""A sweep: an experiment for each combination of values, as trials of Ray Tune.

    ray job submit --working-dir . -- python jobs/sweep.py seeds=0..4 gate.kind=soft gate.kind=hard ...

What is varied comes first, then options of dwf_cluster.launch, such as --storage /shared/runs. Without a Ray job
around it, it runs on this machine.
"""

import sys

from dwf_cluster.launch import job

if __name__ == "__main__":
    sys.exit(job("sweep", "--sweep"))
