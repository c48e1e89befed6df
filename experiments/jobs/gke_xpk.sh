#!/bin/bash
# Trains on a GKE cluster of TPUs through xpk, from an image in which blockjax is the working folder.
#   CLUSTER=NAME TPU_TYPE=v5p-1024 IMAGE=gcr.io/PROJECT/IMAGE:TAG RUN=gs://BUCKET/lm \
#       bash experiments/jobs/gke_xpk.sh [--config.KEY=VALUE ...]
# For a sweep: experiments/sweep.py --launcher=xpk.
set -euo pipefail
CONFIG=${CONFIG:-configs/lm.py:1.3b}
WORKLOAD=${WORKLOAD:-blockjax}

xpk workload create --workload="$WORKLOAD" --cluster="$CLUSTER" --tpu-type="$TPU_TYPE" \
    --docker-image="$IMAGE" --num-slices=1 --max-restarts=3 \
    --command="$(printf '%q ' python experiments/train.py --config="$CONFIG" --run="$RUN" --distributed "$@")"
