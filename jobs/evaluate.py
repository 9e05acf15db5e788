"""Every model under every attack, table 3.

    ray job submit --working-dir . -- python jobs/evaluate.py --storage /shared/runs [options of dwf_cluster.launch]

Without a Ray job around it, it runs on this machine.
"""

import sys

from dwf_cluster.launch import job

if __name__ == "__main__":
    sys.exit(job("evaluate", "--stages", "evaluate"))
