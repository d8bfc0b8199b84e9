"""Check names, addresses and ports, as other machines see them."""

from __future__ import annotations

import socket
from typing import Any

from tests.helpers.launching import free_port
from tinytrain_dist.distributed import network

DEBIAN = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.1.1", 0))]


def test_a_loopback_host_name_is_distinguished_from_an_address() -> None:
    assert network.resolve("node7", lambda *_, **__: DEBIAN * 2) == ["127.0.1.1"]
    assert network.is_loopback("127.0.1.1")
    assert network.is_loopback("::1")
    assert not network.is_loopback("10.0.0.7")


def test_unknown_name_has_no_address() -> None:
    def nobody(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert network.resolve("no-such-host", nobody) == []


def test_port_that_listens_is_reached_and_a_closed_one_is_not() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert network.why_unreachable("127.0.0.1", server.getsockname()[1], 5) == ""
    assert network.why_unreachable("127.0.0.1", free_port(), 0) == "refused: nothing listens there"
