# shellcheck shell=bash
# Sourced by smol.sh and test.sh: makes .venv, installs the package with the extra named in $1.
# An active virtual environment is used as it is; VENV=DIR puts a new one elsewhere.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  VENV=${VENV:-.venv}
  [ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
  . "$VENV/bin/activate"
fi
stamp="$VIRTUAL_ENV/.unime_jax-$1-$(cksum < pyproject.toml | cut -d' ' -f1)"
if [ ! -e "$stamp" ]; then
  echo "installing unime_jax[$1] into $VIRTUAL_ENV ..."
  python -m pip install --quiet --disable-pip-version-check --editable ".[$1]"
  touch "$stamp"
fi
