"""Connections between nodes: which are tried, and what is reported of those that fail."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from tinytrain_dist.cli.doctor_checks import network


def test_peer_is_fine_if_one_of_its_addresses_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "resolve", lambda _: ["10.0.0.2"])
    answers = {"10.0.0.2": "refused", "10.1.0.2": ""}
    monkeypatch.setattr(network, "why_unreachable", lambda address, *_: answers[address])
    peer = {"node2": (5000, {"eth0": "10.0.0.2", "ib0": "10.1.0.2"})}
    assert network.try_peers("node1", peer) == []
    answers["10.1.0.2"] = "no route"
    (problem,) = network.try_peers("node1", peer)
    assert problem.startswith(
        "network: node1 cannot reach node2 (10.0.0.2 on eth0: refused, 10.1.0.2 on ib0: no route)"
    )


def test_peer_whose_name_is_this_machine_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "resolve", lambda _: ["127.0.1.1"])
    (problem,) = network.try_peers("node1", {"node2": (5000, {"eth0": "10.0.0.2"})})
    assert "node2 resolves to 127.0.1.1 on node1, which is node1 itself" in problem


@pytest.mark.parametrize(("num_nodes", "num_peers"), [(2, 1), (16, 15), (17, 8)])
def test_with_many_nodes_each_tries_its_neighbours(
    monkeypatch: pytest.MonkeyPatch, num_nodes: int, num_peers: int
) -> None:
    host = socket.gethostname()
    hosts = [host, *(f"node{node}" for node in range(1, num_nodes))]
    tried: list[str] = []

    def exchange(name: str, value: Any, seconds: float) -> list[Any]:
        if name == "endpoints":
            return [value, *([other, 5000, {}] for other in hosts[1:])]
        return [value, *([] for _ in hosts[2:]), None]  # the last rank has died

    monkeypatch.setattr(network, "try_peers", lambda _, peers: tried.extend(peers) or [])
    meeting: Any = SimpleNamespace(exchange=exchange, hosts=hosts, rank=0)
    problems, ok_text = network.check_network(meeting, 1.0)
    assert len(set(tried)) == num_peers
    assert problems == [f"network: rank {num_nodes - 1} (node{num_nodes - 1}) stopped responding"]
    assert ok_text == f"{num_nodes} node(s), each reaches {'all' if num_nodes <= 16 else 8} others"
