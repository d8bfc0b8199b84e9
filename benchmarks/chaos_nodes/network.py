"""Give each "node" of this machine a network of its own, whose cable can be pulled.

A bridge in a further network namespace connects the nodes. The address of the bridge outlives all nodes. The network
of the machine is not changed. Needs root.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

SUBNET = "10.98.0"  # exists only inside the namespaces
BRIDGE_ADDRESS = f"{SUBNET}.1"
BRIDGE_MAC = "02:00:00:00:00:01"  # locally administered
FIRST_NODE_ADDRESS = 10
MOST_NODES = 200


def why_no_networks() -> str:
    """Return why this machine cannot give nodes networks of their own, as a sentence; "" if it can."""
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    if missing := [name for name in ("ip", "nsenter", "unshare") if not shutil.which(name, path=path)]:
        return f"--nodes: {', '.join(missing)} not found; install iproute2 and util-linux"
    if os.geteuid() != 0:
        return "--nodes: gives each node a network of its own, which needs root; run it with sudo"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "--nodes: network namespaces cannot be made here (CAP_SYS_ADMIN is needed)"


class Network:
    """A bridge and the nodes that are connected to it."""

    def __init__(self) -> None:
        """Make the bridge in a namespace of its own."""
        os.environ["PATH"] += ":/usr/sbin:/sbin"
        self._prefix = f"chaos-{os.getpid()}"
        self._namespaces: list[str] = []
        self.bridge = self._add_namespace("bridge")
        # By itself the bridge takes the lowest address of its cables. So another cable may change it, and for nearly a
        # minute the nodes would send to the old one.
        _ip("-n", self.bridge, "link", "add", "br0", "address", BRIDGE_MAC, "type", "bridge")
        _ip("-n", self.bridge, "address", "add", f"{BRIDGE_ADDRESS}/24", "dev", "br0")
        _ip("-n", self.bridge, "link", "set", "br0", "up")

    def add_node(self, number: int) -> tuple[str, str]:
        """Connect another node; return the name of its namespace and its address."""
        assert 1 <= number <= MOST_NODES
        name, address = self._add_namespace(f"node{number}"), f"{SUBNET}.{FIRST_NODE_ADDRESS + number}"
        _ip("-n", self.bridge, "link", "add", _cable(number), "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", self.bridge, "link", "set", _cable(number), "master", "br0", "up")
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        return name, address

    def set_cable(self, number: int, plugged: bool) -> None:
        """Connect or disconnect a node: no packet passes, and no connection is closed."""
        _ip("-n", self.bridge, "link", "set", _cable(number), "up" if plugged else "down")

    def remove_node(self, number: int) -> None:
        """Remove the network of a node whose processes have ended."""
        self._remove(f"{self._prefix}-node{number}")

    def close(self) -> None:
        """Remove all namespaces, and with them the bridge and the cables."""
        for name in reversed(self._namespaces.copy()):
            self._remove(name)

    def _add_namespace(self, name: str) -> str:
        full_name = f"{self._prefix}-{name}"
        _ip("netns", "add", full_name)
        self._namespaces.append(full_name)
        _ip("-n", full_name, "link", "set", "lo", "up")
        return full_name

    def _remove(self, name: str) -> None:
        if name in self._namespaces:
            self._namespaces.remove(name)
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def write_names(folder: Path) -> None:
    """Write the files that stand for /etc/hosts and /etc/resolv.conf on all nodes: there is no name server."""
    names = ["127.0.0.1 localhost", f"{BRIDGE_ADDRESS} store"]
    names += [f"{SUBNET}.{FIRST_NODE_ADDRESS + number} node{number}" for number in range(1, MOST_NODES + 1)]
    (folder / "hosts").write_text("\n".join([*names, ""]))
    (folder / "resolv.conf").touch()


def in_namespace(name: str, host: str, folder: Path, *command: str) -> list[str]:
    """Return the command that runs a command in a network namespace, as the same process, on a host of this name.

    folder: where `write_names` has put its files.
    """
    script = 'hostname "$0" && mount --bind hosts /etc/hosts && mount --bind resolv.conf /etc/resolv.conf && exec "$@"'
    as_host = ["unshare", "--uts", "--mount", f"--wd={folder}", "sh", "-c", script, host]
    return ["nsenter", f"--net=/run/netns/{name}", *as_host, *command]


def _cable(number: int) -> str:
    return f"cable{number}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
