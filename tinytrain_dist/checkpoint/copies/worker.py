"""Copy checkpoints to a URL and back: a program in a process of its own, which rank 0 starts and gives requests.

A process, because threads of rank 0 would share the interpreter with training, and so that a library that hangs or
fails cannot take the run with it. It has the lowest priority and ends with rank 0. Requests and replies are lines of
JSON. Must not import torch, or print anything else: a library's own words may contain what is secret in a URL.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tinytrain_dist.checkpoint.copies.copy_layout import (
    COPY_FILE,
    MARKER_FILE,
    SET_ASIDE_FILE,
    RemoteCopy,
    describe_conflict,
    is_marker,
    manifest_digest,
    marker,
    read_copies,
    read_copy,
    steps_to_keep,
)
from tinytrain_dist.checkpoint.copies.remote_folder import CopyError, RemoteFolder, SentFile
from tinytrain_dist.checkpoint.copies.streamed_digest import StreamedDigest
from tinytrain_dist.checkpoint.manifest import Manifest, read_manifest
from tinytrain_dist.config.run_folder import (
    DOWNLOAD_SUFFIX,
    MANIFEST_FILE,
    TRAINER_STATE_FILE,
    checkpoint_name,
    checkpoint_step,
)
from tinytrain_dist.errors import CheckpointError
from tinytrain_dist.utils.atomic_files import fsync_folder, read_json_object
from tinytrain_dist.utils.json_files import is_whole_number, parse_json, to_json

REPLY_SECONDS = 0.2  # between two replies about progress
PARENT_SECONDS = 0.5  # between two checks that rank 0 is alive
BLOCK_BYTES = 4 << 20
LOWEST_PRIORITY = 19  # of Linux; the priority for the disk follows from it

Request = dict[str, Any]
Reply = Callable[..., None]


class CopyWorker:
    """The copies of one run at one URL."""

    def __init__(self, reply: Reply) -> None:
        """`reply` is called with the kind of a reply, and its values as keyword arguments."""
        self._reply = reply
        self._known: list[RemoteCopy] = []

    def open(self, request: Request) -> None:
        """Set the URL and the run. `run` and `claim` are missing before the run is known."""
        self._remote = RemoteFolder(request["url"])
        self._prefix = request["prefix"]
        self._run = request.get("run", "")
        self._claim = request.get("claim", "")
        self._keep_last, self._keep_every = request.get("keep_last", 1), request.get("keep_every")

    def claim(self, request: Request) -> dict[str, Any]:
        """Write the marker, which also shows that files can be written; return the run and its complete copies.

        run: of the run folder, None if it has none. adopt: the run at the URL becomes this one if its target_dir is
        this (any: in any case; None: never). is_new: refuse if there are copies already. Errors: CopyError if the
        copies belong to another run.
        """
        found = self._remote.read_json(MARKER_FILE)
        run, target_dir = request.get("run"), request["target_dir"]
        if not is_marker(found):
            run = run or request["new_run"]
        elif run is None and request["adopt"] in ("any", found.get("target_dir")):
            run = found["run"]
        elif run != found["run"]:
            raise CopyError(describe_conflict(self._remote.shown, found), concerns="run")
        self._run, self._claim = str(run), request["claim"]
        if request.get("is_new") and (copies := self._copies()):
            raise CopyError(
                f"checkpoint_copies: {self._remote.shown} holds {len(copies)} copies of this run, but resume = never "
                "starts a new run; set resume = auto, or another checkpoint_copies",
                concerns="run",
            )
        self._remote.write_json(MARKER_FILE, marker(self._run, target_dir, self._claim, request["by"]))
        return {"run": self._run, "copies": self._copies()}

    def copy(self, request: Request) -> dict[str, Any]:
        """Copy one checkpoint, unless there is a copy of it; then apply the retention rule. Returns the copies.

        newest_step: of the checkpoints of the run; copies after it belong to a past that the run has gone back before.
        """
        self._check_claim()
        folder = Path(request["folder"])
        self._upload(folder)
        self._retain(checkpoint_step(folder), request["newest_step"])
        return {"copies": self._copies()}

    def fetch(self, request: Request) -> dict[str, Any]:
        """Download the newest valid copy, or the one named `name`; return its path, None if there is none.

        Errors: CheckpointError if there are copies and none of them is valid.
        """
        into, prefix, name = Path(request["into"]), request["save_prefix"], request.get("name")
        if name is not None:
            return {"path": str(self._download(name, into, prefix))}
        copies = [copy for copy in read_copies(self._remote, self._prefix) if copy.run == self._run]
        tried = 0
        for copy in reversed(copies):
            if MANIFEST_FILE not in copy.found:
                continue  # a copy that was not completed
            tried += 1
            try:
                if copy.problems:
                    raise CheckpointError("; ".join(copy.problems))
                return {"path": str(self._download(copy.name, into, prefix))}
            except CopyError:
                raise
            except CheckpointError as error:
                self._reply("note", text=f"damaged copy, skipped: {error}")
        if tried:
            raise CheckpointError(f"checkpoint_copies: none of the {tried} copies at {self._remote.shown} is valid")
        return {"path": None}

    # ---------------------------------------------------------------- to the URL

    def _copies(self) -> dict[str, str]:
        """Return the digests of the complete copies of this run, by name. Errors: CopyError."""
        self._known = read_copies(self._remote, self._prefix, self._known)
        return {copy.name: copy.digest for copy in self._known if copy.run == self._run and copy.complete}

    def _check_claim(self) -> None:
        """Check that no other start of the run copies there. Errors: CopyError."""
        found = self._remote.read_json(MARKER_FILE)
        if found.get("run") != self._run or found.get("claim") != self._claim:
            raise CopyError(
                f"checkpoint_copies: another start ({found.get('by', 'unknown')}) copies to {self._remote.shown} now, "
                "so this one copies nothing more",
                concerns="run",
            )

    def _upload(self, folder: Path) -> None:
        manifest = read_manifest(folder)
        content = (folder / MANIFEST_FILE).read_bytes()
        digest, name = manifest_digest(content), folder.name
        found = {path: entry for path, entry in self._remote.list().items() if path.startswith(f"{name}/")}
        present = read_copy(self._remote, name, {path[len(name) + 1 :]: entry for path, entry in found.items()})
        if present.found and present.run != self._run:
            raise CheckpointError(
                f"{self._remote.shown}/{name}: there are files that this run has not copied; move them away"
            )
        if present.complete and present.digest == digest:
            return
        if present.found and (present.digest != digest or present.complete):
            self._delete(present)
            present = RemoteCopy(name, self._run, digest)
        record = {"run": self._run, "manifest": digest, "files": sorted(manifest.files)}
        self._remote.abort_uploads(lambda path: path.startswith(f"{name}/") and path[len(name) + 1 :] in manifest.files)
        self._remote.write_json(f"{name}/{COPY_FILE}", record)
        self._done, self._total = 0, sum(entry["bytes"] for entry in manifest.files.values())
        for file in manifest.files:
            self._upload_file(folder / file, f"{name}/{file}", manifest, file in present.found)
        self._remote.write(f"{name}/{MANIFEST_FILE}", content)

    def _upload_file(self, path: Path, name: str, manifest: Manifest, may_be_there: bool) -> None:
        """Copy one file, unless an upload that was interrupted has done so already."""
        before = self._done
        if may_be_there and self._remote.matches(name, self._read_local(path, manifest), path):
            return
        self._done = before
        digest = StreamedDigest(path.name, manifest)

        def on_part(part: bytes) -> None:
            digest.update(part)
            self._progress(len(part))

        def check() -> None:
            if problem := digest.problem():
                raise CheckpointError(f"{path.parent}/{problem}; the checkpoint is damaged, so it is not copied")

        sent = self._remote.send(path, name, on_part, check)
        if not self._remote.matches(name, sent, path):
            raise CopyError(f"{self._remote.shown}/{name}: holds other bytes than were sent", may_pass=True)

    def _read_local(self, path: Path, manifest: Manifest) -> SentFile:
        """Return what would be known of a file if it had been sent. Errors: OSError."""
        sent = self._remote.unsent(path.stat().st_size)
        with open(path, "rb") as file:
            while part := file.read(sent.part_bytes):
                sent.add(part)
                self._progress(len(part))
        return sent

    def _progress(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._reply("progress", done=self._done, total=self._total)

    def _retain(self, copied_step: int, newest_step: int) -> None:
        """Delete the copies that the retention rule does not keep. The one that was just made stays in any case."""
        copies = [copy for copy in read_copies(self._remote, self._prefix, self._known) if copy.run == self._run]
        for copy in copies:
            if copy.complete and copy.step > newest_step:
                self._set_aside(copy)
        complete = [copy.step for copy in copies if copy.complete and copy.step <= newest_step]
        kept = steps_to_keep(complete, self._keep_last, self._keep_every) | {copied_step}
        kept |= steps_to_keep((copy.step for copy in copies), self._keep_last, None)  # which may be completed next
        newest_complete = max(complete, default=-1)
        for copy in copies:
            if copy.step < newest_complete and copy.step not in kept:
                self._delete(copy)

    def _set_aside(self, copy: RemoteCopy) -> None:
        """Rename the manifest of a copy that is newer than the run, so that no start resumes from it."""
        content = self._remote.read(f"{copy.name}/{MANIFEST_FILE}")
        if content is not None:
            self._remote.write(f"{copy.name}/{SET_ASIDE_FILE}", content)
            self._remote.delete(f"{copy.name}/{MANIFEST_FILE}")
            self._reply("note", text=f"{self._remote.shown}/{copy.name}: set aside, because it is newer than the run")

    def _delete(self, copy: RemoteCopy) -> None:
        """Delete the files of a copy, in an order that leaves no manifest without its files."""
        names = [MANIFEST_FILE, *copy.files, SET_ASIDE_FILE, COPY_FILE]
        for name in names:
            if name in copy.found:
                self._remote.delete(f"{copy.name}/{name}")
        self._remote.delete_folder(copy.name)

    # ---------------------------------------------------------------- from the URL

    def _download(self, name: str, into: Path, prefix: str) -> Path:
        """Download a copy into the folder `into`, where it appears by one rename.

        Files that an earlier download has completed are not read again. Errors: CopyError if the store cannot be read;
        CheckpointError if the copy is damaged; OSError of the local disk.
        """
        content = self._remote.read(f"{name}/{MANIFEST_FILE}")
        if content is None:
            raise CheckpointError(f"{self._remote.shown}/{name}: has no {MANIFEST_FILE}, so it is no complete copy")
        aside = into / f"{checkpoint_name(prefix, checkpoint_step(Path(name)))}{DOWNLOAD_SUFFIX}"
        own = aside / MANIFEST_FILE
        if aside.exists() and not (own.is_file() and own.read_bytes() == content):
            shutil.rmtree(aside)
        aside.mkdir(parents=True, exist_ok=True)
        own.write_bytes(content)
        try:
            manifest = read_manifest(aside)
            self._done, self._total = 0, sum(entry["bytes"] for entry in manifest.files.values())
            for file in manifest.files:
                self._download_file(f"{name}/{file}", aside / file, manifest)
            step: Any = read_json_object(aside / TRAINER_STATE_FILE).get("step")
            if not is_whole_number(step):
                raise CheckpointError(f"{self._remote.shown}/{name}: is no checkpoint of a training run")
        except CopyError:
            raise
        except CheckpointError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(str(error).replace(f"{aside}", f"{self._remote.shown}/{name}")) from None
        with open(own, "rb") as written:
            os.fsync(written.fileno())
        fsync_folder(aside)
        final = into / checkpoint_name(prefix, step)
        aside.rename(final)
        fsync_folder(into)
        return final

    def _download_file(self, name: str, path: Path, manifest: Manifest) -> None:
        before = self._done
        if path.is_file() and not self._copy_blocks(_blocks_of(path), None, path, manifest):
            return
        self._done = before
        partial = path.with_name(f"{path.name}.part")
        with open(partial, "wb") as file:
            blocks = self._remote.blocks(name, BLOCK_BYTES)
            problem = self._copy_blocks(blocks, file, path, manifest)
            file.flush()
            os.fsync(file.fileno())
        if problem:
            raise CheckpointError(f"{path.parent}/{problem}")
        partial.rename(path)

    def _copy_blocks(self, blocks: Iterator[bytes], target: IO[bytes] | None, path: Path, manifest: Manifest) -> str:
        """Write the bytes of a file, or only check them; return how they differ from the manifest."""
        digest = StreamedDigest(path.name, manifest)
        for block in blocks:
            digest.update(block)
            if target is not None:
                target.write(block)
            self._progress(len(block))
        return digest.problem()


def _blocks_of(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


# ---------------------------------------------------------------- the program


def _answer(worker: CopyWorker, request: Request, reply: Reply) -> None:
    """Carry out one request, and reply how it ended."""
    try:
        if request["do"] == "open":
            worker.open(request)
            result: dict[str, Any] = {}
        else:
            result = {"claim": worker.claim, "copy": worker.copy, "fetch": worker.fetch}[request["do"]](request)
        reply("done", **result)
    except CopyError as error:
        reply("failed", text=str(error), may_pass=error.may_pass, concerns=error.concerns)
    except CheckpointError as error:
        reply("failed", text=str(error), may_pass=False, concerns="checkpoint")
    except OSError as error:
        reply("failed", text=f"{error.filename or 'a file'}: {error.strerror}", may_pass=True, concerns="")
    except Exception as error:  # its text may contain a URL as a library has it
        text = f"the copy ended with an unexpected {type(error).__name__}"
        reply("failed", text=text, may_pass=True, concerns="")


def _end_with(parent: int) -> None:
    """End this process when its parent has ended; the body of a thread. Nothing is lost: a copy is complete or not."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)


def main() -> None:
    """Answer requests until there are no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    os.nice(LOWEST_PRIORITY)
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    last_progress = 0.0

    def reply(kind: str, **values: Any) -> None:
        nonlocal last_progress
        if kind == "progress":
            now = time.monotonic()
            if now - last_progress < REPLY_SECONDS:
                return
            last_progress = now
        output.write(to_json({"kind": kind, **values}) + "\n")
        output.flush()

    worker = CopyWorker(reply)
    for line in sys.stdin.buffer:
        _answer(worker, parse_json(line), reply)
    os._exit(0)  # threads of libraries must not delay the end


if __name__ == "__main__":
    main()
