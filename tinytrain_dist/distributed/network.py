"""Ask the network what it knows before any rank is connected: names, addresses, whether a port answers.

Must not know torch or ranks. It returns sentences, and its callers add which rank and host they are about.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable
from typing import Any

UNKNOWN_NAME_SECONDS = 10.0  # a name server may need a second question, but not minutes of them
Resolver = Callable[..., list[Any]]


def resolve(name: str, resolver: Resolver | None = None) -> list[str]:
    """Every address of a name; none where it is not known."""
    try:
        found = (resolver or socket.getaddrinfo)(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))


def is_loopback(address: str) -> bool:
    """Whether an address means "this machine itself", as Debian's 127.0.1.1 does."""
    return ipaddress.ip_address(address).is_loopback


def why_unreachable(host: str, port: int, seconds: float) -> str:
    """ "" once a connection could be made; the reason of the last try when `seconds` are over."""
    start = time.monotonic()
    while True:
        left = start + seconds - time.monotonic()
        try:
            with socket.create_connection((host, port), timeout=max(0.1, min(3.0, left))):
                return ""
        except socket.gaierror:
            reason, left = "the name is not known", min(left, start + UNKNOWN_NAME_SECONDS - time.monotonic())
        except ConnectionRefusedError:
            reason = "refused: nothing listens there"
        except TimeoutError:
            reason = "no answer: a firewall, or the wrong network"
        except OSError as error:
            reason = str(error.strerror or error)
        if left <= 0:
            return reason
        time.sleep(min(0.1, left))
