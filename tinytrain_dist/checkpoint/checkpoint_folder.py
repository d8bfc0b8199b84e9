"""List the checkpoints of a run, rename damaged ones, and delete old ones.

Must not know ranks: only rank 0 calls the methods that change the folder. Must not know what a checkpoint contains.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

from tinytrain_dist.checkpoint.manifest import is_damaged
from tinytrain_dist.checkpoint.retention import (
    RetentionRules,
    checkpoints_to_delete,
    note_promises,
    read_committed_checkpoint,
)
from tinytrain_dist.config.run_folder import (
    DAMAGED_SUFFIX,
    DIVERGED_SUFFIX,
    TEMPORARY_SUFFIX,
    checkpoint_name,
    checkpoint_step,
)


class CheckpointFolder:
    """The folder that holds the checkpoints of one run, each in a folder of its own such as PREFIX-00001000.

    Checkpoints with other prefixes may be in the same folder.
    """

    def __init__(self, directory: Path, prefix: str, warn: Callable[[str], None]) -> None:
        """`warn` is called with a sentence about each checkpoint that is damaged or cannot be renamed or deleted."""
        self.directory = directory
        self.prefix = prefix
        self.warn = warn
        # called after each save, before old checkpoints are deleted; returns those that must stay for now
        self.hold: Callable[[], Collection[Path]] = tuple

    def path(self, step: int) -> Path:
        """Return the path of the checkpoint of a step."""
        return self.directory / checkpoint_name(self.prefix, step)

    def committed(self) -> list[Path]:
        """Return the checkpoints under their final name, in order of steps. They are complete, but may be damaged."""
        return sorted(self._named(""), key=checkpoint_step)

    def remove_leftovers(self) -> None:
        """Delete the incomplete folders of earlier processes. Only the process that holds the run may call it."""
        for path in self._named(re.escape(TEMPORARY_SUFFIX)):
            shutil.rmtree(path, ignore_errors=True)

    def _named(self, suffix: str) -> list[Path]:
        """Return what is named PREFIX-STEP and a suffix (a pattern); a longer prefix belongs to another run."""
        if not self.directory.is_dir():
            return []
        pattern = re.compile(re.escape(self.prefix) + r"-\d{8,}" + suffix, re.ASCII)
        return [path for path in self.directory.iterdir() if pattern.fullmatch(path.name)]

    def set_aside(self, path: Path, problems: list[str]) -> None:
        """Report what is wrong with a checkpoint, and rename it so that it is neither tried again nor lost."""
        aside = self._free_name(path, DAMAGED_SUFFIX)
        self.warn(f"damaged checkpoint, renamed to {aside.name}: " + "; ".join(problems))
        self._rename(path, aside)

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename the checkpoints after `step`, because the run diverged; return their new paths."""
        moved = []
        for path in self.committed():
            if checkpoint_step(path) > step:
                aside = self._free_name(path, DIVERGED_SUFFIX)
                moved += [aside] if self._rename(path, aside) else []
        return moved

    def all_set_aside(self) -> list[Path]:
        """Return what was renamed because it was damaged or because the run diverged, by step."""
        suffixes = rf"({re.escape(DAMAGED_SUFFIX)}|{re.escape(DIVERGED_SUFFIX)})(-\d+)?"
        return sorted(self._named(suffixes), key=lambda path: (checkpoint_step(path), path.name))

    def _free_name(self, path: Path, suffix: str) -> Path:
        """Return the path with a suffix that no other file has, numbered from the second one on."""
        name = path.name + suffix
        numbers = itertools.count(2)
        while (path.parent / name).exists():
            name = f"{path.name}{suffix}-{next(numbers)}"
        return path.parent / name

    def _rename(self, path: Path, new_path: Path) -> bool:
        try:
            path.rename(new_path)
        except OSError as error:
            self.warn(f"{path} could not be renamed ({error.strerror}); it is skipped")
            return False
        return True

    def delete_old(self, rules: RetentionRules) -> None:
        """Delete the checkpoints that no rule keeps (see `retention.reasons_to_keep`).

        A checkpoint that cannot be deleted is reported and kept.
        Errors: OSError if the folder cannot be listed, or if it cannot be written down what keeps a checkpoint.
        """
        held = self.hold()
        checkpoints = [read_committed_checkpoint(path) for path in self.committed()]
        checkpoints = note_promises(checkpoints, rules)
        for checkpoint in checkpoints_to_delete(checkpoints, rules, is_damaged):
            if checkpoint.path in held:
                continue
            try:
                self.delete(checkpoint.path)
            except OSError as error:
                self.warn(f"{checkpoint.path} could not be deleted ({error}); it still takes disk space")

    def delete(self, path: Path) -> None:
        """Delete a checkpoint. Errors: OSError."""
        temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        path.rename(temporary)  # so that no partly deleted checkpoint has a final name
        shutil.rmtree(temporary)
