"""Read windows with all that is known of their tokens: where documents begin, and which targets count.

Must not know how they are shown.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tinytrain_dist.data.statistics.blocks import Documents
from tinytrain_dist.data.statistics.overlap import EvaluationWindows
from tinytrain_dist.data.token_dataset import TokenDataset, shared_folder
from tinytrain_dist.data.token_source import TokenSource
from tinytrain_dist.data.window_sampling import EVAL_STREAM

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MarkedWindow:
    """A window of training, with its last token, which is only a target."""

    slot: int
    place: str  # FILE:TOKEN of its first token
    tokens: list[int]  # without padding
    begins: Bools  # which tokens begin a document
    continues: Bools  # which tokens begin a piece of a document whose beginning is not in this window
    counted: Bools  # which tokens count as targets; never the first one
    padding: int  # tokens that fill the rest of the window


def training_windows(
    dataset: TokenDataset, documents: Sequence[Documents], seed: int, step: int, slots: Sequence[int]
) -> list[MarkedWindow]:
    """Return the windows that sample slots draw after `step` steps. documents: of each source. Errors: DataError."""
    windows = dataset.training_windows(seed, step, slots)
    sources, positions = dataset.draw(seed, step, slots)
    places = dataset.places(seed, step, slots)
    shown = []
    for row, slot in enumerate(slots):
        source = int(sources[row])
        begins, continues, used = _marks(dataset, documents[source], source, int(positions[row]))
        tokens = [int(token) for token in windows.tokens[row, :used]]
        counted = np.ones(len(tokens), np.bool_)
        counted[0] = False
        if windows.counted is not None:
            counted[1:] = windows.counted[row, : used - 1].numpy()
        padding = windows.tokens.shape[1] - used
        shown.append(MarkedWindow(slot, places[row], tokens, begins[:used], continues[:used], counted, padding))
    return shown


def _marks(dataset: TokenDataset, documents: Documents, source: int, position: int) -> tuple[Bools, Bools, int]:
    """Return where documents begin in a window, where pieces of others do, and how many tokens are no padding."""
    begins = np.zeros(dataset.context_len + 1, np.bool_)
    continues = np.zeros_like(begins)
    used = 0
    for first, length in dataset.pieces(source, position):
        starts = documents.starts(first, documents.source.read(first, length))
        begins[used + starts] = True
        continues[used] = not begins[used]
        used += length
    return begins, continues, used


class SourceWindows(NamedTuple):
    """Windows of one source, to be searched for n-grams."""

    windows: EvaluationWindows
    pieces: list[list[tuple[int, int]]]  # of each window: first token in the source, and length
    in_source: (
        int | None
    )  # windows that follow each other in the source, of which these are some; None: they were drawn

    def position(self, window: int, token: int) -> int:
        """Return the position in the source of a token of a window."""
        for first, length in self.pieces[window]:
            if token < length:
                return first + token
            token -= length
        raise AssertionError("the token is padding")


def drawn_windows(dataset: TokenDataset, documents: Documents, windows: int) -> SourceWindows:
    """Return the windows that an evaluation draws of a file, in its order. Errors: DataError."""
    sources, positions = dataset.draw(0, 0, range(windows), EVAL_STREAM)
    tokens = dataset.read(sources, positions).tokens.numpy()
    begins = np.zeros(tokens.shape, np.bool_)
    used = np.zeros(windows, np.int64)
    for row, position in enumerate(positions.tolist()):
        of_row, continues, used[row] = _marks(dataset, documents, 0, position)
        begins[row] = of_row | continues
    pieces = [dataset.pieces(0, position) for position in positions.tolist()]
    return SourceWindows(EvaluationWindows(tokens, begins, used), pieces, None)


def consecutive_windows(source: TokenSource, documents: Documents, context_len: int, most: int) -> SourceWindows:
    """Return windows that follow each other through a source.

    They have the tokens of shuffled windows: each begins with the last token of the one before. most: if there are
    more windows, so many of them are taken, in equal distances. Errors: DataError.
    """
    total = max(1, -(-(len(source) - 1) // context_len)) if len(source) else 0
    numbers = np.unique(np.linspace(0, max(0, total - 1), min(total, most)).astype(np.int64))
    tokens = np.zeros((len(numbers), context_len + 1), source.dtype)
    begins = np.zeros(tokens.shape, np.bool_)
    used = np.zeros(len(numbers), np.int64)
    pieces = []
    for row, number in enumerate(numbers.tolist()):
        first = number * context_len
        used[row] = min(context_len + 1, len(source) - first)
        of_window = tokens[row, : used[row]]
        source.read_into(first, of_window)
        begins[row, documents.starts(first, of_window)] = True
        pieces.append([(first, int(used[row]))])
    return SourceWindows(EvaluationWindows(tokens, begins, used), pieces, total)


def joined_windows(parts: Sequence[SourceWindows]) -> EvaluationWindows:
    """Return the windows of several files as one."""
    return EvaluationWindows(*(np.concatenate(part) for part in zip(*(each.windows for each in parts), strict=True)))


def place_name(sources: Sequence[TokenSource], number: int, position: int) -> str:
    """Return a position in one of several sources as FILE:TOKEN, with the part of the path that tells files apart.

    number: of the source.
    """
    shard, token = sources[number].locate(position)
    folder = shared_folder([path for source in sources for path in source.paths])
    return f"{os.path.relpath(os.path.abspath(sources[number].paths[shard]), folder)}:{token}"
