"""Check one machine for `tinytrain doctor`: its name, interfaces, memory, limits, and room for scratch files.

Must not know ranks or torch: it only looks.
"""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import socket
import struct
from pathlib import Path

from tinytrain_dist.distributed.network import is_loopback, resolve

OK, NOTE, PROBLEM = "ok", "note", "PROBLEM"
Finding = tuple[str, str]  # OK, NOTE or PROBLEM, and a sentence
INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
OPEN_FILES, SCRATCH_BYTES, SHARED_BYTES = 4096, 1e9, 1e9
CGROUP = Path("/sys/fs/cgroup")
SIOCGIFADDR = 0x8915  # of ioctl: the address of an interface


def interfaces() -> dict[str, str]:
    """IPv4 address of every interface that has one and can reach others."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue
            found[name] = socket.inet_ntoa(answer[20:24])
    return {name: address for name, address in found.items() if not is_loopback(address)}


def machine() -> list[Finding]:
    """Everything that one machine tells about itself."""
    host = socket.gethostname()
    return [*name_and_interfaces(host), memory(host), *limits(host), *scratch(host)]


def name_and_interfaces(host: str) -> list[Finding]:
    """Check the name and the interfaces by which other machines would reach this one."""
    cards, own = interfaces(), resolve(host)
    listing = ", ".join(f"{name} {address}" for name, address in cards.items()) or "none but the loopback"
    first = next(iter(cards), "eth0")
    found: list[Finding] = []
    chosen = {name: os.environ[name] for name in INTERFACE_VARIABLES if name in os.environ}
    for variable, value in chosen.items():
        wanted = [part.lstrip("=^").partition(":")[0] for part in value.split(",")]
        all_cards = {name for _, name in socket.if_nameindex()}
        if not value.startswith("^") and not any(card.startswith(part) for part in wanted for card in all_cards):
            found.append((PROBLEM, f"{variable}: {host} has no interface {value}; it has {listing}"))
    if not own:
        found.append((NOTE, f"name: {host} does not know its own name; with several nodes add it to /etc/hosts"))
    elif is_loopback(own[0]) and "GLOO_SOCKET_IFNAME" not in chosen:
        found.append(
            (NOTE, f"name: {host} resolves to {own[0]} here; with several nodes export GLOO_SOCKET_IFNAME={first}")
        )
    if len(cards) > 1 and not chosen:
        names = " or ".join(cards)
        found.append((NOTE, f"interfaces: {host} has {listing}; if it picks a wrong one, export "
                      f"GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME as {names}"))  # fmt: skip
    return found or [(OK, f"interfaces: {host} has {listing}")]


def memory(host: str) -> Finding:
    """Free memory, and the limit of the job's control group where it is smaller than the machine."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (1024 * int(rows[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    limit = cgroup_limit(Path("/proc/self/cgroup").read_text())
    own = f"; this job may use {limit / 1e9:.1f} GB" if limit is not None and limit < total else ""
    return OK, f"memory: {host} has {total / 1e9:.1f} GB, {free / 1e9:.1f} GB free{own}"


def cgroup_limit(memberships: str, root: Path = CGROUP) -> int | None:
    """Bytes that this process's control group and those above it allow; None without a limit."""
    found = []
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        for folder in (base / path.strip("/"), *(base / path.strip("/")).parents):
            text = (folder / name).read_text().strip() if (folder / name).is_file() else "max"
            found += [int(text)] if text.isdecimal() and int(text) < 2**60 else []
            if folder == base:
                break
    return min(found, default=None)


def limits(host: str) -> list[Finding]:
    """Open files, and locked memory where RDMA needs it."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    found: list[Finding] = []
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        found.append((NOTE, f"limits: {host} allows {files} open files; many ranks need more: ulimit -n 65536"))
    if locked != resource.RLIM_INFINITY and any(Path("/sys/class/infiniband").glob("*")):
        found.append((PROBLEM, f"limits: {host} has InfiniBand but locks only {locked / 1e6:.1f} MB of memory; "
                      "ulimit -l unlimited (in Slurm: PropagateResourceLimitsExcept=MEMLOCK)"))  # fmt: skip
    return found or [(OK, f"limits: {host} allows {files} open files")]


def scratch(host: str) -> list[Finding]:
    """Room in /tmp, and in /dev/shm, over which NCCL joins the devices of a node."""
    found: list[Finding] = []
    free = {path: shutil.disk_usage(path).free for path in ("/tmp", "/dev/shm") if Path(path).is_dir()}
    if free.get("/dev/shm", 0) < SHARED_BYTES:
        level = PROBLEM if Path("/proc/driver/nvidia").exists() else NOTE
        room = free.get("/dev/shm", 0) / 1e9
        found.append((level, f"/dev/shm: {host} has {room:.2f} GB free; in a container: --shm-size=8g"))
    if free.get("/tmp", SCRATCH_BYTES) < SCRATCH_BYTES:
        found.append((PROBLEM, f"/tmp: {host} has {free['/tmp'] / 1e9:.2f} GB free; make room, or set TMPDIR"))
    rest = ", ".join(f"{room / 1e9:.1f} GB in {path}" for path, room in free.items())
    return found or [(OK, f"scratch: {host} has {rest}")]
