#!/usr/bin/env bash
# Train on this node as one of several: one torchrun per node; they find each other at the first node (the head).
#
# Usage: launch/node.sh CONFIG.toml [OPTIONS] [--] [SETTINGS]      the same line on every node, except --node-rank
#   --nnodes N         number of nodes, or MIN:MAX: the run continues while at least MIN nodes are left
#   --node-rank R      0 on the first node, which must be the head; 1, 2, ... on the others
#   --head HOST[:PORT] name or address of node 0 as the other nodes reach it, and a free port there (default: 29400)
#   --nproc P          processes on each node (default: every GPU; without one 1)
#   --rdzv-id ID       a name for this run, if several runs share one head and port (default: tinytrain)
#   --max-restarts M   restarts in place after a process has died (default: 3)
#   --direct           no torchrun: this process is one of the ranks that srun has started on each node
#   --dry-run          print the command and its environment, start nothing
#   --print-head       print only HOST:PORT of this node as the other nodes reach it, with a free port
#   SETTINGS           --name value, as in the configuration; launch/train.py --help lists them
#
# Under Slurm (srun launch/node.sh CONFIG.toml) every option gets its value from Slurm. slurm/train.sbatch does that.
trap '' USR1 # a request to stop must not kill this shell before Python handles it; the deadline repeats the request
set -euo pipefail

usage() { sed -n '2,/^trap/{/^trap/d;s/^# \{0,1\}//;p}' "$0"; }
fail() {
    printf '%s\n' "node.sh: $*" >&2
    exit 2
}

[ $# -gt 0 ] || fail "no configuration given; try launch/node.sh --help."
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
config='' dry_run='' direct='' print_head='' settings=()
job=${SLURM_JOB_ID:-} nnodes=${SLURM_JOB_NUM_NODES:-} rank=${SLURM_NODEID:-} head='' rdzv_id='' max_restarts=${MAX_RESTARTS:-3}
nproc=${SLURM_GPUS_ON_NODE:-${PROCESSES_PER_NODE:-}}
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage && exit 0 ;;
        --dry-run) dry_run=yes ;;
        --direct) direct=yes ;;
        --print-head) print_head=yes ;;
        --nnodes=* | --node-rank=* | --head=* | --nproc=* | --rdzv-id=* | --max-restarts=*)
            set -- '' "${1%%=*}" "${1#*=}" "${@:2}"
            ;;
        --nnodes | --node-rank | --head | --nproc | --rdzv-id | --max-restarts)
            [ $# -gt 1 ] || fail "$1 needs a value."
            case $1 in
                --nnodes) nnodes=$2 ;;
                --node-rank) rank=$2 ;;
                --head) head=$2 ;;
                --nproc) nproc=$2 ;;
                --rdzv-id) rdzv_id=$2 ;;
                --max-restarts) max_restarts=$2 ;;
            esac
            shift
            ;;
        --)
            settings+=("${@:2}")
            break
            ;;
        *) if [ -z "$config" ] && [ ${#settings[@]} -eq 0 ]; then config=$1; else settings+=("$1"); fi ;;
    esac
    shift
done

python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=$(command -v "$python" || command -v python3) || fail "there is no Python; run launch/setup.sh first."
names=()
[ -z "${SLURM_JOB_NODELIST:-}" ] || mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null)
# address NODE: the address that Slurm has for a node, or else its name
address() { scontrol show node "$1" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | grep . || echo "$1"; }

if [ -n "$print_head" ]; then
    rank=0 nnodes=${nnodes:-1}
else
    case $config in '' | -*) fail "the first argument must be a configuration file, not '$config'." ;; esac
    [ -f "$config" ] || fail "there is no file $config on $(uname -n); examples are in configs/."
    [[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "--nnodes is '$nnodes'; expected the number of nodes, or MIN:MAX."
    [[ $rank =~ ^[0-9]+$ ]] || fail "--node-rank is '$rank'; expected 0 on the head, and 1, 2, ... on the other nodes."
    [ -n "$head" ] || head=${names[0]:+$(address "${names[0]}")}
    [ -n "$head" ] || [ "$nnodes" = 1 ] || fail "no --head given; give the name of node 0 as the other nodes reach it."
fi
# Below the ports of outgoing connections (from 32768 on Linux), and a different one for each job of a node.
port=29400
[ -z "$job" ] || port=$((20000 + job % 12000))
case $head in *:*) port=${head##*:} head=${head%:*} ;; esac
[[ $port =~ ^[0-9]+$ ]] || fail "--head names the port '$port'; give HOST:PORT."
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-}}
if [ -n "$direct" ]; then # only rank 0 needs the port, not all tasks of its node; each task has its own cores
    rank=${SLURM_PROCID:-0} cpus=${SLURM_CPUS_PER_TASK:-1} nproc=1
