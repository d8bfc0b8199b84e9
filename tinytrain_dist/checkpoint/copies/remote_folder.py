"""List, read, write and delete files below one URL, through fsspec.

A URL may also be a local folder. Every error is a sentence without what a URL or an error may hold of credentials. Must
not know what the files are. Must not import torch.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from tinytrain_dist.config.checkpoint_copies import shown_place
from tinytrain_dist.data.preparation.remote_errors import error_of, may_pass
from tinytrain_dist.data.preparation.remote_files import RemoteFile, file_system
from tinytrain_dist.errors import CheckpointError, DataError
from tinytrain_dist.utils.json_files import parse_json, to_json
from tinytrain_dist.utils.text import is_url

# A file is sent in parts, each of which is repeated by itself. A part is held in memory.
PART_BYTES = 16 << 20
MOST_PARTS = 9_000  # a store may refuse more than 10,000
PART_TRIES = 5
# Seconds between the tries of a small request, and of a file. The caller tries again later, and for longer.
RETRY_SECONDS = (0.5, 1.0, 2.0)
READ_BACK_BYTES = 1 << 20  # from the beginning, the middle and the end of a file

Result = TypeVar("Result")


class CopyError(CheckpointError):
    """A file of a copy cannot be read or written."""

    def __init__(self, text: str, may_pass: bool = False, concerns: str = "") -> None:
        """Describe the error.

        may_pass: whether the same may work later without a change by the user. concerns: "run" if the run may copy
        nothing to this URL, "checkpoint" if one checkpoint cannot be copied, "" if it is the store.
        """
        super().__init__(text)
        self.may_pass = may_pass
        self.concerns = concerns


@dataclass(frozen=True)
class RemoteEntry:
    """What a listing says about a file. checksum: an ETag of S3, or an MD5; "" if the store gives none."""

    size: int
    checksum: str = ""


@dataclass
class SentFile:
    """What is known of a file that was sent, to compare it with what the store says."""

    size: int
    part_bytes: int
    whole: Any = field(default_factory=lambda: hashlib.md5(usedforsecurity=False))
    parts: list[bytes] = field(default_factory=list)

    def add(self, part: bytes) -> None:
        """Note a part of `part_bytes`, or the last one."""
        self.whole.update(part)
        self.parts.append(hashlib.md5(part, usedforsecurity=False).digest())

    def has_checksum(self, checksum: str) -> bool:
        """Return whether a checksum is that of these bytes; an unknown kind of checksum is not."""
        of_parts = hashlib.md5(b"".join(self.parts), usedforsecurity=False).hexdigest()
        known = {self.whole.hexdigest(), f"{of_parts}-{len(self.parts)}"}
        return checksum in known or checksum == base64.b64encode(self.whole.digest()).decode()


class RemoteFolder:
    """A folder at a URL or a local path. The methods take names relative to it, such as checkpoint-00001000/x.json."""

    def __init__(self, place: str) -> None:
        """Find the file system. Errors: CopyError if the protocol is not known, or its library is not installed."""
        self.place = place.rstrip("/") if is_url(place) else f"file://{Path(place).absolute()}"
        self.shown = shown_place(place)
        try:
            self._system, self._root = file_system(self.place)
        except DataError as error:
            raise CopyError(str(error), may_pass=False) from None
        self._root = self._root.rstrip("/")
        protocol = self._system.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self.is_local = "file" in self._protocols

    def list(self) -> dict[str, RemoteEntry]:
        """Return all files below the folder by name; {} if there is no folder. Errors: CopyError."""

        def find() -> dict[str, RemoteEntry]:
            self._system.invalidate_cache()
            try:
                found = self._system.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            return {name[len(self._root) + 1 :]: _entry(info) for name, info in found.items()}

        return self._try("", "read", find)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, or None if there is none. Errors: CopyError."""

        def get() -> bytes | None:
            try:
                return bytes(self._system.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

        return self._try(name, "read", get)

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the JSON object in a small file; {} if there is none, or anything else. Errors: CopyError."""
        content = self.read(name)
        with contextlib.suppress(ValueError):
            value = parse_json(content or b"")
            return value if isinstance(value, dict) else {}
        return {}

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, and read it back. Errors: CopyError."""

        def put() -> None:
            self._make_folder(name)
            self._system.pipe_file(self._path(name), data)

        self._try(name, "written", put)
        if self.read(name) != data:
            raise CopyError(f"{self.shown}/{name}: holds other bytes than were written; check the store", may_pass=True)

    def write_json(self, name: str, value: Any) -> None:
        """Write a small file with one JSON value. Errors: CopyError."""
        self.write(name, (to_json(value) + "\n").encode())

    def unsent(self, size: int) -> SentFile:
        """Return the description of a file of this size before its first part."""
        return SentFile(size, max(PART_BYTES, -(-size // MOST_PARTS)))

    def send(self, path: Path, name: str, on_part: Callable[[bytes], None], check: Callable[[], None]) -> SentFile:
        """Write a large file; where the store has parts, nothing appears before the last one. Errors: CopyError.

        on_part: called with each part that was read. check: called after the last part, before the file appears; what
        it raises ends the upload. Other errors: OSError of the local file.
        """
        sent = self.unsent(path.stat().st_size)
        part_bytes = sent.part_bytes

        def open_file() -> Any:
            self._make_folder(name)
            if hasattr(self._system, "retries"):
                self._system.retries = PART_TRIES
            return self._system.open(self._path(name), "wb", block_size=part_bytes)

        file = self._try(name, "written", open_file)
        try:
            with open(path, "rb") as source:
                while part := source.read(part_bytes):
                    sent.add(part)
                    on_part(part)
                    self._once(name, partial(file.write, part))
            check()
            self._once(name, lambda: _close(file))
        except BaseException:
            _discard(file)
            raise
        return sent

    def matches(self, name: str, sent: SentFile, path: Path) -> bool:
        """Return whether a file is what was sent: by its size, and its checksum or some of its bytes.

        A store that checks what it receives, as S3 does, has refused damaged parts. Without a checksum to compare with,
        only the ends and the middle are read back: reading all would double the traffic, and every byte is compared
        with its digest before a run resumes from it. Errors: CopyError; OSError of the local file.
        """
        info = self._try(name, "read", lambda: self._fresh_info(name))
        entry = _entry(info)
        if entry.size != sent.size:
            return False
        if entry.checksum and sent.has_checksum(entry.checksum):
            return True
        starts = {0, max(0, (sent.size - READ_BACK_BYTES) // 2), max(0, sent.size - READ_BACK_BYTES)}
        with open(path, "rb") as source:
            for start in sorted(starts):
                source.seek(start)
                expected = source.read(READ_BACK_BYTES)
                end = start + len(expected)
                found = self._try(name, "read", partial(self._range, name, start, end))
                if found != expected:
                    return False
        return True

    def blocks(self, name: str, block_bytes: int) -> Iterator[bytes]:
        """Yield the content of a file, and read on where a connection has broken. Errors: CopyError."""
        try:
            with RemoteFile(self.url(name)) as file:
                while block := file.read(block_bytes):
                    yield block
        except DataError as error:
            lasting = "changed while" in str(error)
            raise CopyError(str(error), may_pass=not lasting) from None

    def url(self, name: str) -> str:
        """Return the URL of a file."""
        return f"{self.place}/{name}"

    def delete(self, name: str) -> None:
        """Delete a file, unless there is none. Errors: CopyError."""

        def remove() -> None:
            with contextlib.suppress(FileNotFoundError):
                self._system.rm_file(self._path(name))

        self._try(name, "deleted", remove)

    def delete_folder(self, name: str) -> None:
        """Delete a local folder if it is empty. A store has no folders."""
        if self.is_local:
            with contextlib.suppress(OSError):
                os.rmdir(self._path(name))

    def abort_uploads(self, wanted: Callable[[str], bool]) -> None:
        """Drop the parts of uploads that killed processes left, which S3 keeps and charges for.

        `wanted` tells for a name whether it belongs to the caller. Nothing depends on it, so an error is ignored: some
        users may not list uploads.
        """
        if not hasattr(self._system, "list_multipart_uploads"):
            return
        bucket, _, key = self._root.partition("/")
        prefix = f"{key}/" if key else ""
        with contextlib.suppress(Exception):
            for upload in self._system.list_multipart_uploads(bucket):
                if upload["Key"].startswith(prefix) and wanted(upload["Key"][len(prefix) :]):
                    self._system.abort_mpu(bucket, upload["Key"], upload["UploadId"])

    def _range(self, name: str, start: int, end: int) -> bytes:
        return bytes(self._system.cat_file(self._path(name), start=start, end=end)) if end > start else b""

    def _fresh_info(self, name: str) -> dict[str, Any]:
        self._system.invalidate_cache()
        return dict(self._system.info(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_folder(self, name: str) -> None:
        """Make the folder of a file where files need one. On S3 this could make a bucket."""
        if self.is_local:
            os.makedirs(os.path.dirname(self._path(name)), exist_ok=True)
        elif not _STORES & self._protocols:
            self._system.makedirs(os.path.dirname(self._path(name)), exist_ok=True)

    def _once(self, name: str, work: Callable[[], object]) -> None:
        self._try(name, "written", work, waits=())

    def _try(
        self, name: str, action: str, work: Callable[[], Result], waits: tuple[float, ...] | None = None
    ) -> Result:
        """Return what `work` returns, and repeat it after errors that may pass. Errors: CopyError."""
        waits = RETRY_SECONDS if waits is None else waits
        for wait in (*waits, None):
            try:
                return work()
            except CopyError:
                raise
            except Exception as error:
                passing = may_pass(error)
                if wait is None or not passing:
                    url = self.url(name) if name else self.place
                    tries = len(waits) + 1 if wait is None else 1
                    text = str(error_of(url, error, tries, action)).replace(", and run again", "")
                    raise CopyError(text, passing) from None
            time.sleep(wait)
        raise AssertionError


_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "oci", "hf"}


def _entry(info: dict[str, Any]) -> RemoteEntry:
    checksum = str(info.get("ETag") or info.get("md5Hash") or "").strip('"')
    is_md5 = re.fullmatch(r"[0-9a-f]{32}(-\d+)?|[A-Za-z0-9+/]{22}==", checksum) is not None
    return RemoteEntry(int(info.get("size") or 0), checksum if is_md5 else "")


def _close(file: Any) -> None:
    """Let a file appear; a local one is on disk afterwards."""
    inner = getattr(file, "f", file)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a file of a store has no descriptor
        inner.flush()
        os.fsync(inner.fileno())
    file.close()


def _discard(file: Any) -> None:
    """Drop an upload. Closing such a file, also by the garbage collector, would let its first part appear."""
    with contextlib.suppress(Exception):
        file.discard()
    try:
        file.closed = True
    except AttributeError:  # a local file
        with contextlib.suppress(OSError):
            file.close()
