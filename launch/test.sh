#!/usr/bin/env bash
# Run all checks of the project: lint, format, types, shell scripts, tests. Makes the environment first if needed.
#
# Usage: launch/test.sh [--fast] [--torch VERSION] [PYTEST ARGUMENTS]      for example: launch/test.sh --fast -k checkpoint
#   --fast           skip the tests marked slow
#   --torch VERSION  only run the tests, with this version of torch, in an environment of its own: .venv-torch-VERSION.
#                    Skips the tests marked slow or slurm; -m 'MARKERS' selects others, and -m '' selects all.
#                    PYTHON=/path/to/python3 in front chooses the Python.
#
# If a stage fails, the other stages still run. The exit code is then 1, and the last line names the failed stages.
# This script makes the environment; tinytrain_dist/launch/checks.py does the rest.
set -euo pipefail
self=${BASH_SOURCE[0]}
[ ! -L "$self" ] || self=$(command readlink -f -- "$self")
# shellcheck source=tinytrain_dist/launch/preamble.sh
. "$(command dirname -- "$self")/../tinytrain_dist/launch/preamble.sh"

case "${1:-}" in -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;; esac
cd -- "$root"

environment=.venv other_torch=() previous=''
for argument in "$@" ''; do
    case $previous in
        --torch) other_torch=(--torch "$argument") environment=.venv-torch-$argument ;;
        --torch=*) other_torch=(--torch "${previous#*=}") environment=.venv-torch-${previous#*=} ;;
    esac
    previous=$argument
done
print_line '[1] environment: 1 to 3 minutes the first time, longer with GPU libraries, nothing to do later'
launch/setup.sh ${other_torch[@]+"${other_torch[@]}"} test || exit 1 # without it nothing else can run
exec "$environment/bin/python" -P tinytrain_dist/launch/checks.py "$@"
