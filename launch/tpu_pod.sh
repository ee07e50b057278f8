#!/usr/bin/env bash
# Trains on a TPU pod slice; runs on every one of its hosts, which find each other by themselves.
# On a TPU VM of one host:
#   bash launch/tpu_pod.sh [--dry-run] --config configs/llava16_stage2.py --config.model.path=DIR ...
# On all hosts of a slice, from anywhere, the repository and the extra "tpu" installed on each:
#   gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all --command="cd unime_jax &&
#     bash launch/tpu_pod.sh --config configs/llava16_stage2.py --config.model.path=DIR ..."
# Model, data and output lie where all hosts see them (Filestore, a bucket mounted with gcsfuse).
# ENTRY=teach (or evaluate, ...) runs another entry point. On GKE: launch/gke_jobset.yaml.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/run.sh
export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu} # never train on a host's CPU for want of the TPU
export TPU_STDERR_LOG_LEVEL=${TPU_STDERR_LOG_LEVEL:-2} TPU_MIN_LOG_LEVEL=${TPU_MIN_LOG_LEVEL:-2}
run exec python -m "unime_jax.${ENTRY:-train}" "$@"
