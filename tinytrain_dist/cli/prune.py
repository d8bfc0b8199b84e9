"""`tinytrain prune`: remove the checkpoints of a run that only earlier settings keep.

Must not know how a run is trained. It needs no torch.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from tinytrain_dist.checkpoint.checkpoint_folder import CheckpointFolder
from tinytrain_dist.checkpoint.discovery import own_checkpoints, present_rules
from tinytrain_dist.checkpoint.manifest import is_damaged
from tinytrain_dist.checkpoint.retention import (
    RetentionRules,
    read_committed_checkpoint,
    reasons_to_keep,
    without_earlier_settings,
)
from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.cli.tables import new_table, print_table
from tinytrain_dist.config.run_folder import CONFIG_FILE, RunFolder, open_run, read_settings
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.progress import progress_bar
from tinytrain_dist.utils.text import format_bytes


def prune(
    run: Annotated[Path, tyro.conf.Positional],
    keep_last: int | None = None,
    keep_every: int | None = None,
    set_aside: bool = False,
    dry_run: bool = False,
) -> int:
    """Remove the checkpoints that the settings of a run do not keep, also those that earlier settings have kept.

    A run itself never removes what its earlier settings kept. The settings are those in its config.toml. The one with
    the best eval loss stays, and so does what another run has saved into the same ckpt_dir.

    Args:
        run: A run (its target_dir).
        keep_last: Number of newest checkpoints to keep (None: the run's setting).
        keep_every: Keep those at multiples of this step (None: the run's setting; 0: none).
        set_aside: Also remove those that were set aside as damaged or diverged.
        dry_run: Show what would be removed, and change nothing.
    """
    folder = open_run(run)
    settings = read_settings(folder.folder)
    if not settings:
        raise CheckpointError(f"{folder.folder}: has no {CONFIG_FILE} that can be read; give a run (its target_dir)")
    if (keep_last is not None and keep_last < 1) or (keep_every is not None and keep_every < 0):
        raise CheckpointError(f"keep_last: {keep_last} must be at least 1, keep_every: {keep_every} at least 0")
    given = {"keep_last": keep_last, "keep_every": keep_every}
    rules = present_rules(folder, settings | {name: value for name, value in given.items() if value is not None})
    checkpoints = own_checkpoints(folder, settings, _warn)
    reasons = _reasons(folder, checkpoints, rules, bool(settings.get("ckpt_dir")), set_aside)
    return _remove(checkpoints, reasons, dry_run)


def _reasons(
    run: RunFolder, checkpoints: CheckpointFolder, rules: RetentionRules, shared: bool, set_aside: bool
) -> dict[Path, str]:
    """Return why each checkpoint stays, "" for those to remove. shared: other runs may save into the same folder."""
    found = [read_committed_checkpoint(path) for path in checkpoints.committed()]
    present = [without_earlier_settings(checkpoint, rules.evaluation) for checkpoint in found]
    if not shared:
        # all in target_dir/checkpoints is of this run, even if it was moved
        rules = replace(rules, run=None)
    reasons = dict(zip((c.path for c in present), reasons_to_keep(present, rules, is_damaged), strict=True))
    if not any(reason.startswith("keep_last") for reason in reasons.values()):
        found_text = f"none of its {len(found)} checkpoints is valid" if found else "has no checkpoint of this run"
        raise CheckpointError(f"{run.checkpoints}: {found_text}; nothing is removed")
    if set_aside:
        reasons |= dict.fromkeys(checkpoints.all_set_aside(), "")
    return reasons


def _remove(checkpoints: CheckpointFolder, reasons: dict[Path, str], dry_run: bool) -> int:
    """Remove what has no reason to stay, and show all; return the exit code."""
    table = new_table("checkpoint<", "size", "<")
    removed_bytes = num_removed = num_failed = 0
    to_remove = sum(not reason for reason in reasons.values())
    with progress_bar("removing checkpoints", to_remove, shown=not dry_run) as advance:
        for path, reason in reasons.items():
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            outcome = f"stays: {reason}"
            if not reason:
                outcome = "would be removed" if dry_run else "removed"
                try:
                    if not dry_run:
                        checkpoints.delete(path)
                    num_removed += 1
                    removed_bytes += size
                except OSError as error:
                    num_failed += 1
                    outcome = f"COULD NOT BE REMOVED: {error}"
                advance(1)
            table.add_row(path.name, format_bytes(size), outcome)
    print_table(table)
    verb = "would remove" if dry_run else "removed"
    print(f"{checkpoints.directory}: {verb} {num_removed} of {len(reasons)} checkpoints, {format_bytes(removed_bytes)}")
    return 1 if num_failed else 0


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr)


def main(args: list[str]) -> int:
    """Run `tinytrain prune`."""
    return call_verb(prune, "prune", args)
