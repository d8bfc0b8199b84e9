#!/usr/bin/env bash
# Train on this node as one of several, from a checkout: the same as `tinytrain train CONFIG.toml --nnodes N ...`.
#
# Usage: launch/node.sh CONFIG.toml [OPTIONS] [SETTINGS]      the same command on every node, except for --node-rank
#   for example: launch/node.sh configs/llama_1b_hsdp.toml --nnodes 2 --node-rank 0 --head node1
#
# launch/node.sh --help lists the options. Under srun every option has a default from Slurm's variables.
trap '' USR1 # asks for a stop; must not kill this process before Python handles it
set -euo pipefail
self=${BASH_SOURCE[0]}
[ ! -L "$self" ] || self=$(command readlink -f -- "$self")
# shellcheck source=tinytrain_dist/launch/preamble.sh
. "$(command dirname -- "$self")/../tinytrain_dist/launch/preamble.sh"

find_python
exec "$python" -P -m tinytrain_dist train --slurm "$@"
