"""Decide which snapshots belong to the history of a run, by a file in the run folder.

Each launch writes its ID, and the snapshot that it has continued from. A snapshot of any other launch is stale: a node
that was cut off may still hold one, after the others have continued from an earlier state. Must not know what a
snapshot holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tinytrain_dist.checkpoint.snapshots.slot_files import Key
from tinytrain_dist.config.run_folder import SNAPSHOTS_FILE
from tinytrain_dist.utils.atomic_files import read_json_object, write_atomically


class LaunchRecord:
    """The file of the present launch; `tinytrain status` shows its numbers. Only rank 0 has one."""

    def __init__(self, folder: Path, launch_id: str, resumed: Key | None, folders: list[dict[str, Any]]) -> None:
        """Write it. folders: what each node uses. Errors: OSError."""
        self._path = folder / SNAPSHOTS_FILE
        self._values: dict[str, Any] = {
            "launch": launch_id,
            "resumed": None if resumed is None else {"step": resumed[0], "launch": resumed[1]},
            "nodes": folders,
        }
        write_atomically(self._path, self._values)

    def add(self, values: dict[str, Any]) -> None:
        """Write further values, in place of those of the last call. Errors: OSError."""
        write_atomically(self._path, self._values | values)

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)


def belongs_to_run(key: Key, newest_launch: dict[str, Any]) -> bool:
    """Return whether the newest launch has taken this snapshot, or has continued from it. newest_launch: its file."""
    step, launch_id = key
    return newest_launch.get("launch") == launch_id or newest_launch.get("resumed") == {
        "step": step,
        "launch": launch_id,
    }


def read_newest_launch(folder: Path) -> dict[str, Any]:
    """Return the file of the newest launch in a run folder; {} if there is none."""
    return read_json_object(folder / SNAPSHOTS_FILE)
