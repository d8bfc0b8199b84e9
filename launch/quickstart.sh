#!/usr/bin/env bash
# Train a small model on a fresh machine: make an environment, prepare a corpus, train, write a sample, draw the loss.
#
# Usage: launch/quickstart.sh [SETTINGS]      for example: launch/quickstart.sh --total-steps 100
#   SETTINGS   settings of the run, --name value
#
# Needs Python 3.11 or newer. Stop it at any time with Ctrl-C: the same command continues where it stopped.
set -euo pipefail
self=${BASH_SOURCE[0]}
[ ! -L "$self" ] || self=$(command readlink -f -- "$self")
# shellcheck source=tinytrain_dist/launch/preamble.sh
. "$(command dirname -- "$self")/../tinytrain_dist/launch/preamble.sh"

case "${1:-}" in -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;; esac
cd -- "$root"

folder=runs/quickstart
tinytrain=.venv/bin/tinytrain
step() { print_line '\n== [%s/5] %s' "$1" "$2"; }

# run COMMAND...: in the background, because a shell that waits for a foreground command handles no signal until it ends.
# A request to stop this script is passed on, and the command ends in order. set -m gives the command a process group of
# its own; without it the shell would make the command ignore Ctrl-C.
run() {
    local code=0
    set -m
    "$@" &
    pid=$!
    set +m
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done # a trap ends a wait early
    wait "$pid" || code=$?
    pid=''
    [ -z "$stopped" ] || { print_line '\nStopped. The same command continues where it stopped.'; exit "$stopped"; }
    return "$code"
}
pid='' stopped=''
stop() { # SIGNAL NUMBER
    stopped=$((128 + $2))
    [ -n "$pid" ] || exit "$stopped"
    kill -s "$1" -- "-$pid" 2>/dev/null || true
}
trap 'stop HUP 1' HUP # has no effect under nohup: a shell cannot trap what it was started to ignore
trap 'stop INT 2' INT
trap 'stop TERM 15' TERM

step 1 "Environment in .venv: 1 to 3 minutes the first time, nothing to do later"
run launch/setup.sh prep,plot

step 2 "Corpus in data/stdlib, from the source of the Python library: under a minute the first time"
if [ -f data/stdlib/meta.json ]; then
    print_line "the corpus exists already"
else
    run "$tinytrain" prepare stdlib --out data/stdlib --vocab-size 4096
fi

step 3 "Training on 2 processes into $folder: 1 to 4 minutes; continues from the newest checkpoint if there is one"
run launch/local.sh configs/quickstart.toml --nproc 2 "$@"

step 4 "A sample of what the model writes: a few seconds"
run "$tinytrain" sample "$folder" --prompt "def "

step 5 "The loss curve as a picture: a few seconds"
run "$tinytrain" plot "$folder"

cat 2>/dev/null <<END || true

What to look at next
  curves             .venv/bin/tensorboard --logdir $folder/logs
  a crash            run launch/quickstart.sh --total-steps 1000000, press Ctrl-C or kill it, run it again: it resumes
  your own text      $tinytrain prepare --help
  all settings       $tinytrain config --help, and configs/ for complete runs
  everything else    $tinytrain --help
END
