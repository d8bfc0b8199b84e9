"""Look up host names and try ports, before any rank has connected to another.

Must not know torch or ranks: it returns reasons as text, and its callers add which rank and host they are about.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable
from typing import Any

UNKNOWN_NAME_SECONDS = 10.0  # a name server may need a second query, but not minutes of them
Resolver = Callable[..., list[Any]]


def resolve(name: str, resolver: Resolver | None = None) -> list[str]:
    """Return every IP address of a host name, without duplicates; none if the name is unknown.

    `resolver`: used instead of socket.getaddrinfo.
    """
    try:
        entries = (resolver or socket.getaddrinfo)(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    # entry[4] is the socket address; "%eth0" after an IPv6 address is its interface
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in entries))


def is_ip_address(text: str) -> bool:
    """Return whether a text is an IP address and no name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Return whether an IP address means "this machine itself", as Debian's 127.0.1.1 does."""
    return ipaddress.ip_address(address).is_loopback


def why_unreachable(host: str, port: int, seconds: float, after_attempt: Callable[[], None] | None = None) -> str:
    """Return "" as soon as a TCP connection could be made, else the reason of the last attempt after `seconds`.

    Tries at least once, and calls `after_attempt` after each failed attempt. An unknown host name ends it after
    UNKNOWN_NAME_SECONDS.
    """
    start = time.monotonic()
    while True:
        seconds_left = start + seconds - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(3.0, seconds_left))):
                return ""
        except socket.gaierror:
            reason = "the name is not known"
            seconds_left = min(seconds_left, start + UNKNOWN_NAME_SECONDS - time.monotonic())
        except ConnectionRefusedError:
            reason = "refused: nothing listens there"
        except TimeoutError:
            reason = "no answer: a firewall, or the wrong network"
        except OSError as error:
            reason = str(error.strerror or error)
        if seconds_left <= 0:
            return reason
        if after_attempt is not None:
            after_attempt()
        time.sleep(min(0.1, seconds_left))
