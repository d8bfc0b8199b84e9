"""Pack the documents of a token file into windows, so that none is cut where it fits.

Must not know files, masks or sampling: it takes where documents begin, and returns where the pieces of windows begin.
"""

from __future__ import annotations

import bisect
import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Packing(NamedTuple):
    """Windows made of pieces of documents. Window i has the pieces first_pieces[i] .. first_pieces[i + 1] - 1.

    starts: int64 [pieces], the first token of each piece. lengths: int32 [pieces], its tokens. first_pieces: int64
    [windows + 1].
    """

    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int32]
    first_pieces: npt.NDArray[np.int64]

    @property
    def windows(self) -> int:
        """The number of windows."""
        return len(self.first_pieces) - 1

    def pieces(self, window: int) -> tuple[list[int], list[int]]:
        """Return the starts and the lengths of one window's pieces, in their order in the window."""
        of_window = slice(int(self.first_pieces[window]), int(self.first_pieces[window + 1]))
        return self.starts[of_window].tolist(), self.lengths[of_window].tolist()


def pack_documents(document_starts: npt.NDArray[np.int64], tokens: int, context_len: int) -> Packing:
    """Pack documents into windows of context_len + 1 tokens by best fit, the longest first.

    document_starts: int64 [documents], ascending, the first one 0. tokens: length of the file.

    A document that is too long for a window is cut into pieces that fill windows. Each of them begins with the last
    token of the piece before, so that every token but the first one of a document is a target once. A piece of a
    single token has no target, and is left out.

    Best fit puts a piece into the window with the least room that is large enough. Pieces of equal length are
    interchangeable for that, so this needs one step for each length and each amount of room, not one for each piece.
    The result depends on nothing but the arguments.
    """
    starts, lengths = _pieces(document_starts, tokens, context_len)
    by_length = np.lexsort((starts, -lengths))
    window_of_piece = np.empty(len(starts), np.int64)  # in the order of by_length
    bins = _Bins(context_len + 1)
    sorted_lengths = lengths[by_length]
    first_of_length = np.flatnonzero(np.diff(sorted_lengths, prepend=0))
    for first, end in itertools.pairwise([*first_of_length.tolist(), len(starts)]):
        window_of_piece[first:end] = bins.place(int(sorted_lengths[first]), end - first)
    by_window = np.argsort(window_of_piece, kind="stable")
    order = by_length[by_window]
    first_pieces = np.searchsorted(window_of_piece[by_window], np.arange(bins.count + 1))
    return Packing(starts[order], lengths[order].astype(np.int32), first_pieces.astype(np.int64))


def _pieces(
    document_starts: npt.NDArray[np.int64], tokens: int, context_len: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the starts and lengths of the pieces that documents are cut into: int64, in the order of the file."""
    document_lengths = np.diff(document_starts, append=tokens)
    # A piece has context_len targets, and the first token of a document is none.
    counts = np.maximum(-(-(document_lengths - 1) // context_len), 0)
    document = np.repeat(np.arange(len(document_starts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)  # of the piece in its document
    starts = document_starts[document] + number * context_len
    lengths = np.minimum(document_lengths[document] - number * context_len, context_len + 1)
    return starts.astype(np.int64), lengths.astype(np.int64)


class _Bins:
    """Windows that are being filled, by the room that is left in them."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.count = 0
        self._rooms: list[int] = []  # ascending, those that some window has
        self._with_room: dict[int, npt.NDArray[np.int64]] = {}  # the windows that have so much room

    def place(self, length: int, count: int) -> npt.NDArray[np.int64]:
        """Put `count` pieces of one length into windows, each where the least room is left; return the windows."""
        placed = []
        left = count
        while left:
            index = bisect.bisect_left(self._rooms, length)
            if index == len(self._rooms):
                self._open(-(-left // (self.capacity // length)))
                continue
            room = self._rooms[index]
            # A window that got a piece has the least room afterwards, so it gets the next ones too, until it is full.
            per_window = room // length
            whole_windows = min(left // per_window, len(self._with_room[room]))
            if whole_windows:
                windows = self._take(room, whole_windows)
                placed.append(np.repeat(windows, per_window))
                self._add(room - per_window * length, windows)
                left -= whole_windows * per_window
            else:  # fewer pieces than one window takes
                windows = self._take(room, 1)
                placed.append(np.repeat(windows, left))
                self._add(room - left * length, windows)
                left = 0
        return np.concatenate(placed)

    def _open(self, count: int) -> None:
        self._add(self.capacity, np.arange(self.count, self.count + count))
        self.count += count

    def _take(self, room: int, count: int) -> npt.NDArray[np.int64]:
        """Remove the first `count` windows with this much room, and return them."""
        windows = self._with_room[room]
        if count == len(windows):
            del self._with_room[room]
            self._rooms.remove(room)
        else:
            self._with_room[room] = windows[count:]
        return windows[:count]

    def _add(self, room: int, windows: npt.NDArray[np.int64]) -> None:
        """Add windows that have this much room. Those without room for a piece of two tokens are full."""
        if room < 2:
            return
        if room in self._with_room:
            self._with_room[room] = np.concatenate([self._with_room[room], windows])
        else:
            bisect.insort(self._rooms, room)
            self._with_room[room] = windows
