#!/usr/bin/env bash
# From a fresh machine to a trained model: environment, a corpus, a run on two processes, a sample, a picture.
#
# Usage: launch/quickstart.sh [SETTINGS]      for example: launch/quickstart.sh --total-steps 100
#   SETTINGS   passed on to the run, --name value
#
# Needs Python 3.11 or newer. Stop it at any time with Ctrl-C: the same command continues where it stopped.
set -euo pipefail

case "${1:-}" in -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

run=runs/quickstart
tinytrain=.venv/bin/tinytrain
step() { printf '\n== [%s/5] %s\n' "$1" "$2"; }
trap 'printf "\nStopped. The same command continues where it stopped.\n"; exit 130' INT

step 1 "Environment in .venv: 1 to 3 minutes the first time, then nothing to do"
launch/setup.sh prep,plot

step 2 "Corpus in data/stdlib: the source of the Python library as tokens, under a minute the first time"
if [ -f data/stdlib/meta.json ]; then
    echo "already there"
else
    "$tinytrain" prepare stdlib --out data/stdlib --vocab-size 4096
fi

step 3 "Training on 2 processes into $run: 1 to 4 minutes; continues from the newest checkpoint if there is one"
launch/local.sh configs/quickstart.toml --nproc 2 "$@"

step 4 "What the model writes: a few seconds"
"$tinytrain" sample "$run" --prompt "def "

step 5 "The loss curve as a picture: a few seconds"
"$tinytrain" plot "$run"

cat <<END

What to look at next
  curves             .venv/bin/tensorboard --logdir $run/logs
  a crash            run launch/quickstart.sh --total-steps 1000000, press Ctrl-C or kill it, run it again: it resumes
  your own text      $tinytrain prepare --help
  all settings       .venv/bin/python launch/train.py --help, and configs/ for complete runs
  everything else    $tinytrain --help
END
