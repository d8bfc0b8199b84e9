"""Check for `tinytrain doctor` that the nodes of a job can connect to each other.

Works over the store of the rendezvous, without collectives: where a connection is blocked, a collective would hang.
"""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

from tinytrain_dist.cli.machine_checks import interfaces
from tinytrain_dist.distributed.network import is_loopback, resolve, why_unreachable
from tinytrain_dist.distributed.rendezvous import Rendezvous

MAX_ALL_PAIRS_NODES = 16  # up to so many nodes, each connects to each other node
NUM_NEIGHBOURS = 8  # with more nodes, each connects to the next so many, in the order of their names
CONNECT_SECONDS = 3.0


def check_network(meeting: Rendezvous, seconds: float) -> tuple[list[str], str]:
    """Let one rank of each node connect to each other node.

    Returns the problems, the same on every rank, and a text for the case that there are none. seconds: to wait for
    other ranks.
    """
    host = socket.gethostname()
    with socket.create_server(("", 0), backlog=1024) as server:  # the kernel accepts connections by itself
        own_card = [host, server.getsockname()[1], interfaces()]
        cards = meeting.exchange("cards", own_card, seconds)
        nodes: dict[str, tuple[int, dict[str, str]]] = {}
        for card in cards:
            if card is not None:
                name, port, addresses = card
                nodes.setdefault(name, (port, addresses))  # of each node, the card of its first rank
        names = sorted(nodes)
        own_index = names.index(host)
        others = names[own_index + 1 :] + names[:own_index]
        peers = others if len(names) <= MAX_ALL_PAIRS_NODES else others[:NUM_NEIGHBOURS]
        is_first_of_node = meeting.hosts.index(host) == meeting.rank
        problems = try_peers(host, {name: nodes[name] for name in peers}) if is_first_of_node else []
        patience_seconds = seconds + CONNECT_SECONDS * (1 + len(peers))
        problems_by_rank = meeting.exchange("reached", problems, patience_seconds)
    all_problems = []
    for rank, found in enumerate(problems_by_rank):
        if found is None:
            all_problems.append(f"network: rank {rank} ({meeting.hosts[rank]}) stopped responding")
    for found in problems_by_rank:
        all_problems += found or []
    reached = "all" if len(peers) == len(others) else len(peers)
    return all_problems, f"{len(names)} node(s), each reaches {reached} others"


def try_peers(host: str, peers: dict[str, tuple[int, dict[str, str]]]) -> list[str]:
    """Return what is wrong on the way from `host`, this machine, to each peer.

    peers: name -> port that listens there, and address by interface.
    """
    with ThreadPoolExecutor(max(1, len(peers))) as pool:
        results = pool.map(lambda name: _try_peer(host, name, *peers[name]), peers)
        return [problem for result in results for problem in result]


def _try_peer(host: str, name: str, port: int, addresses: dict[str, str]) -> list[str]:
    """Check that a peer's name is not this machine, and that one of its addresses can be reached."""
    known = resolve(name)
    if known and all(map(is_loopback, known)):
        return [f"network: {name} resolves to {known[0]} on {host}, which is {host} itself; fix /etc/hosts there"]
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
        "ask for the interface that joins them"
    ]
