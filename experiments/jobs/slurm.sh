#!/bin/bash
# Trains on GPUs of a Slurm cluster, a process for each GPU; RUN lies on a disk that all nodes share.
#   RUN=runs/lm sbatch experiments/jobs/slurm.sh [--config.KEY=VALUE ...]
# After a timeout or preemption Slurm starts it again and it goes on. For a sweep: experiments/sweep.py
# --launcher=slurm.
#SBATCH --job-name=blockjax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=600
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
CONFIG=${CONFIG:-configs/lm.py:1.3b}
PYTHON=${PYTHON:-.venv/bin/python}

srun "$PYTHON" experiments/train.py --config="$CONFIG" --run="$RUN" --distributed "$@"
