"""Find out whether the current folder exists. Without it, relative paths and some libraries fail obscurely."""

from __future__ import annotations

import os


def current_folder_problem() -> str:
    """Return a sentence if the current folder was removed; "" otherwise."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return "the current folder has been removed; change to one that exists (cd), and run the command again"
    return ""
