#!/usr/bin/env bash
# From an empty clone to pictures: installs into .venv, exports the trained model "digits" with
# explicit K/V caches, verifies it, and draws all ten classes with the NumPy runtime.
#
# Command   bash examples/quickstart.sh
# Time      about a minute after downloads, on 2 CPU cores
# Result    quickstart/digits.png, quickstart/digits.gif and the bundle quickstart/digits
set -euo pipefail
cd "$(dirname "$0")/.."
. examples/setup.sh cpu,images

mkdir -p quickstart
mdexport build --model digits --output quickstart/digits --force
mdruntime verify quickstart/digits
mdruntime generate quickstart/digits --labels 0-9 --count 12 --seed 0 --output quickstart/digits.png
mdruntime generate quickstart/digits --labels 0-9 --seed 0 --columns 5 --animate quickstart/digits.gif

cat <<'END'

Look at quickstart/digits.png and quickstart/digits.gif. Next, try:
  . .venv/bin/activate
  mdruntime generate quickstart/digits --labels 3,7 --count 8 --rounds 16 --order moment -o more.png
END
