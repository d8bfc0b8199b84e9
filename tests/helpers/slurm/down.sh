#!/usr/bin/env bash
# Ends what up.sh started.
#
# Usage: tests/helpers/slurm/down.sh [-k] DIR         everything; -k keeps logs and state
#        tests/helpers/slurm/down.sh -N node2 DIR     powers off one node at once; up.sh brings it back
#
# Only processes that up.sh wrote down are killed, by process id and start time; their namespaces go with them.
set -euo pipefail
keep='' only=''
while getopts kN:h o; do
    case $o in
        k) keep=1 ;; N) only=$OPTARG ;;
        h) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
dir=${1:?usage: down.sh [-k] [-N NODE] STATE_DIR}
[ -d "$dir" ] || exit 0
dir=$(cd "$dir" && pwd -P)
[ -e "$dir/.cluster" ] || { echo "down.sh: $dir is not up.sh's" >&2; exit 1; }
exec 9>"$dir/.lock"; flock 9

start_of() { sed -n 's/^.*) \([^ZX] \)/\1/p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
gone() { ! [ -d "/proc/$1" ] || grep -q '^State:.Z' "/proc/$1/status" 2>/dev/null; }
stop() {
    local f=$1 pid st inits p
    read -r pid st 2>/dev/null <"$f" || return 0
    if [ -n "$pid" ] && [ "$(start_of "$pid")" = "$st" ]; then
        # the init of its pid namespace dies with it and takes all processes there along
        inits=$(cat "/proc/$pid/task/$pid/children" 2>/dev/null || true)
        kill -KILL "$pid" 2>/dev/null || true
        for p in $pid $inits; do
            for _ in $(seq 200); do gone "$p" && break; sleep 0.05; done
            gone "$p" || { echo "down.sh: $p does not end" >&2; exit 1; }
        done
    fi
    rm -f "$f" "$f.go"
}
if [ -n "$only" ]; then stop "$dir/run/$only"; exit 0; fi
for f in "$dir"/run/node* "$dir"/run/ctl; do
    case $f in *.sh | *.go | *'*') ;; *) stop "$f" ;; esac
done
if read -r proctrack cg 2>/dev/null <"$dir/proctrack" && [ "$proctrack" = cgroup ]; then
    unshare --mount sh -c "mount -t cgroup -o freezer none '$dir/cgroup/freezer' &&
        find '$dir/cgroup/freezer/$cg' -depth -type d -exec rmdir {} +" 2>/dev/null || true
fi
rm -rf "${dir:?}"/{run,bin,dev,cgroup,munge}
if [ -z "$keep" ]; then
    rm -rf "${dir:?}"/{log,ctld,spool,hosts,resolv.conf,slurm.conf,gres.conf,cgroup.conf}
    rm -rf "${dir:?}"/{nodes,proctrack,.cluster,.lock}
    rmdir "$dir" 2>/dev/null || true   # anything else in it is the caller's
fi
