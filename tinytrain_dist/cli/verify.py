"""`tinytrain verify`: read every byte of checkpoints and report damage."""

from __future__ import annotations

import time

import tyro

from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.config.run_folder import is_checkpoint, name_suffix, open_run
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.text import format_bytes


def verify(place: PathArgument) -> int:
    """Read every byte of a checkpoint, or of all of a run; exit code 1 if anything is damaged.

    Args:
        place: A run (its target_dir) or a checkpoint.
    """
    from tinytrain_dist.checkpoint.manifest import read_manifest
    from tinytrain_dist.checkpoint.verify import find_damage

    run = None if is_checkpoint(place) else open_run(place)
    folders = run.committed() if run else [place]
    if not folders:
        assert run is not None
        raise CheckpointError(f"{run.checkpoints}: has no checkpoint to verify; wait for the first (ckpt_every)")
    damaged = 0
    for path in folders:
        started = time.perf_counter()
        found = find_damage(path)
        seconds = max(time.perf_counter() - started, 1e-9)
        if found:
            damaged += 1
            print(f"DAMAGED  {path}\n  " + "\n  ".join(found))
            continue
        count = sum(file["bytes"] for file in read_manifest(path).files.values())
        print(f"ok       {path}  {format_bytes(count)}, {count / seconds / 1e9:.2f} GB/s", flush=True)
    for path in run.step_folders() if run else []:
        if name_suffix(path):
            print(f"skipped  {path}  not a finished checkpoint; a resume does not look at it")
    return 1 if damaged else 0


def main(args: list[str]) -> int:
    """`tinytrain verify`."""
    return tyro.cli(verify, prog="tinytrain verify", args=args)
