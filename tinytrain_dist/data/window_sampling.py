"""Draw the windows of a step: a pure function of (seed, step, sample slot).

Terms that the whole project uses:

* sample slot: index of a sequence in the global batch, 0 .. batch_size - 1. Each rank draws its own slots only.
* window: context_len + 1 successive tokens, that is context_len tokens with the token after each. The position of its
  first token identifies it.
* stream: number that separates the draws of training, of evaluation and of the orders of shuffled windows.

Nothing about sampling is saved: a resumed run draws the same windows, on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

TRAIN_STREAM, EVAL_STREAM, SHUFFLE_STREAM = 0, 1, 2
WORDS_PER_SLOT = 4  # a block of the Philox generator


def slot_random_words(seed: int, step: int, slots: Sequence[int], stream: int = TRAIN_STREAM) -> npt.NDArray[np.uint64]:
    """Return four random 64-bit words for each sample slot: uint64 [len(slots), 4].

    They are a pure function of (seed, step, slot, stream). The counter-based generator Philox (Salmon et al. 2011) has
    (seed, stream) as its key and (slot, step) as its counter. Each slot therefore has a block of four words of its own,
    and no slot's draw depends on which rank draws the others.
    """
    words = np.empty((len(slots), WORDS_PER_SLOT), dtype=np.uint64)
    if not len(slots):
        return words
    # Successive slots have successive counters, so one generator gives the words of a whole run of slots.
    run_starts = np.flatnonzero(np.diff(np.asarray(slots)) != 1) + 1
    for run in np.split(np.arange(len(slots)), run_starts):
        first_slot = int(slots[run[0]])
        generator = np.random.Philox(key=seed + (stream << 64), counter=[first_slot, step, 0, 0])
        words[run] = generator.random_raw(WORDS_PER_SLOT * len(run)).reshape(-1, WORDS_PER_SLOT)
    return words


def uniform_integers(words: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.int64]:
    """Return a number in 0 .. count - 1 from each row of words [n, words per row]: int64 [n].

    Each number is the first usable word of its row modulo `count`. A word is not usable if it lies in the last,
    incomplete multiple of `count` below 2^64: the remainders of such words would favour small numbers. With a count of
    at most 2^32, a row has no usable word among four less than once in 10^38 rows; its first word is then used anyway.
    """
    largest_usable = (1 << 64) // count * count - 1
    first_usable = np.argmax(words <= np.uint64(largest_usable), axis=1)
    chosen = words[np.arange(len(words)), first_usable]
    numbers: npt.NDArray[np.int64] = (chosen % np.uint64(count)).astype(np.int64)
    return numbers


def window_starts(
    seed: int, step: int, slots: Sequence[int], windows: int, stream: int = TRAIN_STREAM
) -> npt.NDArray[np.int64]:
    """Return the first token of each slot's window, uniform over 0 .. windows - 1: int64 [len(slots)].

    Like `slot_random_words` it is a pure function of (seed, step, slot, stream).
    """
    return uniform_integers(slot_random_words(seed, step, slots, stream), windows)
