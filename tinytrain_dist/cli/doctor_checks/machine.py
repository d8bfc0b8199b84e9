"""Check one machine for `tinytrain doctor`: its name, interfaces, memory, limits, and room for scratch files.

Must not know ranks or torch. Changes nothing.
"""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import socket
import struct
from pathlib import Path

from tinytrain_dist.cli.doctor_checks.report import NOTE, OK, PROBLEM, Finding
from tinytrain_dist.distributed.network import is_loopback, resolve
from tinytrain_dist.reliability.host_memory import cgroup_limit_bytes

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
MIN_OPEN_FILES = 4096
MIN_SCRATCH_BYTES = 1e9
MIN_SHARED_MEMORY_BYTES = 1e9
SIOCGIFADDR = 0x8915  # request number of ioctl for the address of an interface


def interfaces() -> dict[str, str]:
    """Return the IPv4 address of every interface that has one and can reach other machines."""
    addresses = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
            except OSError:
                continue
            addresses[name] = socket.inet_ntoa(answer[20:24])
    return {name: address for name, address in addresses.items() if not is_loopback(address)}


def check_machine() -> list[Finding]:
    """Run all checks that one machine can do without the others."""
    host = socket.gethostname()
    return [*check_interfaces(host), describe_memory(host), *check_limits(host), *check_scratch(host)]


def check_interfaces(host: str) -> list[Finding]:
    """Check the name and the interfaces by which other machines would reach this one."""
    addresses = interfaces()
    own_addresses = resolve(host)
    listing = ", ".join(f"{name} {address}" for name, address in addresses.items()) or "none but the loopback"
    first_interface = next(iter(addresses), "eth0")
    findings: list[Finding] = []
    chosen = {name: os.environ[name] for name in INTERFACE_VARIABLES if name in os.environ}
    existing = {name for _, name in socket.if_nameindex()}
    for variable, value in chosen.items():
        # a list of prefixes, such as "=ib0:1,eth"; a leading "^" excludes them
        prefixes = [part.lstrip("=^").partition(":")[0] for part in value.split(",")]
        matches = any(name.startswith(prefix) for prefix in prefixes for name in existing)
        if not value.startswith("^") and not matches:
            findings.append((PROBLEM, f"{variable}: {host} has no interface {value}; it has {listing}"))
    if not own_addresses:
        findings.append((NOTE, f"name: {host} cannot resolve its own name; with several nodes, add it to /etc/hosts"))
    elif is_loopback(own_addresses[0]) and "GLOO_SOCKET_IFNAME" not in chosen:
        text = f"name: {host} resolves to {own_addresses[0]} here; with several nodes, export "
        findings.append((NOTE, f"{text}GLOO_SOCKET_IFNAME={first_interface}"))
    if len(addresses) > 1 and not chosen:
        names = " or ".join(addresses)
        text = f"interfaces: {host} has {listing}; if gloo or NCCL uses the wrong one, export "
        findings.append((NOTE, f"{text}GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME as {names}"))
    return findings or [(OK, f"interfaces: {host} has {listing}")]


def describe_memory(host: str) -> Finding:
    """Return the free memory, and the limit of the job's control group where it is smaller than the machine."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    total_bytes, free_bytes = (1024 * int(rows[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    limit_bytes = cgroup_limit_bytes(Path("/proc/self/cgroup").read_text())
    text = f"memory: {host} has {total_bytes / 1e9:.1f} GB, {free_bytes / 1e9:.1f} GB free"
    if limit_bytes is not None and limit_bytes < total_bytes:
        text += f"; this job may use {limit_bytes / 1e9:.1f} GB"
    return OK, text


def check_limits(host: str) -> list[Finding]:
    """Check the limit of open files, and of locked memory where RDMA needs it."""
    _, open_files = resource.getrlimit(resource.RLIMIT_NOFILE)  # the hard limit: a run raises the soft one to it
    locked_bytes, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    findings: list[Finding] = []
    if open_files != resource.RLIM_INFINITY and open_files < MIN_OPEN_FILES:
        text = f"limits: {host} allows {open_files} open files; many ranks need more; ask for a hard limit of 65536"
        findings.append((NOTE, text))
    if locked_bytes != resource.RLIM_INFINITY and any(Path("/sys/class/infiniband").glob("*")):
        text = f"limits: {host} has InfiniBand but allows only {locked_bytes / 1e6:.1f} MB of locked memory; "
        remedy = "run ulimit -l unlimited (in Slurm: PropagateResourceLimitsExcept=MEMLOCK)"
        findings.append((PROBLEM, text + remedy))
    return findings or [(OK, f"limits: {host} allows {open_files} open files")]


def check_scratch(host: str) -> list[Finding]:
    """Check the free space in /tmp, and in /dev/shm, through which NCCL connects the devices of a node."""
    findings: list[Finding] = []
    free_bytes = {path: shutil.disk_usage(path).free for path in ("/tmp", "/dev/shm") if Path(path).is_dir()}
    shared_bytes = free_bytes.get("/dev/shm", 0)
    if shared_bytes < MIN_SHARED_MEMORY_BYTES:
        level = PROBLEM if Path("/proc/driver/nvidia").exists() else NOTE
        text = f"/dev/shm: {host} has {shared_bytes / 1e9:.2f} GB free; in a container, start it with --shm-size=8g"
        findings.append((level, text))
    if free_bytes.get("/tmp", MIN_SCRATCH_BYTES) < MIN_SCRATCH_BYTES:
        text = f"/tmp: {host} has {free_bytes['/tmp'] / 1e9:.2f} GB free; make room, or set TMPDIR"
        findings.append((PROBLEM, text))
    listing = ", ".join(f"{size / 1e9:.1f} GB in {path}" for path, size in free_bytes.items())
    return findings or [(OK, f"scratch: {host} has {listing}")]
