"""Write a folder with a manifest under a temporary name, and give it its final name when it is complete.

For commands that make one folder in one process. Must not know what the folder contains.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tinytrain_dist.checkpoint.manifest import Manifest, commit_folder
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.stale_files import describe_leftovers, remove_leftovers, temporary_path


def check_absent(out: Path) -> None:
    """Check that there is nothing at `out`. Errors: CheckpointError."""
    if os.path.lexists(out):
        raise CheckpointError(f"{out}: exists already and is not replaced; give another folder or delete it")


@contextmanager
def new_folder(out: Path) -> Iterator[tuple[Path, Manifest]]:
    """Yield a temporary folder and an empty manifest; rename the folder to `out` when the block ends without an error.

    Removes what killed processes have left beside `out`. Errors: CheckpointError if the disk fails or `out` exists.
    Nothing is left behind then.
    """
    if removed := remove_leftovers(out.parent):
        print(describe_leftovers(removed), file=sys.stderr)
    aside = temporary_path(out)
    manifest = Manifest()
    try:
        aside.mkdir(parents=True)
        yield aside, manifest
        commit_folder(aside, out, manifest)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error}); give another path") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # also after Ctrl-C; after the rename there is nothing to remove
