#!/usr/bin/env bash
# Measures everything in README.md beside this file: builds the bundles, trains the judges, runs the
# samplers, writes results/. Stop it at any time: what was measured is kept, and it goes on from there.
#
# Command   bash examples/paper/run.sh             all of it
#           bash examples/paper/run.sh --short     a first look with few samples, into build/paper/short
#           bash examples/paper/run.sh --models glyphs --threads 2     options go to every script
# Time      three hours on 2 CPU cores; --short: ten minutes
# Needs     fonts for glyphs and Debian's python3.11-doc for prose, see judges.py
set -euo pipefail
cd "$(dirname "$0")/../.."
. examples/setup.sh cpu,images,text,paper

for script in one_round rounds orders caching hybrid headline; do
  echo "== $script"
  python "examples/paper/$script.py" "$@"
done
echo "== ship"
python examples/paper/ship.py "$@"
