"""Let the ranks of a launch find each other before there is a process group, and name those that are missing.

Ranks read the launcher's variables (torchrun's or Slurm's) and connect to a key-value store that rank 0 or torchrun
serves at MASTER_ADDR:MASTER_PORT. If ranks are missing, a wait on the store times out and can be reported, whereas a
collective would hang. `context` then makes the process groups over the same store. Must not know collectives.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tinytrain_dist.distributed.network import is_ip_address, is_loopback, resolve, slurm_hosts, why_unreachable
from tinytrain_dist.distributed.torch_internals import (
    in_process_store,
    prefix_store,
    tcp_store,
)
from tinytrain_dist.errors import ConfigError, RendezvousError
from tinytrain_dist.utils.text import first_line, format_list
from tinytrain_dist.utils.waiting import WaitNotice

LOOK_SECONDS = 1.0  # how often to check whether a rank has joined
RENDEZVOUS_SECONDS = 600.0  # ranks import torch first, which can take minutes from a slow disk
_rendezvous_count = itertools.count()  # calls of `rendezvous` in this process; the same number on all ranks


@dataclass(frozen=True)
class Rendezvous:
    """The ranks of a launch, after they have found each other.

    * `store`: a torch.distributed store that all ranks share.
    * `rank`: the rank of this process.
    * `hosts`: host names by rank.
    """

    store: Any
    rank: int
    hosts: list[str]

    def exchange(self, name: str, value: Any, seconds: float) -> list[Any]:
        """Return the values of all ranks by rank; None for a rank that has not called this within `seconds`.

        Every rank gets the same list. Every rank passes the same `name`, which must not be used a second time. `value`
        must be representable as JSON. Blocks for at most `seconds` on rank 0, and for at most twice as long on the
        others. Errors: RendezvousError if rank 0 has not answered by then.
        """
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            keys = [f"{name}/{rank}" for rank in range(len(self.hosts))]
            notice = WaitNotice(lambda: self._describe_missing(keys), seconds)
            deadline = time.monotonic() + seconds
            values = [self._read(key) if self._wait_for(key, deadline, notice) else None for key in keys]
            self.store.set(name, json.dumps(values))
        # rank 0 may itself be late by up to `seconds`, and then waits up to `seconds` for the others
        limit_seconds = 2 * seconds + 1
        notice = WaitNotice(lambda: "rank 0, which reports which ranks have joined", limit_seconds)
        if not self._wait_for(name, time.monotonic() + limit_seconds, notice if _is_local_rank_zero() else None):
            raise RendezvousError(
                f"MASTER_ADDR: rank {self.rank} on {socket.gethostname()} timed out after {2 * seconds:g} s waiting "
                "for rank 0; look at the log of rank 0"
            )
        answer: list[Any] = self._read(name)
        return answer

    def _wait_for(self, key: str, deadline: float, notice: WaitNotice | None) -> bool:
        """Return whether a key is set by the deadline. Looks at least once.

        `notice`: what to log from time to time while this waits; None to log nothing.
        """
        while True:
            seconds_left = deadline - time.monotonic()
            try:
                self.store.wait([key], timedelta(seconds=max(0.001, min(LOOK_SECONDS, seconds_left))))
                return True
            except dist.DistNetworkError:  # the process that serves the store has ended
                return False
            except dist.DistStoreError:
                pass  # the key is not set yet
            if seconds_left <= LOOK_SECONDS:
                return False
            if notice is not None:
                notice.check()

    def _read(self, key: str) -> Any:
        return json.loads(self.store.get(key))

    def _describe_missing(self, keys: list[str]) -> str:
        """Return a text for a log line: which ranks have not set their key yet. `keys`: one for each rank."""
        missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
        return f"{len(missing)} of {len(keys)} ranks to join: rank {format_list(missing)}"


def _is_local_rank_zero() -> bool:
    """Return whether this rank has local rank 0: only one rank of each node logs that it waits."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def rendezvous(seconds: float = RENDEZVOUS_SECONDS) -> Rendezvous:
    """Find all ranks that the launcher has started; without a launcher, return a rendezvous of one rank.

    Every rank calls it; blocks for about `seconds` at most.
    Errors:

    * RendezvousError if variables of the launcher are missing, if this rank cannot reach or serve the store, or if rank
      0 does not answer.
    * ConfigError on every rank if ranks are missing, or if a host would give the others a loopback address.
    * ConfigError as in `adopt_slurm_variables`.
    """
    adopt_slurm_variables()
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if "RANK" not in os.environ:
        return Rendezvous(in_process_store(), 0, [socket.gethostname()])
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RendezvousError(
            f"{', '.join(missing)}: not set, but RANK is {rank}; start with `tinytrain train` or torchrun"
        )
    head, port = _head_address(), int(os.environ["MASTER_PORT"])
    if _all_on_one_node():
        # otherwise gloo resolves the machine's own name, which is often unknown in a container
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    store = prefix_store(_attempt_prefix(), _connect(rank, world_size, head, port, seconds))
    hosts_by_rank = Rendezvous(store, rank, [""] * world_size).exchange("hosts", _describe_own_host(), seconds)
    _check_hosts(hosts_by_rank, seconds, f"{head}:{port}")
    return Rendezvous(store, rank, [description["host"] for description in hosts_by_rank])


