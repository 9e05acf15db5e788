"""Pre-training of every expert, algorithms 1 and 2.

    ray job submit --working-dir . -- python jobs/experts.py --storage /shared/runs [options of dwf_cluster.launch]

Without a Ray job around it, it runs on this machine.
"""

import sys

from dwf_cluster.launch import job

if __name__ == "__main__":
    sys.exit(job("experts", "--stages", "experts"))
