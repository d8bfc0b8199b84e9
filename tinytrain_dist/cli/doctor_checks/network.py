"""Check for `tinytrain doctor` that the nodes of a job can connect to each other.

Nodes exchange values over the store of the rendezvous. Collectives would hang where a connection is blocked.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

from tinytrain_dist.cli.doctor_checks.machine import interfaces
from tinytrain_dist.distributed.network import is_loopback, resolve, why_unreachable
from tinytrain_dist.distributed.rendezvous import Rendezvous

MAX_ALL_PAIRS_NODES = 16  # up to this many nodes, each node connects to every other node
NUM_NEIGHBOURS = 8  # with more nodes, each connects to this many next nodes, in the order of names
CONNECT_SECONDS = 3.0


def check_network(meeting: Rendezvous, seconds: float) -> tuple[list[str], str]:
    """Let the first rank of each node connect to other nodes.

    Returns the problems, the same on every rank, and a text to print if there are none. seconds: how long to wait for
    other ranks.
    """
    host = socket.gethostname()
    with socket.create_server(("", 0), backlog=1024) as server:  # the kernel accepts connections by itself
        own_endpoint = [host, server.getsockname()[1], interfaces()]
        endpoints = meeting.exchange("endpoints", own_endpoint, seconds)
        nodes: dict[str, tuple[int, dict[str, str]]] = {}
        for endpoint in endpoints:
            if endpoint is not None:
                name, port, addresses = endpoint
                nodes.setdefault(name, (port, addresses))  # of each node, the endpoint of its first rank
        names = sorted(nodes)
        own_index = names.index(host)
        others = names[own_index + 1 :] + names[:own_index]
        peers = others if len(names) <= MAX_ALL_PAIRS_NODES else others[:NUM_NEIGHBOURS]
        is_first_of_node = meeting.hosts.index(host) == meeting.rank
        problems = try_peers(host, {name: nodes[name] for name in peers}) if is_first_of_node else []
        longest_seconds = seconds + CONNECT_SECONDS * (1 + len(peers))
        problems_by_rank = meeting.exchange("problems", problems, longest_seconds)
    all_problems = []
    for rank, rank_problems in enumerate(problems_by_rank):
        if rank_problems is None:
            all_problems.append(f"network: rank {rank} ({meeting.hosts[rank]}) stopped responding")
    for rank_problems in problems_by_rank:
        all_problems += rank_problems or []
    reached = "all" if len(peers) == len(others) else len(peers)
    return all_problems, f"{len(names)} node(s), each reaches {reached} others"


def try_peers(host: str, peers: dict[str, tuple[int, dict[str, str]]]) -> list[str]:
    """Return the problems of connecting from this machine, `host`, to each peer.

    peers: by name, the port that the peer listens on, and its address by interface.
    """
    with ThreadPoolExecutor(max(1, len(peers))) as pool:
        results = pool.map(lambda name: _try_peer(host, name, *peers[name]), peers)
        return [problem for result in results for problem in result]


def _try_peer(host: str, name: str, port: int, addresses: dict[str, str]) -> list[str]:
    """Check that a peer's name does not resolve to this machine, and that one of its addresses can be reached."""
    resolved = resolve(name)
    if resolved and all(map(is_loopback, resolved)):
        return [f"network: {name} resolves to {resolved[0]} on {host}, which is {host} itself; fix /etc/hosts there"]
    failures = {}
    for interface, address in addresses.items():
        reason = why_unreachable(address, port, CONNECT_SECONDS)
        if reason:
            failures[interface] = reason
    if len(failures) < len(addresses):
        return []
    reasons = ", ".join(f"{addresses[interface]} on {interface}: {reason}" for interface, reason in failures.items())
    return [
        f"network: {host} cannot reach {name} ({reasons or 'no address'}); open all ports between nodes, or "
        "ask the administrator which interface connects them"
    ]
