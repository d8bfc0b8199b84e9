# shellcheck shell=bash
# Make a script independent of the settings of the user's shell. The scripts in launch/ and slurm/ read this file first.
# It sets `root`, the folder that contains the package, and defines functions.

# An output that nobody reads or that is closed must not end a script, and no other file may get its number.
trap '' PIPE
true >&2 || exec 2>/dev/null
{ true <&0; } 2>/dev/null || exec </dev/null
{ true >&1; } 2>/dev/null || exec >/dev/null

# Settings that SHELLOPTS, BASHOPTS, POSIXLY_CORRECT and BASH_ENV can make, and functions that the environment contains.
set +o allexport +o keyword +o monitor +o noclobber +o noglob +o posix
for name in failglob lastpipe nocasematch nullglob xpg_echo; do
    shopt -u "$name" 2>/dev/null || true # an older bash has no lastpipe
done
# only exported functions: slurm/env.sh may define others
for name in $(builtin declare -Fx | command sed 's/.* //'); do unset -f "$name"; done
unset name BASH_ENV CDPATH GLOBIGNORE GREP_OPTIONS POSIXLY_CORRECT
export -n SHELLOPTS BASHOPTS 2>/dev/null || true

umask u=rwx # the owner must be able to use what is written; other bits stay as they are
# PYTHONHOME makes .venv unusable. It stays if the user has chosen the Python that it may belong to.
[ -n "${PYTHON:-}" ] || unset PYTHONHOME
unset PYTHONINSPECT # Python would wait for input at its end

# shellcheck disable=SC2034
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

# print_line FORMAT ARGUMENTS...: printf with a newline, that does not fail if the output cannot be written
print_line() {
    # shellcheck disable=SC2059
    { printf "$1\n" "${@:2}" 2>/dev/null; } || true
}

# find_python: set `python` to the Python of the run, and let it find the package in this folder
find_python() {
    local asked=${PYTHON:-}
    python=$(command -v "${asked:-$root/.venv/bin/python}" || { [ -z "$asked" ] && command -v python3; }) || {
        print_line '%s: there is no Python %s; run launch/setup.sh first, or correct PYTHON.' "${0##*/}" "$asked" >&2
        exit 2
    }
    export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
    "$python" -P -c 'import tyro' 2>/dev/null || {
        print_line '%s: %s lacks packages; run launch/setup.sh first, or set PYTHON.' "${0##*/}" "$python" >&2
        exit 2
    }
}

# enter_container CODE: of a Slurm job, set how its commands enter the container that CONTAINER or CONTAINER_IMAGE names:
# `inside`, a prefix of every command (apptainer), and `flags`, options of srun (pyxis). PYTHON is then that of the container.
enter_container() {
    local mounts=$PWD,$1${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    flags=() inside=()
    [ -z "${CONTAINER:-}${CONTAINER_IMAGE:-}" ] || export PYTHON=${CONTAINER_PYTHON:-python3}
    if [ -n "${CONTAINER:-}" ]; then
        inside=(apptainer exec --bind "$mounts" --pwd "$PWD")
        [ -z "${SLURM_GPUS_ON_NODE:-}" ] || inside+=(--nv)
        inside+=("$CONTAINER")
    elif [ -n "${CONTAINER_IMAGE:-}" ]; then
        mounts=$(tr , '\n' <<<"$mounts" | sed 's/.*/&:&/' | paste -sd,)
        flags=(--container-image="$CONTAINER_IMAGE" --container-workdir="$PWD" --container-mounts="$mounts")
    fi
}

# here COMMAND...: run a command once, on this node of a Slurm job, in its container
here() {
    if [ ${#flags[@]} -gt 0 ]; then srun --nodes=1 --ntasks=1 "${flags[@]}" "$@"; else "${inside[@]}" "$@"; fi
}

# second_node: print the address of the second node of a Slurm job, or its name; nothing if there is none
second_node() {
    local name
    name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 2p)
    [ -n "$name" ] || return 0
    scontrol show node "$name" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | grep . || printf '%s\n' "$name"
}
