"""List the checkpoints of a run, rename damaged ones, and delete old ones.

Must not know ranks: only rank 0 calls the methods that change the folder. Must not know what a checkpoint contains.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

from tinytrain_dist.checkpoint.retention import checkpoints_to_delete, read_committed_checkpoint
from tinytrain_dist.config.run_folder import DAMAGED_SUFFIX, TEMPORARY_SUFFIX, checkpoint_name, checkpoint_step


class CheckpointFolder:
    """The folder that holds the checkpoints of one run, each in a folder of its own such as PREFIX-00001000."""

    def __init__(self, directory: Path, prefix: str, warn: Callable[[str], None]) -> None:
        """`warn` is called with a sentence about each checkpoint that is damaged or cannot be renamed or deleted."""
        self.directory = directory
        self.prefix = prefix
        self.warn = warn

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.directory / checkpoint_name(self.prefix, step)

    def committed(self) -> list[Path]:
        """Return the checkpoints under their final name, in order of steps. They are complete, but may be damaged."""
        pattern = re.compile(re.escape(self.prefix) + r"-\d{8,}")
        if not self.directory.is_dir():
            return []
        paths = [path for path in self.directory.iterdir() if pattern.fullmatch(path.name)]
        return sorted(paths, key=checkpoint_step)

    def remove_leftovers(self) -> None:
        """Delete the incomplete folders of earlier processes. Only the process that holds the run may call it."""
        for path in self.directory.glob(f"{self.prefix}-*{TEMPORARY_SUFFIX}"):
            shutil.rmtree(path, ignore_errors=True)

    def set_aside(self, path: Path, problems: list[str]) -> None:
        """Report what is wrong with a checkpoint, and rename it so that it is neither tried again nor lost."""
        damaged_name = path.name + DAMAGED_SUFFIX
        existing = sum(1 for other in path.parent.iterdir() if other.name.startswith(damaged_name))
        new_path = path.with_name(f"{damaged_name}-{existing + 1}" if existing else damaged_name)
        self.warn(f"damaged checkpoint, renamed to {new_path.name}: " + "; ".join(problems))
        try:
            path.rename(new_path)
        except OSError as error:
            self.warn(f"{path} could not be renamed ({error.strerror}); it is skipped")

    def delete_old(self, keep_last: int, keep_every: int | None, best_step: int | None) -> None:
        """Delete the checkpoints that no rule keeps (see `retention.checkpoints_to_delete`).

        A checkpoint that cannot be deleted is reported and kept. Errors: OSError if the folder cannot be listed.
        """
        checkpoints = [read_committed_checkpoint(path) for path in self.committed()]
        for checkpoint in checkpoints_to_delete(checkpoints, keep_last, keep_every, best_step):
            path = checkpoint.path
            temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
            try:
                path.rename(temporary)  # so that no partly deleted checkpoint has a final name
                shutil.rmtree(temporary)
            except OSError as error:
                self.warn(f"{path} could not be deleted ({error}); it still takes disk space")
