#!/usr/bin/env bash
# Make the environment .venv of this checkout: Python, torch, the package and its extras, in the tested versions.
#
# Usage: launch/setup.sh [EXTRAS]      for example: launch/setup.sh prep,plot
#   EXTRAS       names of optional dependencies in pyproject.toml, with commas (default: prep,plot)
#   PYTHON       environment variable: the Python to use (default: the first one found that is 3.11 or newer)
#   TORCH_BUILD  environment variable: cpu, gpu or auto (default: gpu where nvidia-smi works). Set it to gpu on a
#                login node without GPUs whose environment the GPU nodes share.
#
# The first run downloads about 0.4 GB (3 GB with GPU libraries) in 1 to 3 minutes. When nothing has changed since, it
# returns at once and needs no network.
set -euo pipefail
self=${BASH_SOURCE[0]}
[ ! -L "$self" ] || self=$(command readlink -f -- "$self")
# shellcheck source=tinytrain_dist/launch/preamble.sh
. "$(command dirname -- "$self")/../tinytrain_dist/launch/preamble.sh"

case "${1:-}" in -h | --help) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0" && exit 0 ;; esac
extras=${1:-prep,plot}
cd -- "$root"
# Its settings for other installations would put the packages elsewhere, or refuse .venv.
unset PYTHONHOME PYTHONPATH PIP_PREFIX PIP_PYTHON PIP_REQUIRE_VIRTUALENV PIP_ROOT PIP_TARGET
export PIP_USER=0 # also against a configuration file of pip
venv=$root/.venv
python=$venv/bin/python

say() { print_line 'setup: %s' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

torch_version=$(sed -n 's/^torch==//p' constraints.txt)
build=${TORCH_BUILD:-auto}
case $build in
    auto) if nvidia-smi -L >/dev/null 2>&1; then build=gpu; else build=cpu; fi ;;
    cpu | gpu) ;;
    *) fail "TORCH_BUILD is '$build'; expected cpu, gpu or auto." ;;
esac

# ---- nothing to do?
# There is one stamp per set of extras: a checksum of everything from which the environment was made. The path of the
# checkout is part of it, because the scripts in the environment contain the path.
stamp=$venv/.tinytrain-$extras
wanted=$(printf '%s\n' "$root" "$build" "$extras" && cat pyproject.toml constraints.txt)
if [ -x "$python" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$(printf '%s' "$wanted" | cksum)" ]; then
    exit 0
fi

# ---- find Python
find_python() {
    local candidate without_venv=
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.13 python3.12 python3.11 python3.14 python; do
        "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
        without_venv=$candidate
    done
    if [ -n "$without_venv" ]; then
        fail "$without_venv cannot make environments; install its venv module (on Debian: apt-get install python3-venv)."
    fi
    fail "no Python 3.11 or newer found; install one, or give its path: PYTHON=/path/to/python3 launch/setup.sh"
}

moved=
[ ! -f "$venv/.tinytrain-place" ] || [ "$(cat "$venv/.tinytrain-place")" = "$root" ] || moved=yes
if [ -n "$moved" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    base=$(find_python)
    say "making .venv with $("$base" --version) ($base)"
    "$base" -m venv ${moved:+--clear} "$venv"
fi
printf '%s\n' "$root" >"$venv/.tinytrain-place"

# ---- torch
# torch is installed first, without its dependencies. They are installed with the package below, from the user's index. The
# CPU build is a tenth of the size of the default build for Linux.
pip_install() { "$python" -m pip install --quiet --disable-pip-version-check "$@"; }

# try_pip_install ARGUMENTS...: fail if the index does not offer the package. Any other error of pip ends the script.
pip_errors=''
try_pip_install() {
    local errors
    errors=$(pip_install "$@" 2>&1) && return
    pip_errors+=${pip_errors:+$'\n'}$errors
    case $errors in *"No matching distribution found"*) return 1 ;; esac
    print_line '%s' "$pip_errors" >&2
    fail "pip could not install ${*: -1}, see above; correct the cause and run launch/setup.sh again."
}

installed=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)
case $build:$installed in
    gpu:*+cpu) right=no ;;
    *:"$torch_version" | *:"$torch_version"+*) right=yes ;;
    *) right=no ;;
esac
if [ $right = no ]; then
    if [ "$build" = gpu ]; then
        say "installing torch $torch_version with GPU libraries (about 3 GB, 2 to 5 minutes)"
        pip_install --no-deps --force-reinstall "torch==$torch_version"
    elif [ "$(uname -s)" != Linux ]; then
        say "installing torch $torch_version (about 0.1 GB, a minute)"
        pip_install --no-deps "torch==$torch_version"
    else
        say "no GPU here: installing the CPU build of torch $torch_version (about 0.2 GB, a minute); TORCH_BUILD=gpu installs the GPU build"
        cpu_only="torch==$torch_version+cpu"
        try_pip_install --no-deps "$cpu_only" ||
            try_pip_install --no-deps "$cpu_only" --index-url https://download.pytorch.org/whl/cpu ||
            {
                print_line '%s' "$pip_errors" >&2
                say "no index offers the CPU build, see above: installing the default one (up to 3 GB, 2 to 5 minutes)"
                pip_install --no-deps "torch==$torch_version"
            }
    fi
fi

# ---- the package
say "installing tinytrain_dist[$extras] and its dependencies (up to 0.2 GB, about a minute)"
pip_install -c constraints.txt -e ".[$extras]"
printf '%s' "$wanted" | cksum >"$stamp"
say "ready: $venv"
