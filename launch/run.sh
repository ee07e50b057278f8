# Sourced by the scripts that start a run. `run COMMAND ...` runs it or, with --dry-run as the
# script's first argument or DRY_RUN=1, prints it with what the script exports.
# shellcheck shell=bash
if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
exported_before=$(export -p)

run() {
  if [ "${DRY_RUN:-0}" != 1 ]; then
    "$@"
    return
  fi
  comm -13 <(sort <<< "$exported_before") <(export -p | sort) | sed 's/^declare -x /export /'
  [ "$1" != exec ] || shift
  printf '%q ' "$@"
  echo
}
