#!/usr/bin/env bash
# Runs what needs an NVIDIA GPU, and prints a report to paste into an issue.
#
# Command   bash tests/gpu.sh                     a workstation with this repository installed
#           bash tests/gpu.sh --bundles FOLDER    a Jetson: FOLDER holds bundles made elsewhere, named
#                                                 digits-fp32, digits-fp16, glyphs-fp32, glyphs-fp16
#           bash tests/gpu.sh --no-speed          without the table of times (half an hour)
# Other arguments go to pytest. On a Jetson pytest is all that is needed besides mdruntime:
#   python -m pip install pytest
# Result    gpu-report.md in the current folder; nothing is skipped without its reason.
set -euo pipefail
here="$PWD"
root="$(cd "$(dirname "$0")/.." && pwd)"

export MDRUNTIME_GPU_REPORT="${MDRUNTIME_GPU_REPORT:-$here/gpu-report.md}"
export MDRUNTIME_GPU_SPEED=1
rest=()
while [ $# -gt 0 ]; do
    case "$1" in
        --bundles)
            [ $# -ge 2 ] || { echo "tests/gpu.sh: --bundles needs a folder" >&2; exit 2; }
            export MDRUNTIME_GPU_BUNDLES="$(cd "$2" && pwd)"
            shift 2
            ;;
        --no-speed)
            export MDRUNTIME_GPU_SPEED=
            shift
            ;;
        *)
            rest+=("$1")
            shift
            ;;
    esac
done

cd "$root"
python=python3
if [ -n "${VIRTUAL_ENV:-}" ]; then
    python="$VIRTUAL_ENV/bin/python"
elif [ -x .venv/bin/python ]; then
    python=.venv/bin/python
fi
"$python" -m mdruntime doctor || true
exec "$python" -m pytest -m gpu -p no:cacheprovider tests/gpu "${rest[@]+"${rest[@]}"}"
