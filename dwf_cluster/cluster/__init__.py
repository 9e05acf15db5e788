"""Run jobs on Ray: on this machine, on an existing Ray cluster, in a SLURM allocation."""
