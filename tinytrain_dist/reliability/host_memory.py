"""Find out how much memory a host, and the control group of this job on it, has left. Must not know who needs it."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIPS = Path("/proc/self/cgroup")
MEMORY = Path("/proc/meminfo")
UNLIMITED_BYTES = 1 << 60  # version 1 of control groups writes about 2**63 for no limit


def free_host_bytes(memberships: str | None = None, root: Path = CGROUP) -> int:
    """Return the memory that this process can still use: of the host, or of its control groups if they allow less.

    Pages of files that can be dropped count as free. Where the system does not report any of this, the result is
    sys.maxsize. memberships: the content of /proc/self/cgroup (None: read it).
    """
    free = [sys.maxsize]
    with contextlib.suppress(OSError, ValueError, IndexError):
        free.append(1024 * int(MEMORY.read_text().split("MemAvailable:")[1].split()[0]))
    with contextlib.suppress(OSError, ValueError):
        memberships = MEMBERSHIPS.read_text() if memberships is None else memberships
        for folder, is_first_version in _control_groups(memberships, root):
            free.append(_free_in_group(folder, is_first_version))
    return max(0, min(free))


def cgroup_limit_bytes(memberships: str, root: Path = CGROUP) -> int | None:
    """Return the bytes that this process's control group and those above it allow; None without a limit.

    memberships: the content of /proc/self/cgroup, with lines "ID:CONTROLLERS:PATH". Version 2 names no controllers.
    """
    limits = [_limit(folder, is_first_version) for folder, is_first_version in _control_groups(memberships, root)]
    return min((limit for limit in limits if limit is not None), default=None)


def _control_groups(memberships: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """Yield the folders of the control groups that limit memory, and whether they are of version 1."""
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = root / "memory" if controllers else root
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            yield folder, bool(controllers)
            if folder == base:
                break


def _limit(folder: Path, is_first_version: bool) -> int | None:
    limit_file = folder / ("memory.limit_in_bytes" if is_first_version else "memory.max")
    text = limit_file.read_text().strip() if limit_file.is_file() else "max"
    return int(text) if text.isdecimal() and int(text) < UNLIMITED_BYTES else None


def _free_in_group(folder: Path, is_first_version: bool) -> int:
    limit = _limit(folder, is_first_version)
    usage_file = folder / ("memory.usage_in_bytes" if is_first_version else "memory.current")
    if limit is None or not usage_file.is_file():
        return sys.maxsize
    cached = 0
    with contextlib.suppress(OSError):
        name = "total_inactive_file" if is_first_version else "inactive_file"
        found = re.search(rf"^{name} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
        cached = int(found[1]) if found else 0
    return limit - int(usage_file.read_text()) + cached
