"""Check that the current folder exists. Without it, relative paths and some libraries fail with obscure messages."""

from __future__ import annotations

import os

from tinytrain_dist.errors import TinytrainError


def check_current_folder() -> None:
    """Check that the current folder was not removed. Errors: TinytrainError."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise TinytrainError(
            "the current folder has been removed; change to one that exists (cd), and run the command again"
        ) from None
