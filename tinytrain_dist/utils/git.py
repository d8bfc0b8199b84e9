"""Ask git about the checkout that contains this package, if there is one."""

from __future__ import annotations

import subprocess

from tinytrain_dist.utils.package_files import PACKAGE


def git_output(*arguments: str) -> str | None:
    """Return what git prints in the checkout of this package; None without a checkout, or without git.

    An installed package may lie inside a repository of the user, which says nothing about the package.
    """
    if not (PACKAGE.parent / "pyproject.toml").is_file():
        return None
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=PACKAGE.parent)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None
