#!/bin/bash
# Trains on a Cloud TPU slice: one command on each of its hosts, on which blockjax lies in ~/blockjax.
#   TPU=NAME ZONE=us-east5-b RUN=gs://BUCKET/lm bash experiments/jobs/tpu_pod.sh [--config.KEY=VALUE ...]
# The same command again continues the run.
set -euo pipefail
CONFIG=${CONFIG:-configs/lm.py:1.3b}

train=$(printf '%q ' .venv/bin/python experiments/train.py --config="$CONFIG" --run="$RUN" --distributed "$@")
gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
    --command="cd blockjax && ./venv.sh .venv -e '.[tpu,gcs]' && $train"
