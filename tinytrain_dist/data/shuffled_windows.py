"""Choose windows so that every token is a target once per epoch: a pure function of (seed, sample number).

A source of N tokens is a ring: its first token follows its last. An epoch divides the ring into windows of context_len
targets each, without overlap, from an offset that is another in each epoch. The last of them has only the targets that
are left. A keyed permutation gives their order, in constant time per window, so nothing has to be shuffled or saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tinytrain_dist.data.mixture import Integers, Mixture, SamplePhase
from tinytrain_dist.data.permutation import ROUNDS, Permutation
from tinytrain_dist.data.window_sampling import SHUFFLE_STREAM, WORDS_PER_SLOT

_EPOCHS_KEPT = 4096  # permutations in memory, of some hundred bytes each


class ChosenWindows(NamedTuple):
    """The windows of some samples, int64 [n] each."""

    sources: Integers
    starts: Integers  # position of the first input token in its source
    targets: Integers  # how many targets count, from the first one on


class ShuffledWindows:
    """The windows of several sources, in the order in which a run draws them.

    Sample numbers count over the whole run: sample slot s of a step is number n + s, where n is the number of
    samples in the steps before.
    """

    def __init__(self, lengths: Sequence[int], context_len: int, phases: Sequence[SamplePhase] = ()) -> None:
        """Count the windows.

        lengths: tokens of each source. phases: weights of the sources (none: in proportion to their windows, so that
        the epochs of all sources end together).
        """
        self.lengths = np.array(lengths, np.int64)
        self.context_len = context_len
        self.windows = [windows_per_epoch(length, context_len) for length in lengths]
        self.mixture = Mixture(phases or [SamplePhase(0, self.windows)])
        self._order = lru_cache(_EPOCHS_KEPT)(self._make_order)

    def choose(self, seed: int, samples: Integers) -> ChosenWindows:
        """Return the window of each sample number; any grouping of samples gives the same windows."""
        sources, ordinals = self.mixture.locate(samples)
        windows = np.array(self.windows, np.int64)[sources]
        epochs, indices = np.divmod(ordinals, windows)
        numbers, offsets = np.empty_like(indices), np.empty_like(indices)
        for source, epoch in set(zip(sources.tolist(), epochs.tolist(), strict=True)):
            chosen = (sources == source) & (epochs == epoch)
            order, offsets[chosen] = self._order(seed, source, epoch)
            numbers[chosen] = order.apply(indices[chosen])
        lengths = self.lengths[sources]
        firsts = numbers * self.context_len
        return ChosenWindows(sources, (offsets + firsts) % lengths, np.minimum(lengths - firsts, self.context_len))

    def epochs(self, samples: int) -> float:
        """Return how many epochs the first `samples` samples are: as many windows as all sources have are one."""
        return samples / sum(self.windows)

    def epochs_of_sources(self, samples: int) -> list[float]:
        """Return how often the first `samples` samples have gone through each source."""
        counts = self.mixture.counts(samples)
        return [count / windows for count, windows in zip(counts, self.windows, strict=True)]

    def _make_order(self, seed: int, source: int, epoch: int) -> tuple[Permutation, int]:
        """Return the order of a source's windows in an epoch, and the offset of the first of them in 0 .. C - 1."""
        # Each (source, epoch) has blocks of its own. The counter's first word numbers them.
        generator = np.random.Philox(key=seed + (SHUFFLE_STREAM << 64), counter=[0, epoch, source, 0])
        words = generator.random_raw(ROUNDS + WORDS_PER_SLOT)
        return Permutation(self.windows[source], words[:ROUNDS]), int(words[ROUNDS]) % self.context_len


def windows_per_epoch(length: int, context_len: int) -> int:
    """Return the number of windows in an epoch of a source of `length` tokens."""
    return -(-length // context_len)
