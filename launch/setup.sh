#!/usr/bin/env bash
# Make the environment .venv of this checkout: Python, torch, the package and its extras, in the tested versions.
#
# Usage: launch/setup.sh [--torch VERSION] [EXTRAS]      for example: launch/setup.sh prep,plot
#   --torch      make .venv-torch-VERSION instead, with this version of torch; launch/test.sh --torch does
#   EXTRAS       names of optional dependencies in pyproject.toml, with commas (default: prep,plot)
#   PYTHON       environment variable: the Python to use (default: the first one found that is 3.11 or newer)
#   TORCH_BUILD  environment variable: cpu, gpu or auto (default: gpu where nvidia-smi works). Set it to gpu on a
#                login node without GPUs whose environment the GPU nodes share.
#
# The first run downloads about 0.4 GB (3 GB with GPU libraries) in 1 to 3 minutes. When nothing has changed since, it
# returns at once and needs no network. This script finds Python; tinytrain_dist/launch/environment.py does the rest.
set -euo pipefail
self=${BASH_SOURCE[0]}
[ ! -L "$self" ] || self=$(command readlink -f -- "$self")
# shellcheck source=tinytrain_dist/launch/preamble.sh
. "$(command dirname -- "$self")/../tinytrain_dist/launch/preamble.sh"

case "${1:-}" in -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;; esac
unset PYTHONHOME PYTHONPATH

fail() {
    print_line 'setup: %s' "$*" >&2
    exit 1
}

without_venv=''
for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
        exec "$candidate" -P "$root/tinytrain_dist/launch/environment.py" "$@"
    fi
    without_venv=$candidate
done
[ -z "$without_venv" ] ||
    fail "$without_venv cannot make environments; install its venv module (on Debian: apt-get install python3-venv)."
fail "no Python 3.11 or newer found; install one, or give its path: PYTHON=/path/to/python3 launch/setup.sh"