def set_launcher_variables(rank: int, world_size: int, head: str, port: int) -> None:
    """Set the environment variables that a launcher sets, for one process on each of `world_size` nodes."""
    given = {
        "RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": 0,
        "LOCAL_WORLD_SIZE": 1,
        "MASTER_PORT": port,
    }
    os.environ.update({name: str(value) for name, value in given.items()}, MASTER_ADDR=head)


def adopt_slurm_variables() -> None:
    """Set torchrun's variables from Slurm's if each Slurm task is a rank (`srun --ntasks-per-node=N`).

    Does nothing under torchrun or outside of Slurm. Errors: ConfigError if MASTER_ADDR is not set.
    """
    env = os.environ
    # sbatch sets SLURM_NTASKS in the batch script, too; only in a step with several tasks is each task a rank
    single_task = int(env.get("SLURM_STEP_NUM_TASKS", 1)) == 1
    if "RANK" in env or "SLURM_PROCID" not in env or ("MASTER_ADDR" not in env and single_task):
        return
    # "4(x2),3" means two nodes with 4 tasks each and one node with 3 tasks
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_TASKS_PER_NODE"])
    tasks_per_node = [tasks for tasks, nodes in counts for _ in range(int(nodes or 1))]
    env.update(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env["SLURM_NTASKS"],
        LOCAL_RANK=env["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=tasks_per_node[int(env["SLURM_NODEID"])],
    )
    if "MASTER_ADDR" not in env:  # without this error each task would train the same model alone
        raise ConfigError(
            f"MASTER_ADDR: not set, but srun started {env['WORLD_SIZE']} tasks; export MASTER_ADDR (the first node's "
            "name) and MASTER_PORT, or start one tinytrain_dist.agent per node"
        )


def _connect(rank: int, world_size: int, head: str, port: int, seconds: float) -> Any:
    """Return the store at head:port, which rank 0 serves unless torchrun does. Errors: RendezvousError."""
    is_server = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not is_server:
        _check_reachable(rank, head, port, seconds)
    try:
        return tcp_store(head, port, world_size, is_server, timedelta(seconds=seconds))
    except RuntimeError as error:
        raise RendezvousError(
            f"MASTER_PORT: rank {rank} on {socket.gethostname()} cannot use {head}:{port} "
            f"({first_line(error)}); choose another port, and set MASTER_ADDR to the host of rank 0"
        ) from None


def _check_reachable(rank: int, head: str, port: int, seconds: float) -> None:
    """Try for `seconds` to connect to head:port. Errors: RendezvousError with the address, and why it failed."""
    notice = WaitNotice(lambda: f"rank 0 at {head}:{port}, which rank {rank} cannot reach yet", seconds)
    problem = why_unreachable(head, port, seconds, notice.check if _is_local_rank_zero() else None)
    if not problem:
        return
    host = socket.gethostname()
    addresses = resolve(head)
    advice = "check that rank 0 runs there and that no firewall blocks the port"
    if any(is_loopback(address) for address in addresses):
        advice = (
            f"on {host}, {head} means {host} itself: set MASTER_ADDR to the head node's address in the nodes' network, "
            "or fix /etc/hosts"
        )
    raise RendezvousError(
        f"MASTER_ADDR: rank {rank} on {host} cannot reach {head}:{port} ({problem}; the name resolves to "
        f"{', '.join(addresses) or 'no address'}); {advice}"
    )


def _all_on_one_node() -> bool:
    """Return whether the launcher has started all ranks on this node."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]


def _head_address() -> str:
    """Return the host of the store: MASTER_ADDR, or the loopback address if that is safe.

    It is safe if all ranks are on one node and MASTER_ADDR is a name. torchrun may set MASTER_ADDR to the machine's own
    name, which need not resolve to any address.
    """
    head = os.environ["MASTER_ADDR"]
    return "127.0.0.1" if _all_on_one_node() and not is_ip_address(head) else head


def _attempt_prefix() -> str:
    """Return a prefix for the store's keys that differs between restarts and between calls of `rendezvous`.

    torchrun's own store may survive a restart and then still holds the addresses of ranks that have ended. torchrun's
    restart count tells attempts apart, but only ranks on the same node have the same count. So a run on several nodes
    must be started with tinytrain_dist.agent, or with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _all_on_one_node() else "0"
    return f"rendezvous{attempt}.{next(_rendezvous_count)}"


def _describe_own_host() -> dict[str, Any]:
    """Return {"host": this host's name, "loopback": its address if other hosts cannot use it, else ""}.

    Unless an interface is configured, gloo gives the other ranks the address that the host's own name resolves to. If
    that is a loopback address, they cannot reach it.
    """
    host = socket.gethostname()
    addresses = [] if _all_on_one_node() else resolve(host)
    interface_set = any(name in os.environ for name in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"))
    unusable = bool(addresses) and is_loopback(addresses[0]) and not interface_set
    return {"host": host, "loopback": addresses[0] if unusable else ""}


def _check_hosts(hosts_by_rank: list[Any], seconds: float, head: str) -> None:
    """Check that no rank is missing and that every host has an address that the others can use.

    `hosts_by_rank`: what `_describe_own_host` returned on each rank; None for a missing rank. `head`: where ranks join.
    Errors: ConfigError naming the missing ranks, or the hosts whose address the others cannot use.
    """
    missing = [rank for rank, description in enumerate(hosts_by_rank) if description is None]
    loopback_of_host = {entry["host"]: entry["loopback"] for entry in hosts_by_rank if entry}
    if missing:
        absent = [name for name in slurm_hosts() if name not in loopback_of_host]
        raise ConfigError(
            f"{len(missing)} of {len(hosts_by_rank)} ranks did not join at {head} within {seconds:g} s: rank "
            f"{format_list(missing)}; hosts that joined: {format_list(list(loopback_of_host))}"
            + (f"; hosts without a rank: {format_list(absent)}" if absent else "")
            + "; look at the logs of the missing ranks, and check that every node was started with the same number of "
            "nodes, address and port"
        )
    unusable = [f"{host} ({address})" for host, address in loopback_of_host.items() if address]
    if len(loopback_of_host) > 1 and unusable:
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME: not set, and the host name of {format_list(unusable)} resolves to a loopback "
            "address, which the other nodes cannot reach; set it to the interface of the nodes' network (ip addr), or "
            "fix /etc/hosts"
        )
