# Sourced by quickstart.sh and tests/run.sh: makes .venv at the root of the repository and enters it.
# Takes the extras to install, such as "cpu,images".

python=""
for candidate in python3.13 python3.12 python3.11 python3 python; do
  if "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    python=$candidate
    break
  fi
done
if [ -z "$python" ]; then
  echo "needs Python 3.11 or newer with its venv module; install it, for example: apt install python3-venv" >&2
  exit 4
fi
if [ ! -x .venv/bin/python ]; then
  "$python" -m venv .venv
fi
# shellcheck disable=SC1091
. .venv/bin/activate
echo "installing into .venv ($(python --version)) ..."
python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
