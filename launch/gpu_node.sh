#!/usr/bin/env bash
# Trains on all GPUs of this machine.
#   bash launch/gpu_node.sh [--dry-run] --config configs/llava16_stage2.py --config.model.path=DIR ...
# ENTRY=teach (or evaluate, ...) runs another entry point. What is exported already stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/run.sh
export JAX_PLATFORMS=${JAX_PLATFORMS:-cuda,cpu} # never train on a host's CPU for want of the GPUs
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-.92} # the rest is NCCL's
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
run exec python -m "unime_jax.${ENTRY:-train}" "$@"
