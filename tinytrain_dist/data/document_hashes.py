"""Hash documents of token IDs as a stream, and count exact duplicates among any number of them.

A hash has 128 bits: two sums, modulo 2^64, of mixed pairs of position and token ID. Two documents that differ have the
same hash about once in 2^128 pairs. Documents that someone built to collide are not defended against. Must not know
files of tokens, only their IDs and where documents begin.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tinytrain_dist.errors import DataError
from tinytrain_dist.utils.stale_files import scratch_folder
from tinytrain_dist.utils.text import format_bytes

Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

# odd multipliers of the finalizer of splitmix64 (Steele et al. 2014), and 2^64 / golden ratio
_MULTIPLIERS = tuple(map(np.uint64, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0x9E3779B97F4A7C15)))
ROWS_IN_MEMORY = 1 << 22  # 160 MB, and three times as much while they are sorted
PARTITIONS = 256  # by the first byte of the hash
_ROW = np.dtype([("high", "u8"), ("low", "u8"), ("position", "i8"), ("length", "i8"), ("copies", "i8")])
Rows = npt.NDArray[Any]  # of _ROW


class HashedDocuments(NamedTuple):
    """Documents that have ended: the two words of each hash, its first token, and its length in tokens."""

    high: Words
    low: Words
    positions: Integers
    lengths: Integers


class DocumentHasher:
    """Hash the documents of one stream of tokens, block by block; a document may extend over any number of blocks."""

    def __init__(self) -> None:
        """Begin before the first token."""
        self._open: tuple[int, int, int, int] | None = None  # high, low, position, length of the unfinished document

    def add(self, position: int, tokens: npt.NDArray[Any], starts: Integers) -> HashedDocuments:
        """Hash the next tokens; return the documents that have ended.

        position: of the first token in the stream. starts: ascending, at which of the tokens documents begin. The first
        token of the stream begins a document in any case.
        """
        if not len(tokens):
            return _no_documents()
        segments = starts if len(starts) and starts[0] == 0 else np.concatenate([np.zeros(1, np.int64), starts])
        lengths = np.diff(segments, append=len(tokens))
        before = np.zeros(len(segments), np.int64)  # tokens of the segment's document in earlier blocks
        continues = self._open is not None and len(segments) > len(starts)
        if continues and self._open is not None:
            before[0] = self._open[3]
        places = np.arange(len(tokens)) - np.repeat(segments - before, lengths)
        high, low = _sums_of_pairs(places, tokens, segments)
        positions = segments + position
        if continues and self._open is not None:
            open_high, open_low, positions[0], length = self._open
            high[:1] += np.uint64(open_high)  # a slice, because numpy warns if a single number wraps around
            low[:1] += np.uint64(open_low)
            lengths[0] += length
        ended = HashedDocuments(high[:-1], low[:-1], positions[:-1], lengths[:-1])
        if not continues:
            ended = _joined(self.finish(), ended)
        self._open = (int(high[-1]), int(low[-1]), int(positions[-1]), int(lengths[-1]))
        return ended

    def finish(self) -> HashedDocuments:
        """Return the last document, at the end of the stream."""
        if self._open is None:
            return _no_documents()
        high, low, position, length = self._open
        self._open = None
        words = np.array([[high], [low]], np.uint64)
        numbers = np.array([[position], [length]], np.int64)
        return HashedDocuments(words[0], words[1], numbers[0], numbers[1])


def _sums_of_pairs(places: Integers, tokens: npt.NDArray[Any], segments: Integers) -> tuple[Words, Words]:
    """Return two sums over each segment of the mixed pairs of place and token ID."""
    first, second, third = _MULTIPLIERS
    mixed = places.astype(np.uint64)
    mixed <<= np.uint64(32)
    # IDs have at most 32 bits in every format but int64; the sum stays a function of place and ID there too.
    mixed += tokens.astype(np.int64).view(np.uint64)
    mixed += third
    mixed *= first
    mixed ^= mixed >> np.uint64(29)
    mixed *= second
    mixed ^= mixed >> np.uint64(32)
    high = np.add.reduceat(mixed, segments)
    mixed *= first
    mixed ^= mixed >> np.uint64(31)
    mixed *= third
    mixed ^= mixed >> np.uint64(29)
    return high, np.add.reduceat(mixed, segments)


def _no_documents() -> HashedDocuments:
    words, numbers = np.empty(0, np.uint64), np.empty(0, np.int64)
    return HashedDocuments(words, words, numbers, numbers)


def _joined(first: HashedDocuments, second: HashedDocuments) -> HashedDocuments:
    return HashedDocuments(
        np.concatenate([first.high, second.high]),
        np.concatenate([first.low, second.low]),
        np.concatenate([first.positions, second.positions]),
        np.concatenate([first.lengths, second.lengths]),
    )


class DocumentTable:
    """The distinct documents of a corpus, with the number of copies of each.

    Memory does not grow with the corpus: at most `rows_in_memory` documents are held (40 bytes each, and three times as
    much while they are sorted). More of them are written to a temporary folder, in 256 files by the first byte of the
    hash, one of which is loaded at a time: 40 bytes of disk for each distinct document, and 1/256 of that in memory.
    """

    def __init__(self, rows_in_memory: int = ROWS_IN_MEMORY) -> None:
        """Begin without documents. Use it in a `with` statement, which removes the temporary folder."""
        self.rows_in_memory = rows_in_memory
        self.documents = 0
        self._waiting: list[Rows] = []
        self._num_waiting = 0
        self._cleanup = ExitStack()
        self._folder: Path | None = None

    def __enter__(self) -> DocumentTable:
        """Return the table."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the temporary folder."""
        self._cleanup.close()
        self._folder = None

    @property
    def spilled(self) -> bool:
        """Whether there were too many documents for memory."""
        return self._folder is not None

    def add(self, found: HashedDocuments) -> None:
        """Add documents. Errors: DataError if the temporary folder cannot be written."""
        rows = np.empty(len(found.high), _ROW)
        rows["high"], rows["low"], rows["copies"] = found.high, found.low, 1
        rows["position"], rows["length"] = found.positions, found.lengths
        self.documents += len(rows)
        self._waiting.append(rows)
        self._num_waiting += len(rows)
        if self._num_waiting >= self.rows_in_memory:
            merged = merge_copies(np.concatenate(self._waiting))
            self._waiting, self._num_waiting = [merged], len(merged)
            if len(merged) > self.rows_in_memory // 2:  # else there are few distinct documents, which stay in memory
                self._spill(merged)

    def partitions(self) -> Iterator[Rows]:
        """Yield the distinct documents in 256 parts by the first byte of their hash, each sorted by hash."""
        merged = merge_copies(np.concatenate([np.empty(0, _ROW), *self._waiting]))
        if self._folder is None:
            yield from np.split(merged, _partition_ends(merged))
            return
        self._spill(merged)
        for number in range(PARTITIONS):
            path = self._path(number)
            rows = np.fromfile(path, _ROW) if path.exists() else np.empty(0, _ROW)
            yield merge_copies(rows)

    def _spill(self, merged: Rows) -> None:
        """Append rows, which are sorted, to the files of the temporary folder. Errors: DataError."""
        try:
            if self._folder is None:
                self._folder = self._cleanup.enter_context(scratch_folder())
            for number, rows in enumerate(np.split(merged, _partition_ends(merged))):
                if len(rows):
                    with open(self._path(number), "ab") as file:
                        file.write(rows.tobytes())
        except OSError as error:
            raise DataError(
                f"{tempfile.gettempdir()}: cannot be written ({error.strerror}), and the hashes of {self.documents:,} "
                f"documents so far need up to {format_bytes(_ROW.itemsize * self.documents)} there; make room, or set "
                "TMPDIR to another folder"
            ) from None
        self._waiting, self._num_waiting = [], 0

    def _path(self, number: int) -> Path:
        assert self._folder is not None
        return self._folder / f"documents-{number:03d}"


