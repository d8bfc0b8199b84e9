"""An agent that has lost its connection to the store: whether the store is gone, or only the network is cut."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import pytest

from tests.launch.test_elastic_nodes import own_rendezvous
from tinytrain_dist.distributed.torchrun_internals import SILENT_STORE_SECONDS, ElasticRendezvous, serve_store
from tinytrain_dist.launch import lost_store
from tinytrain_dist.launch.agent_state import agent
from tinytrain_dist.launch.lost_store import LostStore


class Answers:
    """A rendezvous whose store gives these answers, one after the other."""

    def __init__(self, *answers: bool | None) -> None:
        self.left = list(answers)

    def is_served_at(self, endpoint: str, key: str, value: str) -> bool | None:
        return self.left.pop(0)


@pytest.fixture(autouse=True)
def _agent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TINYTRAIN_STOP", raising=False)
    monkeypatch.setattr(lost_store, "PROBE_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(agent, "joins_again", False)


def joins_again(*answers: bool | None, alive: int = 100, value: str = "a") -> bool:
    """Return whether the node joins again. alive: how often its ranks are found alive."""
    looks = iter(range(alive))
    store: Any = Answers(*answers)
    LostStore(store, "store:1", "session", value).wait(lambda: next(looks, None) is not None, 60.0)
    assert store.left == [], "it asked less often"
    return agent.joins_again


def test_a_node_that_was_cut_off_joins_again_when_the_store_answers() -> None:
    assert joins_again(None, None, True)


def test_the_return_of_the_network_may_end_the_ranks_before_the_store_is_asked() -> None:
    assert joins_again(None, True, alive=0)
    assert joins_again(None, None, None, True, alive=1), "or they have saved, because all nodes had lost the store"


def test_a_store_that_is_gone_is_not_asked_again_and_the_ranks_may_save() -> None:
    assert not joins_again(None, False, alive=5)


def test_a_node_whose_run_has_not_begun_or_is_to_stop_does_not_join_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not joins_again(value="", alive=2)
    monkeypatch.setenv("TINYTRAIN_STOP", "SIGTERM")
    assert not joins_again(alive=2)


def test_a_store_is_known_by_its_run() -> None:
    store = serve_store(0)
    rendezvous = ElasticRendezvous(own_rendezvous(store, 1))
    rendezvous.write_once("session", "a")
    endpoint = f"127.0.0.1:{store.port}"
    assert rendezvous.is_served_at(endpoint, "session", "a") is True
    assert rendezvous.is_served_at(endpoint, "session", "b") is False, "another store, at the same address"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        assert rendezvous.is_served_at(f"127.0.0.1:{port}", "session", "a") is False, "nothing listens there"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert rendezvous.is_served_at(f"127.0.0.1:{port}", "session", "a") is None, "nothing answers there"


def test_a_connection_to_the_store_is_given_up_after_a_while() -> None:
    store = serve_store(0)
    rendezvous = ElasticRendezvous(own_rendezvous(store, 1))
    before = len(os.listdir("/proc/self/fd"))
    rendezvous.limit_silence(f"127.0.0.1:{store.port}")
    assert len(os.listdir("/proc/self/fd")) == before, "of files that are no sockets, too, nothing stays open"
    limits = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as copy:
            if copy.getpeername()[1:2] == (store.port,):
                limits.append(copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT))
    assert limits
    assert set(limits) == {SILENT_STORE_SECONDS * 1000}
