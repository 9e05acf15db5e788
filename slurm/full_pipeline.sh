#!/bin/bash
# The whole pipeline on the nodes of one allocation: sbatch [sbatch's options] slurm/full_pipeline.sh [launch's options]
# What is given on sbatch's command line overrides what stands here. docs/slurm.md has more, for users and for sites.
#SBATCH --job-name=dwf
#SBATCH --nodes=1
#SBATCH --gpus-per-node=h100:8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time is over: trainings save what they have, and the job is requeued.
#SBATCH --signal=USR2@120

exec "${DWF_PYTHON:-python}" -m dwf_cluster.cluster.allocation "$@"
