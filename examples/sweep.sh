#!/usr/bin/env bash
# Train with several learning rates one after the other, and compare the runs.
#
#   sweep.sh CONFIG.toml [SETTINGS]
#   LEARNING_RATES="1e-4 1e-3" sweep.sh CONFIG.toml [SETTINGS]
#
# Each run has a folder of its own, so the same command resumes a sweep that was stopped, and skips runs that are done.
# On Slurm, `tinytrain submit CONFIG.toml --array SWEEP.txt ...` starts all runs at once (SWEEP.txt: one line per run).
set -euo pipefail

config=$1
shift
runs=()
for lr_max in ${LEARNING_RATES:-1e-3 3e-3 1e-2}; do
    run=runs/sweep/lr_max-$lr_max
    tinytrain train "$config" --nproc 1 --target-dir "$run" --lr-max "$lr_max" --lr-min 1e-4 "$@"
    runs+=("$run")
done
tinytrain ls runs/sweep
tinytrain plot "${runs[@]}" --out runs/sweep/loss.png
