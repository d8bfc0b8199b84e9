#!/usr/bin/env bash
# Train on this node as one of several. Each node starts one torchrun, and all of them connect to the first node (the head).
#
# Usage: launch/node.sh CONFIG.toml [OPTIONS] [--] [SETTINGS]      the same command on every node, except for --node-rank
#   --nnodes N         number of nodes, or MIN:MAX: the run continues while at least MIN nodes are left
#   --node-rank R      0 on the head; 1, 2, ... on the other nodes
#   --head HOST[:PORT] name or address by which the other nodes reach the head, and a free port there (default: 29400)
#   --nproc P          processes on each node (default: one per GPU; without GPUs 1)
#   --rdzv-id ID       a name for this run, needed if several runs share a head and port (default: tinytrain)
#   --max-restarts M   how often all processes are restarted after one has died (default: 3)
#   --direct           without torchrun: this process is one rank, and srun has started all of them
#   --dry-run          print the command and its environment, and start nothing
#   --print-head       print only HOST:PORT: how other nodes reach this node, and a free port
#   SETTINGS           --name value, with the names of the configuration file; launch/train.py --help lists them
#
# Under Slurm (srun launch/node.sh CONFIG.toml) every option has a default from Slurm's variables; see slurm/train.sbatch.
trap '' USR1 # asks for a stop; must not kill this shell before Python handles it (if it is lost, the deadline stops the run)
set -euo pipefail
self=${BASH_SOURCE[0]}
[ ! -L "$self" ] || self=$(command readlink -f -- "$self")
# shellcheck source=launch/preamble.sh
. "$(command dirname -- "$self")/preamble.sh"

usage() { sed -n '2,/^trap/{/^trap/d;s/^# \{0,1\}//;p}' "$0"; }
fail() {
    print_line 'node.sh: %s' "$*" >&2
    exit 2
}

[ $# -gt 0 ] || fail "no configuration given; try ${place}launch/node.sh --help."
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
[ -x "$python" ] || python=$(command -v "$python" || command -v python3) || fail "there is no Python; run ${place}launch/setup.sh first."
names=()
[ -z "${SLURM_JOB_NODELIST:-}" ] || mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST" 2>/dev/null)
# address NODE: print the address that Slurm has for a node, or its name if Slurm has none
address() { scontrol show node "$1" 2>/dev/null | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p' | grep . || echo "$1"; }

if [ -n "$print_head" ]; then
    rank=0 nnodes=${nnodes:-1}
else
    case $config in '' | -*) fail "the first argument must be a configuration file, not '$config'." ;; esac
    [ -f "$config" ] || fail "there is no file $config on $(uname -n); examples are in ${place}configs/."
    [[ $nnodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] || fail "--nnodes is '$nnodes'; expected the number of nodes, or MIN:MAX."
    [[ $rank =~ ^[0-9]+$ ]] || fail "--node-rank is '$rank'; expected 0 on the head, and 1, 2, ... on the other nodes."
    [ -n "$head" ] || head=${names[0]:+$(address "${names[0]}")}
    [ -n "$head" ] || [ "$nnodes" = 1 ] || fail "no --head given; give the name of node 0 as the other nodes reach it."
fi
# The port is below those of outgoing connections (from 32768 on Linux), and differs between the jobs of a node.
port=29400
[ -z "$job" ] || port=$((20000 + job % 12000))
case $head in *:*) port=${head##*:} head=${head%:*} ;; esac
[[ $port =~ ^[0-9]+$ ]] || fail "--head names the port '$port'; give HOST:PORT."
cpus=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_ON_NODE:-}}
if [ -n "$direct" ]; then # every task is a rank with its own cores; only rank 0 needs the port
    rank=${SLURM_PROCID:-0} cpus=${SLURM_CPUS_PER_TASK:-1} nproc=1
fi
# The node that this node must be able to reach: the head, or, on the head itself, the second node.
peer=$head
[ -n "$peer" ] || { [ ${#names[@]} -gt 1 ] && peer=$(address "${names[1]}"); } || peer=127.0.0.1

# Find the address by which this node reaches the others, and its network interface. torch would choose wrong ones if the
# node's own name resolves to 127.0.1.1 (Debian), or if the node has several interfaces.
found=$(
    "$python" - "$peer" "$rank" "$port" "$print_head" "$cpus" <<'PYTHON'
import contextlib, os, pathlib, socket, struct, sys

peer, rank, port, print_head, allowed = sys.argv[1:]


def source(host):
    """Return the address from which this node reaches a host. Connecting a datagram socket sends nothing."""
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
    # This node's own name resolves to a loopback address: use an interface that leads to other machines (sends nothing).
    outward = [value for _, value in interfaces() if not value.startswith("127.")]
    with contextlib.suppress(OSError):
        outward.insert(0, source("192.0.2.1"))
    address = (outward or [address])[0]
interface = next((name for name, value in interfaces() if value == address), "")
port = int(port)
if print_head:
    # Jobs with neighbouring numbers often start together. A step of 997 leads them to different ports.
    port = next((p for p in (20000 + (port - 20000 + 997 * k) % 12000 for k in range(100)) if free(p)), port)
elif rank == "0" and not free(port):
    sys.exit(f"node.sh: port {port} of this node is taken; give another port on every node: --head HOST:PORT.")
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
with contextlib.suppress(OSError, ValueError):  # the CPU limit of a container; "max": no limit
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
# gloo would use the node's own name, see above; NCCL chooses an interface itself (slurm/env.example.sh)
[ "$interface" = - ] || export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$interface}

if [ -n "$direct" ]; then
    export MASTER_ADDR=${head:-$address} MASTER_PORT=$port
    command=("$python" "$root/launch/train.py" "$config")
else
    command=("$python" -P -m tinytrain_dist.agent --nnodes "$nnodes" --nproc-per-node "$nproc" --rdzv-backend c10d)
    command+=(--rdzv-endpoint "${head:-$address}:$port" --local-addr "$address" --max-restarts "$max_restarts")
    # is_host: torch would guess it from host names. The time-outs are long, because importing from a shared disk is slow.
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
