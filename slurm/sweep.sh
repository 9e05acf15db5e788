#!/bin/bash
# A sweep on the nodes of one allocation:
#   sbatch [sbatch's options] slurm/sweep.sh seeds=0..4 gate.kind=soft gate.kind=hard [launch's options]
# What is given on sbatch's command line overrides what stands here. docs/sweeps.md and docs/slurm.md have more.
#SBATCH --job-name=dwf-sweep
#SBATCH --nodes=1
#SBATCH --gpus-per-node=h100:8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time is over: trainings save what they have, and the job is requeued.
#SBATCH --signal=USR2@120

exec "${DWF_PYTHON:-python}" -m dwf_cluster.cluster.allocation --sweep "$@"
