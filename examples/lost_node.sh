#!/usr/bin/env bash
# Kill a node of a run, see the others train on, bring it back, and compare the result with an undisturbed run.
#
#   lost_node.sh CONFIG.toml [SETTINGS]
#   NODES=2 lost_node.sh CONFIG.toml [SETTINGS]
#
# The nodes are addresses of this machine, with one process each. On a cluster each is a machine, --address is not
# needed, and the store is on a machine that outlives them. The batch must have a micro-batch for each of the nodes.
set -euo pipefail

config=$1
shift
nodes=${NODES:-4}
run=runs/lost_node/run quiet=runs/lost_node/undisturbed logs=runs/lost_node/logs
rm -rf runs/lost_node
mkdir -p "$logs"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

# await SECONDS COMMAND...: wait until a command succeeds
await() {
    local end=$((SECONDS + $1))
    shift
    until "$@" 2>/dev/null; do
        [ "$SECONDS" -lt "$end" ] || { echo "waited too long: $*" >&2 && exit 1; }
        sleep 0.2
    done
}
start_node() {
    tinytrain train "$config" --nnodes "1:$nodes" --store "$store" --address "127.0.0.$1" --nproc 1 \
        --target-dir "$run" --reproducible true --ckpt-every 20 "${@:2}" >>"$logs/node$1.log" 2>&1 &
}
recoveries() { [ "$(grep -c '"kind": "recovered"' "$run/restarts.jsonl")" -ge "$1" ]; }
step_of() { sed -n 's/.*"step": \([0-9]*\).*/\1/p' "$1/state.json"; }

tinytrain store --port 0 >"$logs/store.log" 2>&1 &
await 120 grep -q -- "--store" "$logs/store.log"
store=127.0.0.1:$(sed -n 's/.*--store .*:\([0-9]*\)$/\1/p' "$logs/store.log")
for node in $(seq "$nodes"); do
    start_node "$node" "$@"
    pids[node]=$!
done
await 300 grep -qs '"kind": "saved"' "$run/logs/metrics.jsonl"
echo "$nodes nodes train; kill node 1, which has rank 0"
kill -9 "${pids[1]}"
await 300 recoveries 1
echo "the others train on; start node 1 again"
start_node 1 "$@"
await 300 recoveries 2
echo "it has joined; stop the run"
touch "$run/stop"
wait "${pids[2]}"
tinytrain status "$run" || true
tinytrain train "$config" --nproc 1 --target-dir "$quiet" --reproducible true --ckpt-every 100000 "$@" \
    --stop-at-step "$(step_of "$run")" >"$logs/undisturbed.log" 2>&1
tinytrain hash "$run" >runs/lost_node/disturbed.txt
tinytrain hash "$quiet" >runs/lost_node/undisturbed.txt
diff runs/lost_node/disturbed.txt runs/lost_node/undisturbed.txt && echo "equal bits: the loss of a node left no trace"
