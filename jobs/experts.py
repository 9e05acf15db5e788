"""Train every expert and baseline: algorithms 1 and 2 of the paper.

    ray job submit --working-dir . -- python jobs/experts.py --storage /shared/runs [options of dwf_cluster.launch]

Outside a Ray job, it runs on this machine.
"""

import sys

from dwf_cluster.launch import job

if __name__ == "__main__":
    sys.exit(job("experts", "--stages", "experts"))
