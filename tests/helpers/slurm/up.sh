#!/usr/bin/env bash
# Starts a real Slurm cluster (one controller and some nodes) on this machine, for tests.
#
# Usage: eval "$(tests/helpers/slurm/up.sh [-n NODES] [-c CPUS] [-g GPUS] [-k KILLWAIT_S] [-p cgroup|linuxproc] [-o LINE]... DIR)"
#   -n, -c, -g   nodes (4), and how many CPUs (8) and GPUs (8) each declares; nothing but the declaration is needed
#   -k           seconds between SIGTERM and SIGKILL (10; Slurm's own default is 30)
#   -p           what tracks processes. cgroup, as real clusters have it: signals reach only the tasks that srun
#                started, and orphans of a task die with it. linuxproc signals every descendant, and hides mistakes.
#                Default: cgroup where a version 1 freezer can be mounted.
#   -o           a line for the end of slurm.conf
#
# Each node has its own network, host name, process table and mounts, and can be powered off (down.sh -N node2 DIR).
# As on Debian, a node's own name means 127.0.1.1 to itself. The machine's network and files are not touched; clusters
# in different folders do not meet. Partitions: main (its jobs are preempted and requeued by those of urgent), grace
# (the same with GraceTime=30), urgent. Run it again to bring back nodes that are down. Needs root.
#
# Prints shell lines: SLURM_CONF, and a PATH with sbatch, squeue, ... and `on NODE COMMAND`, which runs inside a node.
set -euo pipefail

nodes=4 cpus=8 gpus=8 mem=4096 killwait=10 proctrack=auto extra=
net=10.99.0                         # /24, exists only inside the namespaces
while getopts n:c:g:k:p:o:h o; do
    case $o in
        n) nodes=$OPTARG ;; c) cpus=$OPTARG ;; g) gpus=$OPTARG ;;
        k) killwait=$OPTARG ;; p) proctrack=$OPTARG ;; o) extra+=$OPTARG$'\n' ;;
        h) sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) exit 2 ;;
    esac
done
shift $((OPTIND - 1))
t0=$(date +%s%N)
say() { printf 'up.sh: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }
[ "$(id -u)" = 0 ] || die "needs root (try sudo)"
{ [ "$nodes" -ge 1 ] && [ "$nodes" -le 200 ]; } || die "-n must be 1..200"

dir=${1:?usage: up.sh [OPTIONS] DIR}
mkdir -p "$dir"; dir=$(cd "$dir" && pwd -P)
case $dir in *[!A-Za-z0-9/._-]*) die "characters in $dir that slurm.conf does not take" ;; esac
[ -e "$dir/.cluster" ] || [ -z "$(ls -A "$dir")" ] || die "$dir holds something else"
: >>"$dir/.cluster"
chmod 755 "$dir"
exec 9>"$dir/.lock"; flock 9         # one up.sh or down.sh at a time

# ---- what must be there
PATH=$PATH:/usr/sbin:/sbin
for program in slurmctld slurmd sbatch munged ip nsenter; do
    command -v "$program" >/dev/null || die "there is no $program; .ci/run installs what is needed"
done
unshare --net --uts --mount --pid --fork true || die "cannot make namespaces (CAP_SYS_ADMIN?)"

# --- processes by exact identity --------------------------------------------------
# run/NAME holds "PID STARTTIME" of the unshare process that holds NAME's namespaces;
# killing it kills all that runs in them.  (A zombie counts as gone.)
start_of() { sed -n 's/^.*) \([^ZX] \)/\1/p' "/proc/$1/stat" 2>/dev/null | cut -d' ' -f20; }
alive() {
    local pid st
    read -r pid st 2>/dev/null <"$dir/run/$1" || return 1
    [ -n "$pid" ] && [ "$(start_of "$pid")" = "$st" ] && echo "$pid"
}
ns() { readlink "/proc/$1/ns/$2" 2>/dev/null || true; }
spawn() {  # NAME SCRIPT: run SCRIPT, once released by go, as init of new namespaces
    local name=$1 script=$2 pid i n
    rm -f "$dir/run/$name.go"
    # shellcheck disable=SC2016  # expanded in there
    setsid unshare --net --uts --mount --pid --fork --kill-child --mount-proc \
        bash -c 'while [ ! -e "$1.go" ]; do sleep 0.05; done; . "$2"' "$name" \
        "$dir/run/$name" "$script" >>"$dir/log/$name.out" 2>&1 </dev/null 9>&- &
    pid=$!
    for i in $(seq 250); do            # until it has left all our namespaces
        [ -d "/proc/$pid" ] || die "$name did not start, see $dir/log/$name.out"
        n=0
        for k in net uts mnt; do [ "$(ns $pid $k)" != "$(ns self $k)" ] && n=$((n + 1)); done
        [ "$(ns $pid pid_for_children)" != "$(ns self pid)" ] && n=$((n + 1))
        [ $n = 4 ] && break
        sleep 0.02
    done
    echo "$pid $(start_of "$pid")" >"$dir/run/$name"
    spawned=$pid
}
go() { : >"$dir/run/$1.go"; }

