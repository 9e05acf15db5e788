#!/bin/bash
# Run a sweep on the nodes of one allocation:
#   sbatch [options of sbatch] slurm/sweep.sh seeds=0..4 gate.kind=soft gate.kind=hard [options of dwf_cluster.launch]
# Options on the command line of sbatch override those below. See docs/sweeps.md and docs/slurm.md.
#SBATCH --job-name=dwf-sweep
#SBATCH --nodes=1
#SBATCH --gpus-per-node=h100:8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --output=slurm-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time limit, trainings save what they have, and the job is requeued.
#SBATCH --signal=USR2@120

# Use the environment beside slurm/ that `make` creates, unless DWF_PYTHON names another Python. Without sbatch, `bash
# slurm/sweep.sh` on the login node only runs this check.
python="${DWF_PYTHON:-${SLURM_SUBMIT_DIR:-.}/.venv/bin/python}"
if [ -z "${DWF_PYTHON:-}" ] && [ ! -x "$python" ]; then python=python; fi
if ! "$python" -c "import dwf_cluster.cluster.allocation" 2> /dev/null; then
    echo "error: $python cannot import dwf_cluster: run \`make demo\` in the folder that you submit from, activate its" \
        "environment before sbatch, or set DWF_PYTHON=/path/to/python" >&2
    exit 2
fi
exec "$python" -m dwf_cluster.cluster.allocation --sweep "$@"
