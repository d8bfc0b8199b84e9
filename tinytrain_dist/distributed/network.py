"""Look up host names, addresses of this machine and ports, before any rank has connected to another.

Must not know torch or ranks: functions return reasons as text, and their callers add the rank and the host.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

UNKNOWN_NAME_SECONDS = 10.0  # how long to repeat a failed look-up: a name server may need a second query
GET_INTERFACE_ADDRESS = 0x8915  # the ioctl SIOCGIFADDR of Linux
DOCUMENTATION_ADDRESS = "192.0.2.1"  # belongs to no machine; the way to it leads out of this machine (RFC 5737)
LISTENER_VARIABLE = "TINYTRAIN_LISTENER"
Resolver = Callable[..., list[Any]]


class StoreLostError(Exception):
    """The store through which the nodes of a run find each other cannot be reached any more."""


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
    """Return whether a text is an IP address, and not a host name."""
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Return whether an IP address means "this machine itself", as Debian's 127.0.1.1 does."""
    return ipaddress.ip_address(address).is_loopback


def why_unreachable(host: str, port: int, seconds: float, after_attempt: Callable[[], None] | None = None) -> str:
    """Try for `seconds` to connect over TCP. Return "" as soon as it succeeds, else why the last attempt failed.

    Tries at least once, and calls `after_attempt` after each failed attempt but the last. Gives up on an unknown host
    name after UNKNOWN_NAME_SECONDS.
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


def address_towards(host: str) -> str:
    """Return the address by which this machine reaches a host, and by which the host reaches this machine.

    It is a loopback address only if `host` is one. Errors: OSError if the name is unknown or there is no route.
    """
    address = _source_address(host)
    asked_for_loopback = host == "localhost" or (is_ip_address(host) and is_loopback(host))
    if is_loopback(address) and not asked_for_loopback:
        # the own name of this machine resolves to a loopback address (Debian: 127.0.1.1)
        outward = [value for value in interface_addresses().values() if not is_loopback(value)]
        with contextlib.suppress(OSError):
            outward.insert(0, _source_address(DOCUMENTATION_ADDRESS))
        address = (outward or [address])[0]
    return address


def _source_address(host: str) -> str:
    """Return the address from which a datagram to `host` would leave. Connecting a datagram socket sends nothing."""
    family, *_, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def interface_addresses() -> dict[str, str]:
    """Return the IPv4 address of each network interface of this machine that has one, by the interface's name."""
    addresses = {}
    for _, name in socket.if_nameindex():
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            reply = fcntl.ioctl(probe, GET_INTERFACE_ADDRESS, struct.pack("256s", name.encode()))
            addresses[name] = socket.inet_ntoa(reply[20:24])
    return addresses


def listen(port: int) -> socket.socket:
    """Listen on a TCP port of all addresses of this machine. Errors: OSError if another program does."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def hand_over(listener: socket.socket) -> dict[str, str]:
    """Return the environment with which the program that replaces this process finds a listening socket."""
    listener.set_inheritable(True)
    return {LISTENER_VARIABLE: str(listener.detach())}


def take_over_listener(port: int) -> int | None:
    """Return the file descriptor of the socket that listens on `port`, if this process was given one; else None."""
    descriptor = os.environ.get(LISTENER_VARIABLE, "")
    with contextlib.suppress(OSError, ValueError):
        with socket.socket(fileno=os.dup(int(descriptor))) as listener:
            fits = listener.getsockname()[1] == port
        if fits:
            del os.environ[LISTENER_VARIABLE]  # a socket has one owner
            os.set_inheritable(int(descriptor), False)
            return int(descriptor)
    return None


def is_free(port: int) -> bool:
    """Return whether a program could listen on a TCP port of this machine now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def slurm_hosts(environment: Mapping[str, str] | None = None) -> list[str]:
    """Return the hosts of a Slurm job in the order of their ranks; none outside a job, or if scontrol fails.

    environment: with Slurm's variables (None: that of this process).
    """
    nodelist = (os.environ if environment is None else environment).get("SLURM_JOB_NODELIST")
    if not nodelist:
        return []
    try:
        command = ["scontrol", "show", "hostnames", nodelist]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
