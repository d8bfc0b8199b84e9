"""`tinytrain ls URL` and `tinytrain verify URL`: list and check the copies of a run at a URL.

Must not import torch. Changes nothing.
"""

from __future__ import annotations

from pathlib import Path

import tyro
from rich.text import Text

from tinytrain_dist.checkpoint.copies.copy_layout import (
    COPY_FILE,
    SET_ASIDE_FILE,
    RemoteCopy,
    read_copies,
)
from tinytrain_dist.checkpoint.copies.remote_folder import RemoteFolder
from tinytrain_dist.checkpoint.copies.streamed_digest import StreamedDigest
from tinytrain_dist.checkpoint.manifest import read_manifest
from tinytrain_dist.cli.tables import new_table, print_table
from tinytrain_dist.config.checkpoint_copies import shown_place
from tinytrain_dist.config.run_folder import MANIFEST_FILE, checkpoint_step
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.progress import Advance, progress_bar
from tinytrain_dist.utils.stale_files import scratch_folder
from tinytrain_dist.utils.text import format_bytes

UrlArgument = tyro.conf.Positional[str]
BLOCK_BYTES = 4 << 20


def list_copies(url: UrlArgument) -> int:
    """List the copies at a URL.

    Args:
        url: The URL of the copies of a run (its checkpoint_copies), or of one of them.
    """
    remote, copies = _find(url)
    table = new_table("step", "size", "complete<", "folder<")
    for copy in copies:
        size = format_bytes(sum(entry.size for entry in copy.found.values()))
        table.add_row(str(copy.step), size, _completeness(remote, copy), copy.name)
    print_table(table)
    return 0


def _completeness(remote: RemoteFolder, copy: RemoteCopy) -> Text:
    if copy.complete:
        return Text("yes, by size", "green")
    if MANIFEST_FILE in copy.found:
        return Text("DAMAGED: " + copy.problems[0].replace(f"{remote.shown}/{copy.name}/", ""), "bold red")
    if SET_ASIDE_FILE in copy.found:
        return Text("set aside: the run has gone back before it", "yellow")
    return Text("unfinished: being copied, or left by a crash", "yellow")


def verify_copies(url: UrlArgument) -> int:
    """Read every byte of the copies at a URL; exit code 1 if anything is damaged.

    Args:
        url: The URL of the copies of a run (its checkpoint_copies), or of one of them.
    """
    remote, copies = _find(url)
    intact = [_verify(remote, copy) for copy in copies if MANIFEST_FILE in copy.found]
    for copy in copies:
        if MANIFEST_FILE not in copy.found:
            print(f"skipped  {remote.shown}/{copy.name}  not a finished copy; a start ignores it")
    return 0 if all(intact) else 1


def _find(url: str) -> tuple[RemoteFolder, list[RemoteCopy]]:
    """Return the copies at a URL, or the one that it names. Errors: CheckpointError if there is none."""
    place, _, name = url.rstrip("/").rpartition("/")
    wanted = name if checkpoint_step(Path(name)) >= 0 else None
    remote = RemoteFolder(place if wanted else url)
    copies = [copy for copy in read_copies(remote, None) if wanted is None or copy.name == wanted]
    if not copies:
        raise CheckpointError(f"{shown_place(url)}: there is no copy of a checkpoint; check the URL")
    return remote, copies


def _verify(remote: RemoteFolder, copy: RemoteCopy) -> bool:
    """Read a copy and print what is damaged; return whether it is intact."""
    problems: list[str] = list(copy.problems)
    size = sum(entry.size for name, entry in copy.found.items() if name != COPY_FILE)
    with (
        scratch_folder() as folder,
        progress_bar(f"verifying {copy.name}", size, unit="bytes") as advance,
    ):
        (folder / MANIFEST_FILE).write_bytes(remote.read(f"{copy.name}/{MANIFEST_FILE}") or b"")
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            problems.append(str(error).replace(str(folder), f"{remote.shown}/{copy.name}"))
        else:
            readable = [name for name in manifest.files if name in copy.found]
            digests = {name: StreamedDigest(name, manifest) for name in readable}
            problems += [_problem(remote, copy.name, name, digests[name], advance) for name in readable]
    problems = [problem for problem in problems if problem]
    where = f"{remote.shown}/{copy.name}"
    print(f"DAMAGED  {where}\n  " + "\n  ".join(problems) if problems else f"ok       {where}  {format_bytes(size)}")
    return not problems


def _problem(remote: RemoteFolder, copy: str, name: str, digest: StreamedDigest, advance: Advance) -> str:
    for block in remote.blocks(f"{copy}/{name}", BLOCK_BYTES):
        digest.update(block)
        advance(len(block))
    problem = digest.problem()
    return f"{remote.shown}/{copy}/{problem}" if problem else ""
