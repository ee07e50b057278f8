#!/usr/bin/env bash
# The paper's claims on the small real models and data: none, stage 1, stage 2 or both; hard, random
# or easy negatives; the margin; k. Every variant with its own learning rate.
#   bash launch/smol_ablation.sh            3 seeds x 3 splits
#   bash launch/smol_ablation.sh --quick    3 seeds, fewer and smaller steps
#   bash launch/smol_ablation.sh smoke      a few steps of a few variants
# Interrupt it with Ctrl-C and start it again: finished runs are skipped, begun ones resumed.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  "") arg="" ;;
  --quick) arg=":quick" ;;
  smoke) arg=":smoke" ;;
  *) echo "usage: bash launch/smol_ablation.sh [--quick | smoke]" >&2 ; exit 2 ;;
esac
. launch/venv.sh smol
exec python -m unime_jax.ablate --config "configs/smol_ablation.py$arg"
