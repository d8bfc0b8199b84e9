"""Draw the windows of a step: a pure function of (seed, step, sample slot).

A sample slot is the index of a sequence in the global batch. A window is context_len tokens with the token after them.
A stream separates the draws of training from those of evaluation. Nothing about sampling is saved: a resumed run draws
the same windows, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TRAIN_STREAM, EVAL_STREAM = 0, 1


def slot_random_words(seed: int, step: int, slots: Sequence[int], stream: int = TRAIN_STREAM) -> npt.NDArray[np.uint64]:
    """Four random words for each slot: [len(slots), 4].

    A pure function of (seed, step, slot): Philox with the seed as key and (slot, step) as counter gives every slot its
    own block of four words, so no slot's draw depends on which rank draws the others.
    """
    words = np.empty((len(slots), 4), dtype=np.uint64)
    runs = np.split(np.arange(len(slots)), np.flatnonzero(np.diff(np.asarray(slots)) != 1) + 1) if len(slots) else []
    for run in runs:  # neighbouring slots are neighbouring counters: one generator gives them all
        bits = np.random.Philox(key=seed + (stream << 64), counter=[int(slots[run[0]]), step, 0, 0])
        words[run] = bits.random_raw(4 * len(run)).reshape(-1, 4)
    return words


def uniform_integers(words: npt.NDArray[np.uint64], windows: int) -> npt.NDArray[np.int64]:
    """One number in 0 .. windows - 1 from each row of words, int64.

    Words in the last incomplete multiple of `windows` are passed over, which makes the draw exactly uniform (all four
    would fail once in 10^38).
    """
    limit = (1 << 64) // windows * windows - 1
    chosen = np.argmax(words <= np.uint64(limit), axis=1)
    starts: npt.NDArray[np.int64] = (words[np.arange(len(words)), chosen] % np.uint64(windows)).astype(np.int64)
    return starts


def window_starts(
    seed: int, step: int, slots: Sequence[int], windows: int, stream: int = TRAIN_STREAM
) -> npt.NDArray[np.int64]:
    """First token of the window of each slot, uniform over 0 .. windows - 1, int64; see `slot_words`."""
    return uniform_integers(slot_random_words(seed, step, slots, stream), windows)