def merge_copies(rows: Rows) -> Rows:
    """Return one row for each hash, sorted by hash: the number of copies, and the first position."""
    if not len(rows):
        return rows
    rows = rows[np.lexsort((rows["low"], rows["high"]))]
    is_first = np.ones(len(rows), np.bool_)
    is_first[1:] = (rows["high"][1:] != rows["high"][:-1]) | (rows["low"][1:] != rows["low"][:-1])
    firsts = np.flatnonzero(is_first)
    merged = rows[firsts]
    merged["copies"] = np.add.reduceat(rows["copies"], firsts)
    merged["position"] = np.minimum.reduceat(rows["position"], firsts)
    return merged


def _partition_ends(rows: Rows) -> Integers:
    """Return where the rows of each partition but the last one end."""
    bounds = (np.arange(1, PARTITIONS, dtype=np.uint64)) << np.uint64(56)
    return np.searchsorted(rows["high"], bounds).astype(np.int64)


class RepeatedDocument(NamedTuple):
    """A document that occurs several times."""

    copies: int
    position: int  # of the first copy
    length: int


class Duplicates(NamedTuple):
    """How many documents are exact copies of an earlier one."""

    documents: int
    repeats: int  # documents that are a copy of another one, which is not counted itself
    repeated_tokens: int  # in these
    most_copies: list[RepeatedDocument]


def count_duplicates(table: DocumentTable, shown: int = 5) -> Duplicates:
    """Count the exact duplicates, and name the documents with the most copies."""
    repeats = repeated_tokens = 0
    most: list[RepeatedDocument] = []
    for rows in table.partitions():
        several = rows[rows["copies"] > 1]
        extra = several["copies"] - 1
        repeats += int(extra.sum())
        repeated_tokens += int((extra * several["length"]).sum())
        top = several[np.lexsort((several["position"], -several["copies"]))[:shown]]
        most += [RepeatedDocument(int(row["copies"]), int(row["position"]), int(row["length"])) for row in top]
        most = sorted(most, key=lambda each: (-each.copies, each.position))[:shown]
    return Duplicates(table.documents, repeats, repeated_tokens, most)


def count_shared(table: DocumentTable, others: DocumentTable) -> tuple[int, int]:
    """Return how many documents of `others` also occur in `table`, and their tokens; copies count each time."""
    documents = tokens = 0
    for rows, other in zip(table.partitions(), others.partitions(), strict=True):
        both = np.concatenate([rows, other])
        order = np.lexsort((both["low"], both["high"]))
        high, low = both["high"][order], both["low"][order]
        same = (high[1:] == high[:-1]) & (low[1:] == low[:-1])  # one row of each table, because each has distinct rows
        shared = other[np.maximum(order[:-1][same], order[1:][same]) - len(rows)]
        documents += int(shared["copies"].sum())
        tokens += int((shared["copies"] * shared["length"]).sum())
    return documents, tokens
