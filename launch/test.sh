#!/usr/bin/env bash
# Installs the package with its dev extra into .venv and runs the test suite.
#   bash launch/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/venv.sh dev
exec python -m pytest "$@"
