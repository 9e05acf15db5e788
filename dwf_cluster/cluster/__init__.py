"""Where it runs: this machine, a Ray that is there, a SLURM allocation."""