mkdir -p "$dir"/{run,log,bin}
for f in "$dir"/run/*; do            # forget what died
    case $f in *.go | *.sh | *'*') ;; *) alive "${f##*/}" >/dev/null || rm -f "$f" "$f.go" ;; esac
done

# --- controller and configuration ---------------------------------------------------
if ! ctl=$(alive ctl); then
    for f in "$dir"/run/node*; do
        case $f in *.go | *.sh | *'*') ;; *) die "nodes without a controller: run down.sh first" ;; esac
    done
    rm -rf "${dir:?}"/{ctld,spool,munge,log,run,dev,cgroup}
    mkdir -p "$dir"/{run,log,munge,ctld,spool,cgroup/freezer}
    echo "$nodes" >"$dir/nodes"
    chmod 755 "$dir/munge"; chmod 700 "$dir/ctld"
    (umask 077; head -c 1024 /dev/urandom >"$dir/munge/key")
    {
        echo "127.0.0.1 localhost"
        echo "$net.1 ctl"
        for i in $(seq "$nodes"); do echo "$net.$((10 + i)) node$i"; done
    } >"$dir/hosts"
    : >"$dir/resolv.conf"              # no DNS inside: unknown names fail at once
    cg=tinytrain-slurm-$(printf %s "$dir" | cksum | cut -d' ' -f1)
    if [ "$proctrack" = auto ]; then
        proctrack=linuxproc
        unshare --mount sh -c "mount -t cgroup -o freezer none '$dir/cgroup/freezer' &&
            mkdir -p '$dir/cgroup/freezer/$cg'" 2>/dev/null &&
            unshare --cgroup true 2>/dev/null && proctrack=cgroup
    fi
    echo "$proctrack $cg" >"$dir/proctrack"
    if [ "$proctrack" = cgroup ]; then
        printf '%s\n' CgroupPlugin=cgroup/v1 "CgroupMountpoint=$dir/cgroup" >"$dir/cgroup.conf"
    else                               # slurmd loads a cgroup plugin even when nothing uses it
        case $(slurmd -V) in
            *" "2[0-2].*) echo "CgroupPlugin=cgroup/v1" ;;
            *) echo "CgroupPlugin=disabled" ;;
        esac >"$dir/cgroup.conf"
    fi
    gres='' grestypes=''
    : >"$dir/gres.conf"
    if [ "$gpus" -gt 0 ]; then         # pretend GPUs: any character devices (/dev/null's kind)
        mkdir "$dir/dev"
        for i in $(seq 0 $((gpus - 1))); do mknod -m 666 "$dir/dev/gpu$i" c 1 3; done
        echo "Name=gpu File=$dir/dev/gpu[0-$((gpus - 1))] Flags=nvidia_gpu_env" >"$dir/gres.conf"
        gres="Gres=gpu:$gpus" grestypes="GresTypes=gpu"
    fi
    cat >"$dir/slurm.conf" <<CONF
