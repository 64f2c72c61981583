#!/usr/bin/env bash
# Sets up .venv and runs everything that the continuous integration runs.
#
# Command   bash tests/run.sh            all of it
#           bash tests/run.sh -k laws    arguments go to pytest
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh dev

echo "== ruff"
ruff format --check .
ruff check .
echo "== mypy"
mypy
mypy --python-version 3.10 runtime/mdruntime
echo "== pytest"
python -m pytest -n auto --dist loadfile "$@"
