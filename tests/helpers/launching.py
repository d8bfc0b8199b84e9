"""Ports for tests that start nodes on one machine."""

from __future__ import annotations

import socket


def free_port() -> int:
    """Return a TCP port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
