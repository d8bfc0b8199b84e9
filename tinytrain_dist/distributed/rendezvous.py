"""Let ranks find each other over a key-value store, before there are process groups.

A store answers where a collective would hang, so a rank that is missing can be named. Must not know collectives.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from tinytrain_dist.distributed.network import is_loopback, resolve, why_unreachable
from tinytrain_dist.errors import ConfigError, RendezvousError
from tinytrain_dist.utils.text import format_list

RENDEZVOUS_SECONDS = 600.0  # ranks import torch from slow disks before they come
_rendezvous_count = itertools.count()


@dataclass(frozen=True)
class Rendezvous:
    """The store over which ranks find each other, before there are groups: it answers where a collective would hang."""

    store: Any
    rank: int
    hosts: list[str]

    def exchange(self, name: str, value: Any, seconds: float) -> list[Any]:
        """Everybody's (JSON) value, by rank; None for who has not given one within `seconds`. The same on all ranks."""
        deadline = time.monotonic() + seconds
        self.store.set(f"{name}/{self.rank}", json.dumps(value))
        if self.rank == 0:
            found = []
            for key in (f"{name}/{rank}" for rank in range(len(self.hosts))):
                try:
                    self.store.wait([key], timedelta(seconds=max(0.001, deadline - time.monotonic())))
                    found.append(json.loads(self.store.get(key)))
                except dist.DistStoreError:
                    found.append(None)
            self.store.set(name, json.dumps(found))
        try:  # rank 0 may come as late as anybody, and then waits as long
            self.store.wait([name], timedelta(seconds=2 * seconds + 1))
        except (dist.DistStoreError, dist.DistNetworkError):
            raise RendezvousError(
                f"MASTER_ADDR: rank {self.rank} on {socket.gethostname()} timed out after {2 * seconds:g} s waiting "
                "for rank 0; "
                "look at its log"
            ) from None
        answer: list[Any] = json.loads(self.store.get(name))
        return answer


def rendezvous(seconds: float = RENDEZVOUS_SECONDS) -> Rendezvous:
    """Find all ranks that the launcher has announced; alone, a meeting of one.

    Errors: ConfigError within `seconds`: the head cannot be reached, ranks did not come, an address is of no use.
    """
    adopt_slurm_variables()
    rank, world_size, host = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), socket.gethostname()
    if "RANK" not in os.environ:
        return Rendezvous(dist.HashStore(), 0, [host])  # type: ignore[attr-defined]
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise RendezvousError(
            f"{', '.join(missing)}: not set, but RANK is {rank}; start with launch/local.sh or torchrun"
        )
    head, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves and (problem := why_unreachable(head, port, seconds)):
        here = resolve(head)
        advice = "see that rank 0 runs there and that no firewall is between"
        if any(map(is_loopback, here)):
            advice = (
                f"on {host} that is {host} itself: take the head's address in the nodes' network, or fix /etc/hosts"
            )
        raise RendezvousError(
            f"MASTER_ADDR: rank {rank} on {host} cannot reach {head}:{port} ({problem}; the name resolves to "
            f"{', '.join(here) or 'no address'}); {advice}"
        )
    try:
        wait = timedelta(seconds=seconds)
        store: Any = dist.TCPStore(head, port, world_size, serves, wait, False, multi_tenant=True)  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise RendezvousError(
            f"MASTER_PORT: rank {rank} on {host} cannot use {head}:{port} ({str(error).splitlines()[0]}); "
            "take another port, and as MASTER_ADDR the host of rank 0"
        ) from None
    # torchrun's own store may survive a restart with the addresses of the dead in it. Its count of restarts is the same
    # on one node only; several nodes need our agent, or TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    one_node = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_node else "0"
    ours = dist.PrefixStore(f"meeting{attempt}.{next(_rendezvous_count)}", store)  # type: ignore[attr-defined]
    arrivals = Rendezvous(ours, rank, [""] * world_size).exchange("hosts", _own_arrival(), seconds)
    _check_arrivals(arrivals, seconds, f"{head}:{port}")
    return Rendezvous(ours, rank, [one["host"] for one in arrivals])


def set_launcher_variables(rank: int, world_size: int, head: str, port: int) -> None:
    """Do what a launcher does, for one process on each of `world_size` nodes."""
    given = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()}, MASTER_ADDR=head)


def _own_arrival() -> dict[str, Any]:
    """Return this rank's host, and the address gloo would announce if other hosts cannot use that address."""
    own = resolve(socket.gethostname())
    named = any(name in os.environ for name in ("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"))
    return {"host": socket.gethostname(), "loopback": own[0] if own and is_loopback(own[0]) and not named else ""}


def _check_arrivals(arrivals: list[Any], seconds: float, head: str) -> None:
    missing = [rank for rank, one in enumerate(arrivals) if one is None]
    hosts = {one["host"]: one["loopback"] for one in arrivals if one}
    if missing:
        absent = [name for name in _slurm_hosts() if name not in hosts]
        raise ConfigError(
            f"{len(missing)} of {len(arrivals)} ranks did not come to {head} within {seconds:g} s: rank "
            f"{format_list(missing)}; there were {format_list(list(hosts))}"
            + (f", and none from {format_list(absent)}" if absent else "")
            + "; look at the logs of the others, and whether every node was started with the same numbers"
        )
    if len(hosts) > 1 and (wrong := [f"{host} ({address})" for host, address in hosts.items() if address]):
        raise ConfigError(
            f"GLOO_SOCKET_IFNAME: not set, and the name of {format_list(wrong)} resolves to the machine itself, "
            "which it would tell the others; set it to the interface of the nodes' network (ip addr), or fix /etc/hosts"
        )


def _slurm_hosts() -> list[str]:
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    try:
        command = ["scontrol", "show", "hostnames", nodes or ""]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() if nodes else []
    except (OSError, subprocess.CalledProcessError):
        return []


def adopt_slurm_variables() -> None:
    """Take Slurm's names for rank and world where its tasks are the processes (`srun --ntasks-per-node=N`)."""
    env = os.environ
    alone = int(env.get("SLURM_STEP_NUM_TASKS", 1)) == 1  # sbatch sets SLURM_NTASKS for its own shell, too
    if "RANK" in env or "SLURM_PROCID" not in env or ("MASTER_ADDR" not in env and alone):
        return
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", env["SLURM_TASKS_PER_NODE"])  # "4(x2),3": nodes with 4, 4 and 3 tasks
    per_node = [tasks for tasks, nodes in runs for _ in range(int(nodes or 1))]
    env.update(
        RANK=env["SLURM_PROCID"],
        WORLD_SIZE=env["SLURM_NTASKS"],
        LOCAL_RANK=env["SLURM_LOCALID"],
        LOCAL_WORLD_SIZE=per_node[int(env["SLURM_NODEID"])],
    )
    if "MASTER_ADDR" not in env:  # each would be a world of one, and all would train the same
        raise ConfigError(
            f"MASTER_ADDR: not set, but srun started {env['WORLD_SIZE']} tasks; export MASTER_ADDR (the first node's "
            "name) and MASTER_PORT, or start one tinytrain_dist.agent per node"
        )
