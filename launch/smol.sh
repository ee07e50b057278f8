#!/usr/bin/env bash
# Both stages of UniME on small real models and real data, on a laptop's CPU.
#   bash launch/smol.sh          the full run, 20 minutes on two cores
#   bash launch/smol.sh smoke    a few steps of everything
# Interrupt it with Ctrl-C and start it again: finished parts are skipped, begun ones resumed.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
  "") arg="" ; smoke="" ; runs=runs/smol ;;
  smoke) arg=":smoke" ; smoke="--smoke" ; runs=runs/smol-smoke ;;
  *) echo "usage: bash launch/smol.sh [smoke]" >&2 ; exit 2 ;;
esac
. launch/venv.sh smol
started=$SECONDS
step() { printf '\n== %s\n' "$*"; "$@"; }
step python -m unime_jax.prepare smol $smoke
step python -m unime_jax.teach    --config "configs/smol_stage1.py$arg"
step python -m unime_jax.train    --config "configs/smol_stage1.py$arg"
step python -m unime_jax.train    --config "configs/smol_align.py$arg"
step python -m unime_jax.train    --config "configs/smol_stage2.py$arg"
step python -m unime_jax.evaluate --config "configs/eval_smol.py$arg"
printf '\nfinished in %d min %d s; report: %s/report/report.md\n' \
  $(( (SECONDS - started) / 60 )) $(( (SECONDS - started) % 60 )) "$runs"
