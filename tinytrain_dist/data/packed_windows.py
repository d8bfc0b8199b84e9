"""Read the windows of one source into which whole documents are packed."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tinytrain_dist.data.packing import pack_documents
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.errors import DataError


class PackedWindows:
    """The windows of a source, packed shard by shard. They are numbered in the order of the shards.

    The packing is computed when a run starts. It takes about a second and 20 MB for a million documents.
    """

    def __init__(self, source: TokenSource, context_len: int, loss_mask: bool) -> None:
        """Pack the documents of a source whose `open_documents` returned True. loss_mask: read which targets count.

        Errors: DataError if no document has two tokens.
        """
        self.source = source
        self._loss_mask = loss_mask
        self._shard_starts = source.shard_starts.tolist()
        self._packings = [
            pack_documents(source.document_starts(start, tokens), tokens, context_len)
            for start, tokens in zip(self._shard_starts, source.shards.tokens.tolist(), strict=False)
        ]
        # number of the first window of each shard, and behind them the number of windows
        self._first_windows = np.cumsum([0, *(packing.windows for packing in self._packings)])
        if not len(self):
            raise DataError(f"{source.entry}: has no document of two tokens, so nothing to pack; give more text")

    def __len__(self) -> int:
        """Return the number of windows."""
        return int(self._first_windows[-1])

    def positions(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the positions of the windows with these numbers, which are the numbers themselves."""
        return numbers

    def first_token(self, window: int) -> int:
        """Return the position in the source of a window's first token."""
        return self.pieces(window)[0][0]

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """Return the position in the source and the length of each piece of a window."""
        shard = int(np.searchsorted(self._first_windows, window, side="right")) - 1
        starts, lengths = self._packings[shard].pieces(window - int(self._first_windows[shard]))
        return [(self._shard_starts[shard] + start, length) for start, length in zip(starts, lengths, strict=True)]

    def read_into(
        self,
        window: int,
        tokens: npt.NDArray[Any],
        begins: npt.NDArray[np.bool_] | None,
        counted: npt.NDArray[np.bool_] | None,
    ) -> None:
        """Fill one row of tokens [context_len + 1], of where pieces begin, and of which targets count [context_len].

        Padding is zeros, marked as a separate piece, and does not count. The arrays are all zeros before.
        """
        assert begins is not None and counted is not None, "padding never counts"  # noqa: PT018
        end = 0
        for position, length in self.pieces(window):
            self.source.read_into(position, tokens[end : end + length])
            begins[end] = True
            targets = slice(end, end + length - 1)
            counted[targets] = self.source.read_mask(position + 1, length - 1) if self._loss_mask else True
            end += length
        begins[end : end + 1] = True
