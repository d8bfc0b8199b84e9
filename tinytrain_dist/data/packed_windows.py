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

    def __init__(self, source: TokenSource, context_len: int) -> None:
        """Pack the documents of a source whose `open_documents` returned True.

        Errors: DataError if no document has two tokens.
        """
        self.source = source
        self.context_len = context_len
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

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """Return the position in the source and the length of each piece of a window."""
        shard = int(np.searchsorted(self._first_windows, window, side="right")) - 1
        starts, lengths = self._packings[shard].pieces(window - int(self._first_windows[shard]))
        return [(self._shard_starts[shard] + start, length) for start, length in zip(starts, lengths, strict=True)]

    def read_into(
        self,
        window: int,
        tokens: npt.NDArray[Any],
        begins: npt.NDArray[np.bool_],
        counted: npt.NDArray[np.bool_],
        loss_mask: bool,
    ) -> None:
        """Fill one row of tokens [context_len + 1], of where pieces begin, and of which targets count [context_len].

        Behind the last piece are zeros, a piece of their own that does not count. All arrays are zeros before.
        """
        end = 0
        for position, length in self.pieces(window):
            self.source.read_into(position, tokens[end : end + length])
            begins[end] = True
            targets = slice(end, end + length - 1)
            counted[targets] = self.source.read_mask(position + 1, length - 1) if loss_mask else True
            end += length
        begins[end : end + 1] = True
