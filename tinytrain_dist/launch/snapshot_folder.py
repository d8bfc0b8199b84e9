"""Make the folder in shared memory for the snapshots of this node, and delete it when the agent ends.

The folder's name holds the agent's process. If the agent is killed, the next one on this machine deletes the folder.
Must not know torch, or what is in the folder.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.utils.stale_files import describe_leftovers, hold_folder, owner, remove_leftovers
from tinytrain_dist.utils.text import format_bytes

SHARED_MEMORY = "/dev/shm"
_made: list[Path] = []


@contextlib.contextmanager
def snapshot_folder(config: TrainingConfig | None, options: argparse.Namespace) -> Iterator[None]:
    """Set TINYTRAIN_SNAPSHOTS for the ranks to a new folder, if they may be restarted and are to take snapshots.

    config: of the run, None if the ranks run another program. options: torchrun's.
    """
    shared = Path(os.environ.get("TINYTRAIN_SHARED_MEMORY") or SHARED_MEMORY)
    _remove_leftovers(shared)
    os.environ.pop("TINYTRAIN_SNAPSHOTS", None)  # of an agent above this one
    if config is not None and config.snapshot_every != 0 and int(options.max_restarts) > 0:
        with contextlib.suppress(OSError):  # such as no permission: then there are no snapshots
            folder = Path(tempfile.mkdtemp(prefix=f"tinytrain-{owner()}-", dir=shared))
            _made.append(folder)
            hold_folder(folder)
            os.environ["TINYTRAIN_SNAPSHOTS"] = str(folder)
    try:
        yield
    finally:
        remove_snapshot_folder()


def remove_snapshot_folder() -> None:
    """Delete the folder, if this process has made one."""
    for folder in _made:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_leftovers(shared: Path) -> None:
    """Delete what killed agents have left in shared memory, and name it with its size."""
    free_before = shutil.disk_usage(shared).free if shared.is_dir() else 0
    if removed := remove_leftovers(shared):
        freed = max(0, shutil.disk_usage(shared).free - free_before)
        print(f"{describe_leftovers(removed)} ({format_bytes(freed)} of shared memory)", file=sys.stderr)