fi
# The node that our address must reach: the head, or on the head itself the second node.
peer=$head
[ -n "$peer" ] || { [ ${#names[@]} -gt 1 ] && peer=$(address "${names[1]}"); } || peer=127.0.0.1

# The address of this node on the way to the others, and the interface that has it. torch would choose wrong ones where
# a node's own name resolves to 127.0.1.1 (Debian), or where it has several interfaces.
found=$(
    "$python" - "$peer" "$rank" "$port" "$print_head" "$cpus" <<'PYTHON'
import contextlib, os, pathlib, socket, struct, sys

peer, rank, port, print_head, allowed = sys.argv[1:]


def source(host):
    """Return our address on the way to a host; connecting a datagram socket sends nothing."""
    family, *_, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return probe.getsockname()[0]


def interfaces():
    import fcntl

    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            reply = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
            yield name, socket.inet_ntoa(reply[20:24])


def free(port):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):
            probe.bind(("", port))
            return True
    return False


try:
    address = source(peer)
except OSError as error:
    sys.exit(f"node.sh: {peer} cannot be reached from {socket.gethostname()} ({error}); give an address with --head.")
if address.startswith("127.") and not peer.startswith("127.") and peer != "localhost":
    # our own name, which resolves to this machine: take the interface that leads out (no packet is sent)
    outward = [value for _, value in interfaces() if not value.startswith("127.")]
    with contextlib.suppress(OSError):
        outward.insert(0, source("192.0.2.1"))
    address = (outward or [address])[0]
interface = next((name for name, value in interfaces() if value == address), "")
port = int(port)
if print_head:
    # the step of 997 leads jobs with neighbouring numbers, which often start together, to different ports
    port = next((p for p in (20000 + (port - 20000 + 997 * k) % 12000 for k in range(100)) if free(p)), port)
elif rank == "0" and not free(port):
    sys.exit(f"node.sh: port {port} of this node is taken; give another port on every node: --head HOST:PORT.")
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
with contextlib.suppress(OSError, ValueError):  # the share of a container; "max" means no limit
    quota, period = map(int, pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split())
    cores = min(cores, max(1, quota // period))
print(address, interface or "-", port, min(cores, int(allowed or cores)))
PYTHON
) || exit 2
read -r address interface port cores <<<"$found"
if [ -n "$print_head" ]; then
    printf '%s\n' "$address:$port"
    exit 0
fi

if [ -z "$nproc" ]; then
    nproc=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true)
    [ "$nproc" -gt 0 ] || nproc=1
fi
[[ $nproc =~ ^[1-9][0-9]*$ ]] || fail "--nproc is '$nproc'; expected a whole number, at least 1."
threads=$((cores / nproc))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# gloo resolves the node's own name, see above; NCCL chooses an interface by itself (slurm/env.example.sh)
[ "$interface" = - ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}

if [ -n "$direct" ]; then
    export MASTER_ADDR=${head:-$address} MASTER_PORT=$port
    command=("$python" "$root/launch/train.py" "$config")
else
    command=("$python" -P -m tinytrain_dist.agent --nnodes "$nnodes" --nproc-per-node "$nproc" --rdzv-backend c10d)
    command+=(--rdzv-endpoint "${head:-$address}:$port" --local-addr "$address" --max-restarts "$max_restarts")
    # is_host: torch would guess by names. The time-outs leave time for nodes that import slowly from a shared disk.
    command+=(--rdzv-conf "is_host=$((rank == 0)),join_timeout=600,read_timeout=300")
    command+=(--rdzv-id "${rdzv_id:-${TINYTRAIN_ATTEMPT:-${job:-tinytrain}}}" "$root/launch/train.py" "$config")
fi
command+=(${settings[@]+"${settings[@]}"})
if [ -n "$dry_run" ]; then
    env | grep -E '^(OMP_NUM_THREADS|GLOO_SOCKET_IFNAME|MASTER_(ADDR|PORT))=' | sort
    printf '%q ' "${command[@]}"
    printf '\n'
    exit 0
fi
exec "${command[@]}"
