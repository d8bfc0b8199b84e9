"""Read windows that lie anywhere in the stream of tokens of one source; their position is that of their first token."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from tinytrain_dist.data.npy_files import missing_tokens
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.errors import DataError


class StreamWindows:
    """The windows of a source. For random sampling they are numbered; none of those crosses the end of a shard."""

    def __init__(self, source: TokenSource, context_len: int) -> None:
        """Take windows from `source`, whose masks and document starts are open if they are to be read."""
        self.source = source
        self.context_len = context_len

    @cached_property
    def _first_windows(self) -> npt.NDArray[np.int64]:
        """The number of the first window of each shard, and behind them the number of windows.

        Errors: DataError if there is no window.
        """
        tokens_of_shards = np.diff(self.source.shard_starts)
        windows = np.maximum(0, tokens_of_shards - self.context_len)
        if not windows.any():
            problem = missing_tokens(int(tokens_of_shards.max()), self.context_len)
            several = f"the longest of its {len(self.source.shards)} files " if len(self.source.shards) > 1 else ""
            raise DataError(f"{self.source.paths[0] if not several else self.source.entry}: {several}{problem}")
        return np.concatenate([[0], np.cumsum(windows)]).astype(np.int64)

    def __len__(self) -> int:
        """Return the number of windows. Errors: DataError if there is none."""
        return int(self._first_windows[-1])

    def positions(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the positions of the windows with these numbers."""
        shards = np.searchsorted(self._first_windows, numbers, side="right") - 1
        offsets: npt.NDArray[np.int64] = self.source.shard_starts[shards] - self._first_windows[shards]
        return numbers + offsets

    def first_token(self, position: int) -> int:
        """Return the position in the source of a window's first token."""
        return position

    def pieces(self, position: int) -> list[tuple[int, int]]:
        """Return the position in the source and the length of each piece of a window: it has one."""
        return [(position, self.context_len + 1)]

    def read_into(
        self,
        position: int,
        tokens: npt.NDArray[Any],
        begins: npt.NDArray[np.bool_] | None,
        counted: npt.NDArray[np.bool_] | None,
    ) -> None:
        """Fill one row of tokens [context_len + 1], of where documents begin, and of which targets count [context_len].

        begins, counted: zeros before; None: not wanted. Errors: DataError; OSError.
        """
        self.source.read_into(position, tokens)
        if counted is not None:
            counted[:] = self.source.read_mask(position + 1, self.context_len)
        if begins is not None:
            begins[self.source.document_starts(position, self.context_len + 1)] = True
