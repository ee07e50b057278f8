#!/usr/bin/env bash
# Installs the package with its dev extra into .venv and runs the test suite, two files at a time,
# without the tests marked slow.
#   bash launch/test.sh [pytest arguments]        # -m slow: those that it leaves out
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh dev
exec python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow" "$@"
