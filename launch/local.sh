#!/usr/bin/env bash
# Train on this machine from a checkout: the same as `tinytrain train`, with the Python of the checkout's environment.
#
# Usage: launch/local.sh CONFIG.toml [OPTIONS] [SETTINGS]
#   for example: launch/local.sh configs/quickstart.toml --nproc 2 --total-steps 100
#
# launch/local.sh --help lists the options. Ctrl-C ends the current step, saves and stops. The same command resumes the run.
set -euo pipefail
self=${BASH_SOURCE[0]}
[ ! -L "$self" ] || self=$(command readlink -f -- "$self")
# shellcheck source=tinytrain_dist/launch/preamble.sh
. "$(command dirname -- "$self")/../tinytrain_dist/launch/preamble.sh"

find_python
exec "$python" -P -m tinytrain_dist train "$@"
