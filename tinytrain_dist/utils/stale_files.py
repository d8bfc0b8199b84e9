"""Name temporary files after the process that makes them, and remove those of processes that have died.

A process that is killed cannot clean up. So the name of each temporary file or folder holds an owner: the host, the
process and when that process started. Only a process of the same host can find out that the owner has ended. Must not
know what is in the files.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tinytrain_dist.utils.processes import has_ended, process_start_time

# all temporary names of this program, with {} for the owner
TEMPORARY_NAMES = (
    r"(?P<of>.+)\.{}\.tmp",  # small files, pictures, exports
    r"\..+\.new-{}",  # data sets
    r"\.probe-{}-\w+(\.tmp)?",  # to find out whether storage is shared
    r"lock-(stale-)?{}-\w+",
    r"tinytrain-(replay-)?{}-\w+",  # scratch folders
)
OWNER = r"(?P<host>[\w~-]+)\.(?P<pid>\d+)\.(?P<started>\w+)"
PATTERNS = [re.compile(name.format(OWNER)) for name in TEMPORARY_NAMES]
MAX_HOST_CHARACTERS = 20  # a longer name of a host is shortened: paths of sockets have 108 characters at most


def owner() -> str:
    """Return this process as a part of file names: HOST.PID.STARTED."""
    pid = os.getpid()
    return f"{_host()}.{pid}.{process_start_time(pid)}"


def temporary_path(path: Path) -> Path:
    """Return a name beside `path` for a temporary file of this process, which is renamed to `path` when complete."""
    return path.with_name(f"{path.name}.{owner()}.tmp")


def hold_folder(folder: Path) -> int | None:
    """Mark a temporary folder as in use as long as the returned file descriptor is open, here or in a child.

    The mark also protects it from processes that cannot see this one, as in another container of this host. Returns
    None where the file system has no such marks.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder for a block. If this process is killed, a later one of this program removes the folder.

    Errors: OSError.
    """
    remove_leftovers(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=f"tinytrain-{owner()}-") as name:
        held = hold_folder(Path(name))
        try:
            yield Path(name)
        finally:
            if held is not None:
                os.close(held)


def remove_leftovers(folder: Path, of: str | None = None) -> list[Path]:
    """Delete the temporary files and folders of processes that have died; return those that were there.

    of: only those for the file or folder of this name. What cannot be deleted is left.
    """
    removed: list[Path] = []
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            match = next(filter(None, (pattern.fullmatch(path.name) for pattern in PATTERNS)), None)
            if match is None or (of is not None and match.groupdict().get("of") != of) or not _is_left(path, match):
                continue
            with contextlib.suppress(OSError):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()
                removed.append(path)
    return removed


def describe_leftovers(removed: list[Path]) -> str:
    """Return a sentence about what `remove_leftovers` has deleted."""
    names = ", ".join(str(path) for path in removed[:3]) + (f" and {len(removed) - 3} more" if len(removed) > 3 else "")
    return f"removed what killed processes had left: {names}"


def disk_bytes(folder: Path) -> int:
    """Return how much room the files below a folder take; what cannot be read counts as nothing."""
    total = 0
    with contextlib.suppress(OSError):
        for path in folder.rglob("*"):
            with contextlib.suppress(OSError):
                total += path.lstat().st_blocks * 512
    return total


def _is_left(path: Path, match: re.Match[str]) -> bool:
    """Return whether the owner in the name was a process of this host that has ended, and nobody holds the folder."""
    return match["host"] == _host() and has_ended(int(match["pid"]), match["started"]) and not is_held(path)


def is_held(path: Path) -> bool:
    """Return whether `hold_folder` marks the folder in another process, or in this one."""
    if not path.is_dir():
        return False
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file system has no such marks
        return False
    finally:
        os.close(descriptor)
    return False


def _host() -> str:
    """Return the name of this host in the characters of OWNER, with a digest where it is shortened."""
    name = socket.gethostname()
    if re.fullmatch(rf"[A-Za-z0-9_-]{{1,{MAX_HOST_CHARACTERS}}}", name):
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:8]
    return re.sub(r"[^A-Za-z0-9_-]", "-", name[: MAX_HOST_CHARACTERS - 9]) + f"~{digest}"
