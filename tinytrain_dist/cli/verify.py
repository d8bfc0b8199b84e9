"""`tinytrain verify`: read every byte of checkpoints and report damage."""

from __future__ import annotations

import time
from pathlib import Path

from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.config.run_folder import is_checkpoint, name_suffix, open_run
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.progress import progress_bar
from tinytrain_dist.utils.text import format_bytes, is_url


def verify(place: PathArgument) -> int:
    """Read every byte of a checkpoint, or of all checkpoints of a run; exit code 1 if anything is damaged.

    Args:
        place: A run (its target_dir), a checkpoint, or the URL of copies or of one copy.
    """
    if is_checkpoint(place):
        return 0 if _verify_checkpoint(place) else 1
    run = open_run(place)
    checkpoints = run.committed()
    if not checkpoints:
        raise CheckpointError(f"{run.checkpoints}: has no checkpoint to verify; wait for the first (ckpt_every)")
    intact = [_verify_checkpoint(path) for path in checkpoints]
    for path in run.step_folders():
        if name_suffix(path):
            print(f"skipped  {path}  not a finished checkpoint; resume ignores it")
    return 0 if all(intact) else 1


def _verify_checkpoint(path: Path) -> bool:
    """Read a checkpoint and print what is damaged; return whether it is intact."""
    from tinytrain_dist.checkpoint.manifest import file_bytes
    from tinytrain_dist.checkpoint.verify import find_damage

    started = time.perf_counter()
    num_bytes = file_bytes(path)
    with progress_bar(f"verifying {path.name}", num_bytes, unit="bytes") as advance:
        damage = find_damage(path, advance=advance)
    seconds = max(time.perf_counter() - started, 1e-9)
    if damage:
        print(f"DAMAGED  {path}\n  " + "\n  ".join(damage))
        return False
    print(f"ok       {path}  {format_bytes(num_bytes)}, {num_bytes / seconds / 1e9:.2f} GB/s", flush=True)
    return True


def main(args: list[str]) -> int:
    """Run `tinytrain verify`."""
    if any(map(is_url, args)):
        from tinytrain_dist.cli.remote_copies import verify_copies  # its libraries take a while to import

        return call_verb(verify_copies, "verify", args)
    return call_verb(verify, "verify", args)