ClusterName=mini
SlurmctldHost=ctl($net.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it starts again (default 120)
AuthInfo=socket=$dir/munge/socket,cred_expire=5
StateSaveLocation=$dir/ctld
SlurmdSpoolDir=$dir/spool/%n
SlurmctldPidFile=$dir/ctld/pid
SlurmdPidFile=$dir/spool/%n/pid
SlurmctldLogFile=$dir/log/slurmctld.log
SlurmdLogFile=$dir/log/%n.log
ProctrackType=proctrack/$proctrack
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,sched_min_interval=0,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
ReturnToService=2
JobRequeue=1
KillWait=$killwait
SlurmdTimeout=10
MessageTimeout=10
# jobs stay visible to scontrol show job (there is no accounting)
MinJobAge=86400
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/log/jobcomp.log
$grestypes
NodeName=DEFAULT CPUs=$cpus RealMemory=$mem $gres State=UNKNOWN
$(for i in $(seq "$nodes"); do echo "NodeName=node$i NodeAddr=$net.$((10 + i))"; done)
PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=INFINITE DefaultTime=60
PartitionName=main Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=grace PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
$extra
CONF
    cat >"$dir/run/common.sh" <<SH
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin SLURM_CONF=$dir/slurm.conf
hostname "\$0"
ip link set lo up
{ sed "s/^[0-9.]* \$0\$/127.0.1.1 \$0/" $dir/hosts >$dir/run/\$0.hosts; }
mount --bind $dir/run/\$0.hosts /etc/hosts
mount --bind $dir/resolv.conf /etc/resolv.conf 2>/dev/null || true
SH
    # The daemons are children of the shell that is pid 1, which reaps orphans; when the
    # daemon ends, the shell ends, and with it everything in the namespaces.
    cat >"$dir/run/ctl.sh" <<SH
. $dir/run/common.sh
ip link add br0 type bridge
ip addr add $net.1/24 dev br0
ip link set br0 up
munged --foreground --force --num-threads=2 --key-file=$dir/munge/key --socket=$dir/munge/socket \
  --pid-file=$dir/munge/pid --log-file=$dir/log/munged.log --seed-file=$dir/munge/seed &
for i in \$(seq 100); do [ -S $dir/munge/socket ] && break; sleep 0.05; done
slurmctld -D -f $dir/slurm.conf &
wait -n
SH
    cat >"$dir/run/node.sh" <<SH
. $dir/run/common.sh
ip addr add \$(awk -v n="\$0" '\$2 == n {print \$1}' $dir/hosts)/24 dev eth0
ip link set eth0 up
mkdir -p $dir/spool/\$0
run='slurmd -D -N "\$0" -f $dir/slurm.conf & wait'
if [ $proctrack = cgroup ]; then     # a freezer hierarchy that looks like the node's own
  mount -t cgroup -o freezer none $dir/cgroup/freezer
  mkdir -p $dir/cgroup/freezer/$cg/\$0
  echo 0 >$dir/cgroup/freezer/$cg/\$0/cgroup.procs
  umount $dir/cgroup/freezer
  exec unshare --cgroup bash -c "mount -t cgroup -o freezer none $dir/cgroup/freezer; \$run" "\$0"
fi
exec bash -c "\$run" "\$0"
SH
    spawn ctl "$dir/run/ctl.sh"; ctl=$spawned
    go ctl
fi
nodes=$(cat "$dir/nodes")

# --- client commands: the real ones, run in the controller's network ------------------
# (inside the cluster, in a job, they only exec the real one)
cat >"$dir/bin/.client" <<SH
#!/bin/bash
for real in /usr/bin/\${0##*/} /usr/sbin/\${0##*/}; do [ -x \$real ] && break; done
[ "\$(readlink /proc/self/ns/net)" = "$(ns self net)" ] || exec \$real "\$@"
unset \${!SLURM_@}
export SLURM_CONF=$dir/slurm.conf
read -r pid _ 2>/dev/null <$dir/run/ctl || { echo "no cluster in $dir" >&2; exit 1; }
exec nsenter --net=/proc/\$pid/ns/net --uts=/proc/\$pid/ns/uts -- \$real "\$@"
SH
cat >"$dir/bin/on" <<SH
#!/bin/bash
# on NODE COMMAND...: run it inside that node, beside its jobs
read -r pid _ 2>/dev/null <"$dir/run/\${1:?node}" || { echo "\$1 is not up" >&2; exit 1; }
shift
exec nsenter --net=/proc/\$pid/ns/net --uts=/proc/\$pid/ns/uts --mount=/proc/\$pid/ns/mnt \
  --pid=/proc/\$pid/ns/pid_for_children --wd=. -- env SLURM_CONF=$dir/slurm.conf "\$@"
SH
chmod 755 "$dir/bin/.client" "$dir/bin/on"
for c in sbatch srun salloc squeue scancel scontrol sinfo sattach sbcast sdiag sprio; do
    ln -sf .client "$dir/bin/$c"
done

# --- nodes ---------------------------------------------------------------------------
# shellcheck disable=SC2016  # expanded in there
nsenter --net="/proc/$ctl/ns/net" sh -c \
    'for t in $(seq 200); do ip link show br0 >/dev/null 2>&1 && exit; sleep 0.05; done; exit 1' ||
    die "no bridge, see $dir/log/ctl.out"
for i in $(seq "$nodes"); do
    n=node$i
    alive "$n" >/dev/null && continue
    spawn "$n" "$dir/run/node.sh"
    nsenter --net="/proc/$ctl/ns/net" sh -c "
        ip link del v$i 2>/dev/null
        ip link add v$i type veth peer name eth0 netns $spawned &&
        ip link set v$i master br0 up" || die "no network for $n"
    go "$n"
done

# --- ready when every node is usable ----------------------------------------------------
up=0
for i in $(seq 300); do
    states=$("$dir/bin/sinfo" -h -N -p main -o '%N %T' 2>/dev/null || true)
    up=$(grep -cE ' (idle|mixed|allocated|completing)$' <<<"$states" || true)
    [ "$up" = "$nodes" ] && break
    [ $((i % 20)) != 0 ] ||            # a test may have drained a node
        awk '$2 ~ /^(drain|fail)/ {print $1}' <<<"$states" | while read -r n; do
            "$dir/bin/scontrol" update nodename="$n" state=resume >&2 || true
        done
    for n in ctl $(seq -f node%g "$nodes"); do
        alive "$n" >/dev/null || { tail -20 "$dir/log/$n.out" >&2; die "$n died"; }
    done
    sleep 0.1
done
[ "$up" = "$nodes" ] || { "$dir/bin/sinfo" -N -l >&2 || true; die "only $up of $nodes nodes up, see $dir/log"; }
say "$nodes nodes up in $dir after $((($(date +%s%N) - t0) / 1000000)) ms"
echo "export SLURM_CONF='$dir/slurm.conf'"
echo "export PATH='$dir/bin':\"\$PATH\""
