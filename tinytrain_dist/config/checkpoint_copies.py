"""Check the settings for copies of checkpoints, and show a URL without what may be secret in it.

Must not know how copies are made.
"""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING

from tinytrain_dist.config.defaults import changed_from_default
from tinytrain_dist.utils.text import is_url

if TYPE_CHECKING:  # not at run time, because schema.py imports this module
    from tinytrain_dist.config.schema import TrainingConfig

ENVIRONMENT = "for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile"
COPIES_SETTINGS = ("checkpoint_copies", "copies_keep_last", "copies_keep_every", "copies_end_limit")
READ_ONLY = ("http", "https", "github")  # nothing can be written by these protocols


def shown_place(place: str) -> str:
    """Return a place as it may be shown and stored: without a user, a password, and what follows the path."""
    if not is_url(place):
        return place.rstrip("/") or "/"
    scheme, _, rest = place.partition("://")
    host, slash, path = rest.partition("/")
    path = re.split(r"[?#]", path)[0]
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")


def copies_problems(config: TrainingConfig) -> list[str]:
    """Return problems of the settings for copies: secrets in a URL, a place that is no place, no effect."""
    problems = []
    for name in ("checkpoint_copies", "resume", "ckpt_path_to_resume"):
        value = getattr(config, name)
        if value is not None and _has_secret(value):
            problems.append(
                f"{name}: {shown_place(value)} is given with a password, a key or a query, which would be written to "
                f"config.toml and into every checkpoint; leave it out, and set it in the environment ({ENVIRONMENT})"
            )
    place = config.checkpoint_copies
    if place is None:
        return problems + _unused_problems(config)
    if not place:
        return [*problems, "checkpoint_copies: is empty; give a URL or a folder, or leave it out"]
    scheme = place.partition("://")[0].lower()
    if is_url(place) and scheme in READ_ONLY:
        problems.append(f"checkpoint_copies: {shown_place(place)} cannot be written to; give a URL such as s3://...")
    path = place.removeprefix("file://")
    if not is_url(path) and Path(path).absolute() in (config.checkpoints_dir.absolute(), _run_folder(config)):
        problems.append(
            f"checkpoint_copies: {path} is the folder of the run itself; give one on another disk, or a URL"
        )
    if config.copies_keep_every is not None and config.copies_keep_every % config.ckpt_every:
        problems.append(
            f"copies_keep_every: {config.copies_keep_every} is not a multiple of ckpt_every {config.ckpt_every}, so "
            "some of these steps have no checkpoint; set it to a multiple"
        )
    return problems


def _run_folder(config: TrainingConfig) -> Path:
    return Path(config.target_dir).absolute()


def _has_secret(place: str) -> bool:
    """Return whether a URL has a password, a key or a query. A user alone, as in sftp://me@host, is no secret."""
    if not is_url(place):
        return False
    scheme, _, rest = place.partition("://")
    user = rest.partition("/")[0].rpartition("@")[0]
    stores_have_no_users = scheme.lower() in ("s3", "s3a", "gs", "gcs")
    return ":" in urllib.parse.unquote(user) or bool(user and stores_have_no_users) or "?" in rest or "#" in rest


def _unused_problems(config: TrainingConfig) -> list[str]:
    return [
        f"{name}: {getattr(config, name)} has no effect without checkpoint_copies; set it, or leave this out"
        for name in changed_from_default(config, COPIES_SETTINGS[1:])
    ]
