"""`tinytrain hash`: print one digest of the weights and one of the optimizer state."""

from __future__ import annotations

import sys

from tinytrain_dist.checkpoint.discovery import find_checkpoint
from tinytrain_dist.checkpoint.manifest import file_bytes
from tinytrain_dist.checkpoint.state_digests import TITLE_OF_KIND, state_digest, tensor_entries
from tinytrain_dist.cli.arguments import call_verb
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.config.run_folder import MANIFEST_FILE
from tinytrain_dist.utils.progress import no_progress, progress_bar

MAX_SHOWN_TENSORS = 5  # damaged tensors named on stderr


def print_digests(place: PathArgument, recompute: bool = False) -> int:
    """Print one digest of the weights and one of the optimizer state; equal digests mean equal bits.

    Each digest is the SHA-256 of a list of all tensors, with the name, shape, type and BLAKE3 hash of each.

    Args:
        place: A checkpoint, or a run (its newest valid checkpoint is used).
        recompute: Hash the tensors again, instead of reading the manifest; exit code 1 if they differ from it.
    """
    checkpoint = find_checkpoint(place)
    print(checkpoint, file=sys.stderr)
    with progress_bar("hashing", file_bytes(checkpoint), unit="bytes") as advance:
        # a checkpoint of an older format is read in any case
        in_manifest = tensor_entries(checkpoint, advance=no_progress if recompute else advance)
        entries = tensor_entries(checkpoint, recompute=True, advance=advance) if recompute else in_manifest
    for kind, entries_of_kind in entries.items():
        print(f"{TITLE_OF_KIND[kind]:<9}  {state_digest(entries_of_kind)}  {len(entries_of_kind)} tensors")
    damaged = [name for kind in entries for name in entries[kind] if entries[kind][name] != in_manifest[kind][name]]
    for name in damaged[:MAX_SHOWN_TENSORS]:
        print(f"DAMAGED  {name}: is not what {MANIFEST_FILE} says; use another checkpoint", file=sys.stderr)
    return 1 if damaged else 0


def main(args: list[str]) -> int:
    """Run `tinytrain hash`."""
    return call_verb(print_digests, "hash", args)
