"""Find the documents of a corpus that repeat an earlier one, in bounded memory.

The first reading of the corpus gives a hash of each document. The result is one bit for each document, in their order.
The second reading, which encodes, only counts documents and looks at their bits. This has three consequences:

* The number of encoding processes cannot change what is removed, because they never see a removed document.
* An interrupted run needs no hashes to resume, only these bits and the number of documents that were read.
* Everything that the first reading decides, such as the split, is decided on the documents that stay.

Hashes beyond _BUFFER_BYTES are kept on disk, in _PARTS parts. One part after the other is sorted in memory. For each
million documents, this needs 40 MB on disk during the first reading, and below 1 MB of memory: 0.125 MB for the bits,
and 1/256 of the hashes with their order for sorting.

measured (2-core VM, 2026-11-28): 4 million documents take 9 s and 50 MB of memory; a million takes as much memory

Must not know files of a corpus, tokenizers or token files.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinytrain_dist.errors import DataError

# The hash of a document in two parts, its split key, its number and its bytes.
_ENTRY = struct.Struct("<QQQQQ")
_COLUMNS = [("first", "<u8"), ("second", "<u8"), ("split", "<u8"), ("number", "<u8"), ("bytes", "<u8")]
_PARTS = 256
_BUFFER_BYTES = 16_000_000  # of hashes in memory before they are written to disk


@dataclass(frozen=True)
class Duplicates:
    """Which documents of a corpus repeat an earlier one.

    marks: a bit for each document, the lowest bit of a byte first. documents, bytes: number and text of those removed.
    """

    marks: bytes
    documents: int
    bytes: int

    def __contains__(self, number: int) -> bool:
        """Return whether the document with this number, from 0, repeats an earlier one.

        A document behind the last one is new: its file has grown, which the reader of the corpus reports at its end.
        """
        return number >> 3 < len(self.marks) and bool(self.marks[number >> 3] >> (number & 7) & 1)

    def save(self, path: Path) -> dict[str, Any]:
        """Write the marks to a file, and return what `load` needs besides. Errors: OSError."""
        with path.open("wb") as file:
            file.write(self.marks)
            file.flush()
            os.fsync(file.fileno())
        digest = hashlib.sha256(self.marks).hexdigest()
        return {"documents": self.documents, "bytes": self.bytes, "sha256": digest}

    @classmethod
    def load(cls, path: Path, record: dict[str, Any]) -> Duplicates:
        """Return what `save` wrote. Errors: DataError if the file is missing or damaged."""
        try:
            marks = path.read_bytes()
        except FileNotFoundError:
            marks = b""
        if hashlib.sha256(marks).hexdigest() != record["sha256"]:
            raise DataError(
                f"{path}: is missing or damaged, so the work in its folder cannot be continued; delete {path.parent}, "
                "and run the command again"
            )
        return cls(marks, record["documents"], record["bytes"])


class Findings(NamedTuple):
    """Duplicates, and the smallest and largest split key (see `document_hashes`) of the documents that stay."""

    duplicates: Duplicates
    min_split_key: int
    max_split_key: int


class DuplicateFinder:
    """Collect a hash of each document of a corpus in order, and find those that occurred before."""

    def __init__(self, folder: Path) -> None:
        """Collect hashes. folder: where they are written if they are many; it must not exist."""
        self.folder = folder
        self.count = 0
        self._buffer = bytearray()
        self._parts: set[int] = set()  # those on disk

    def add(self, hashes: tuple[int, int], split_key: int, size: int) -> None:
        """Add the next document.

        hashes: of the text that is compared, 128 bits together. size: its bytes, for the sum that is reported.
        """
        self._buffer += _ENTRY.pack(*hashes, split_key, self.count, size)
        self.count += 1
        if len(self._buffer) >= _BUFFER_BYTES:
            self._write_buffer()

    def finish(self) -> Findings:
        """Return the duplicates, and remove what was written. Errors: OSError from the disk."""
        marks = np.zeros(-(-self.count // 8), np.uint8)
        documents = size = 0
        smallest, largest = 1 << 64, -1
        for entries in self._entries_by_part():
            repeats = _repeats(entries)
            numbers = entries["number"][repeats]
            np.bitwise_or.at(marks, numbers >> np.uint64(3), np.uint8(1) << (numbers & np.uint64(7)).astype(np.uint8))
            documents += len(numbers)
            size += int(entries["bytes"][repeats].sum())
            kept = entries["split"][~repeats]
            smallest, largest = min(smallest, int(kept.min())), max(largest, int(kept.max()))
        shutil.rmtree(self.folder, ignore_errors=True)
        return Findings(Duplicates(marks.tobytes(), documents, size), smallest, largest)

    def _write_buffer(self) -> None:
        """Append the buffer to the files of the parts, and empty it."""
        self.folder.mkdir(exist_ok=True)
        entries = np.frombuffer(bytes(self._buffer), _COLUMNS)
        entries = entries[np.argsort(_part_of(entries), kind="stable")]
        bounds = np.searchsorted(_part_of(entries), np.arange(_PARTS + 1)).tolist()
        for part, (start, end) in enumerate(itertools.pairwise(bounds)):
            if end > start:
                with self._path(part).open("ab") as file:
                    file.write(entries[start:end].tobytes())
                self._parts.add(part)
        self._buffer = bytearray()

    def _path(self, part: int) -> Path:
        return self.folder / f"{part:02x}"

    def _entries_by_part(self) -> Iterator[npt.NDArray[Any]]:
        """Yield all entries, those with the same hash together and in the order of the documents."""
        if self._parts:
            self._write_buffer()
            for part in sorted(self._parts):
                yield np.fromfile(self._path(part), _COLUMNS)
        elif self._buffer:
            yield np.frombuffer(bytes(self._buffer), _COLUMNS)


def _part_of(entries: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Return the part to which each entry belongs: int64 [entries]."""
    return (entries["first"] % np.uint64(_PARTS)).astype(np.int64)


def _repeats(entries: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which entries have the hash of an earlier one: bool [entries]."""
    order = np.lexsort((entries["second"], entries["first"]))  # stable, so that the first document stays the first
    first, second = entries["first"][order], entries["second"][order]
    repeats = np.zeros(len(entries), np.bool_)
    repeats[order[1:]] = (first[1:] == first[:-1]) & (second[1:] == second[:-1])
    return repeats
