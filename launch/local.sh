#!/usr/bin/env bash
# Train on this machine: one process per GPU, or several processes on the CPU.
#
# Usage: launch/local.sh CONFIG.toml [--nproc N] [--dry-run] [--] [SETTINGS]
#   for example: launch/local.sh configs/quickstart.toml --nproc 2 --total-steps 100
#   --nproc N   number of processes (default: one per GPU; without GPUs the largest power of two that is at most 8 and at
#               most the number of usable cores, because it divides most batch sizes)
#   --dry-run   print the command and its environment, and start nothing
#   SETTINGS    --name value, with the names of the configuration file; launch/train.py --help lists them
#
# Ctrl-C ends the current step, saves and stops. The same command resumes the run.
# Several machines: launch/node.sh. Slurm: launch/submit.py.
set -euo pipefail
self=${BASH_SOURCE[0]}
[ ! -L "$self" ] || self=$(command readlink -f -- "$self")
# shellcheck source=launch/preamble.sh
. "$(command dirname -- "$self")/preamble.sh"

usage() { sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; }
fail() {
    print_line 'local.sh: %s' "$*" >&2
    exit 2
}

[ $# -gt 0 ] || fail "no configuration given; try ${place}launch/local.sh ${place}configs/quickstart.toml (or --help)."
case $1 in -h | --help) usage && exit 0 ;; esac

config=$1
shift
case $config in -*) fail "the first argument must be a configuration file, not $config." ;; esac
[ -f "$config" ] || fail "there is no file $config; examples are in ${place}configs/."

nproc='' dry_run='' settings=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --nproc=*) nproc=${1#*=} ;;
        --nproc)
            [ $# -gt 1 ] || fail "--nproc needs a number."
            nproc=$2
            shift
            ;;
        --dry-run) dry_run=yes ;;
        --)
            shift
            settings+=("$@")
            break
            ;;
        *) settings+=("$1") ;;
    esac
    shift
done

python=$root/.venv/bin/python
[ -x "$python" ] || python=$(command -v python3) || fail "there is no Python; run ${place}launch/setup.sh first."
"$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' ||
    fail "$python has no torch; run ${place}launch/setup.sh first."

gpus=0
if nvidia-smi -L >/dev/null 2>&1; then
    gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())') # respects CUDA_VISIBLE_DEVICES
fi
# Not the command nproc: it returns OMP_NUM_THREADS where that is set.
cores=$("$python" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)')

if [ -z "$nproc" ]; then
    nproc=$gpus
    if [ "$nproc" -eq 0 ]; then
        nproc=1
        while [ $((nproc * 2)) -le "$cores" ] && [ "$nproc" -lt 8 ]; do nproc=$((nproc * 2)); done
    fi
fi
case $nproc in '' | 0* | *[!0-9]*) fail "--nproc is '$nproc'; expected a whole number, at least 1." ;; esac

threads=$((cores / nproc))
[ "$threads" -ge 1 ] || threads=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

command=("$python" -P -m tinytrain_dist.agent --standalone --nproc-per-node "$nproc" "$root/launch/train.py" "$config")
command+=(${settings[@]+"${settings[@]}"})
if [ -n "$dry_run" ]; then
    printf 'OMP_NUM_THREADS=%s\n' "$OMP_NUM_THREADS"
    printf '%q ' "${command[@]}"
    printf '\n'
    exit 0
fi
print_line 'local.sh: %s process(es) on %s, %s thread(s) each' \
    "$nproc" "$([ "$gpus" -gt 0 ] && echo "$gpus GPU(s)" || echo "$cores CPU core(s)")" "$OMP_NUM_THREADS" >&2
exec "${command[@]}"
