"""`tinytrain hash`: print one digest of the weights and one of the optimizer state."""

from __future__ import annotations

import sys

import tyro

from tinytrain_dist.checkpoint.digests import TITLE_OF_KIND, state_digest, tensor_entries
from tinytrain_dist.checkpoint.discovery import find_checkpoint
from tinytrain_dist.cli.tables import PathArgument
from tinytrain_dist.config.run_folder import MANIFEST_FILE

MAX_SHOWN_TENSORS = 5  # damaged tensors named on stderr


def print_digests(place: PathArgument, recompute: bool = False) -> int:
    """Print one digest of the weights and one of the optimizer state; equal digests mean equal bits.

    Each is a sha256 over a list of all tensors: name, shape, type, and the BLAKE3 of its bytes.

    Args:
        place: A checkpoint, or a run: its newest valid checkpoint.
        recompute: Read the tensors instead of trusting the manifest; exit code 1 if they differ from it.
    """
    checkpoint = find_checkpoint(place)
    print(checkpoint, file=sys.stderr)
    noted = tensor_entries(checkpoint)
    entries = tensor_entries(checkpoint, recompute=True) if recompute else noted
    for kind, entries_of_kind in entries.items():
        print(f"{TITLE_OF_KIND[kind]:<9}  {state_digest(entries_of_kind)}  {len(entries_of_kind)} tensors")
    damaged = [name for kind in entries for name in entries[kind] if entries[kind][name] != noted[kind][name]]
    for name in damaged[:MAX_SHOWN_TENSORS]:
        print(f"DAMAGED  {name}: is not what {MANIFEST_FILE} says; use another checkpoint", file=sys.stderr)
    return 1 if damaged else 0


def main(args: list[str]) -> int:
    """Run `tinytrain hash`."""
    return tyro.cli(print_digests, prog="tinytrain hash", args=args)
