#!/usr/bin/env bash
# Run all checks of the project: lint, format, types, shell scripts, tests. Makes the environment first if needed.
#
# Usage: launch/test.sh [--fast] [PYTEST ARGUMENTS]      for example: launch/test.sh --fast -k checkpoint
#   --fast   skip the tests marked slow
#
# If a stage fails, the other stages still run. The exit code is then 1, and the last line names the failed stages.
set -euo pipefail
self=${BASH_SOURCE[0]}
[ ! -L "$self" ] || self=$(command readlink -f -- "$self")
# shellcheck source=tinytrain_dist/launch/preamble.sh
. "$(command dirname -- "$self")/../tinytrain_dist/launch/preamble.sh"

case "${1:-}" in -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;; esac
cd -- "$root"

pytest_arguments=()
for argument in "$@"; do
    if [ "$argument" = --fast ]; then pytest_arguments+=(-m "not slow"); else pytest_arguments+=("$argument"); fi
done

stages=6 number=0 failed=()
step() { # step NAME DESCRIPTION COMMAND...
    local name=$1 description=$2
    shift 2
    number=$((number + 1))
    print_line '\n[%d/%d] %s: %s' "$number" "$stages" "$name" "$description"
    "$@" || failed+=("$name")
}

shell_scripts() {
    local scripts=()
    while IFS= read -r -d '' script; do scripts+=("$script"); done < <(
        find .ci launch slurm tinytrain_dist tests benchmarks examples \( -name '*.sh' -o -name '*.sbatch' -o -path .ci/run \) -type f -print0 2>/dev/null
    )
    printf '%d scripts\n' "${#scripts[@]}"
    .venv/bin/shellcheck "${scripts[@]}"
}

number=1
print_line '[1/%d] environment: 1 to 3 minutes the first time, nothing to do later' "$stages"
launch/setup.sh test || exit 1 # without it nothing else can run

# The ranks of a test share the cores. With more than one thread each, they would wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

step "ruff check" "lint, a second" .venv/bin/ruff check .
step "ruff format" "layout of the code, a second" .venv/bin/ruff format --check .
step "mypy" "types, up to a minute the first time" .venv/bin/mypy
step "shellcheck" "shell and batch scripts, a few seconds" shell_scripts
step "pytest" "tests on one and many processes, a few minutes" \
    .venv/bin/python -m pytest ${pytest_arguments[@]+"${pytest_arguments[@]}"}

if [ ${#failed[@]} -gt 0 ]; then
    printf '\nlaunch/test.sh: FAILED in %d of %d stages:' "${#failed[@]}" "$stages"
    printf ' [%s]' "${failed[@]}"
    printf '\n'
    exit 1
fi
printf '\nlaunch/test.sh: all %d stages passed\n' "$stages"
