"""Define what a copy of a checkpoint is, which copies of a run there are, and which of them stay.

A store has no rename, so a copy is complete when its manifest exists, which is written last and deleted first:

    URL/
      tinytrain_copies.json                the run to which the copies belong, and the start that writes them now
      checkpoint-00001000/
        copy.json                          written first: the run, the digest of the manifest, the names of the files
        model-*, optimizer-*, ...          the files of the checkpoint
        manifest.json                      written last; without it there is no copy
      checkpoint-00001200/
        manifest.json.set-aside            a copy that the run has gone back before; the manifest has another name

Anything else is not a copy of this run, and is never changed or deleted. Must not import torch. Must not know how files
are sent.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tinytrain_dist.checkpoint.copies.remote_folder import RemoteEntry, RemoteFolder
from tinytrain_dist.config.run_folder import MANIFEST_FILE
from tinytrain_dist.utils.json_files import is_file_name, is_whole_number, parse_json

MARKER_FILE = "tinytrain_copies.json"
COPY_FILE = "copy.json"
SET_ASIDE_FILE = f"{MANIFEST_FILE}.set-aside"
FORMAT = 1


@dataclass(frozen=True)
class RemoteCopy:
    """What is in the folder of one checkpoint at the URL."""

    name: str
    run: str  # that has written it; "" if nothing says so
    digest: str  # of the manifest, see `manifest_digest`
    files: tuple[str, ...] = ()  # that belong to it
    problems: tuple[str, ...] = ()  # why it is not complete; () if it is
    found: dict[str, RemoteEntry] = field(default_factory=dict)  # all files in the folder

    @property
    def step(self) -> int:
        """The step of the checkpoint."""
        return int(self.name.rpartition("-")[2])

    @property
    def complete(self) -> bool:
        """Whether its manifest exists, and all files have the sizes in it."""
        return not self.problems


def read_copies(remote: RemoteFolder, prefix: str | None, known: Iterable[RemoteCopy] = ()) -> list[RemoteCopy]:
    """Return what is in all folders PREFIX-STEP at the URL, by step. Errors: CopyError.

    prefix: None for any. known: what an earlier call returned; folders that have not changed since are not read again.
    """
    pattern = re.compile((".+" if prefix is None else re.escape(prefix)) + r"-\d{8,}", re.ASCII)
    folders: dict[str, dict[str, RemoteEntry]] = {}
    for path, entry in remote.list().items():
        folder, _, name = path.partition("/")
        if pattern.fullmatch(folder) and name:
            folders.setdefault(folder, {})[name] = entry
    by_name = {copy.name: copy for copy in known}
    copies = []
    for name, found in folders.items():
        before = by_name.get(name)
        copies.append(before if before is not None and before.found == found else read_copy(remote, name, found))
    return sorted(copies, key=lambda copy: copy.step)


def read_copy(remote: RemoteFolder, name: str, found: dict[str, RemoteEntry]) -> RemoteCopy:
    """Read the two files that describe a copy. Errors: CopyError."""
    record = remote.read_json(f"{name}/{COPY_FILE}") if COPY_FILE in found else {}
    files = record.get("files")
    names = tuple(files) if isinstance(files, list) and all(map(is_file_name, files)) else ()
    manifest = remote.read(f"{name}/{MANIFEST_FILE}") if MANIFEST_FILE in found else None
    where = f"{remote.shown}/{name}"
    problems: tuple[str, ...] = (f"{where}: has no {MANIFEST_FILE}, so it is not complete",)
    if manifest is not None:
        problems = tuple(_size_problems(where, manifest, found))
    return RemoteCopy(name, str(record.get("run", "")), str(record.get("manifest", "")), names, problems, found)


def _size_problems(where: str, manifest: bytes, found: Mapping[str, RemoteEntry]) -> list[str]:
    try:
        files = parse_json(manifest)["files"]
        sizes = {name: entry["bytes"] for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return [f"{where}: its {MANIFEST_FILE} cannot be read"]
    problems = []
    for name, size in sizes.items():
        has = f"has {found[name].size:,} bytes" if name in found else "is missing"
        if name not in found or found[name].size != size:
            problems.append(f"{where}/{name}: {has}, but {size:,} bytes were written")
    return problems


def manifest_digest(manifest: bytes) -> str:
    """Return the digest that a manifest has of itself; "" if it cannot be read. It tells checkpoints apart."""
    try:
        return str(parse_json(manifest)["sha256"])
    except (ValueError, KeyError, TypeError):
        return ""


def steps_to_keep(steps: Iterable[int], keep_last: int, keep_every: int | None) -> set[int]:
    """Return the steps whose copies stay: the newest `keep_last`, and the multiples of `keep_every`."""
    in_order = sorted(steps)
    return set(in_order[-keep_last:]) | {step for step in in_order if keep_every and step % keep_every == 0}


def marker(run: str, target_dir: str, claim: str, where: str) -> dict[str, Any]:
    """Return the content of MARKER_FILE. claim: names one start of the run; where: its host and process."""
    return {"format": FORMAT, "run": run, "target_dir": target_dir, "claim": claim, "by": where}


def describe_conflict(shown: str, found: Mapping[str, Any]) -> str:
    """Return why a run may not copy to a URL: the copies there belong to another run."""
    return (
        f"checkpoint_copies: {shown} holds the copies of another run, with target_dir {found.get('target_dir')}, and "
        "each run would delete those of the other; set another checkpoint_copies, or, to continue that run here, "
        f"start in a folder without checkpoints with resume = {shown}/NAME, where NAME is one of its copies"
    )


def is_marker(found: Mapping[str, Any]) -> bool:
    """Return whether this is the content of a MARKER_FILE."""
    return is_whole_number(found.get("format")) and isinstance(found.get("run"), str)
