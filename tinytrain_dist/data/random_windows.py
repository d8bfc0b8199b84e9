"""Draw windows at random from several sources: a pure function of (seed, step, sample slot)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from tinytrain_dist.data.window_sampling import slot_random_words, uniform_integers

StepPhase = tuple[int, Sequence[float]]  # the step at which the phase begins, and its weights
_SOURCE_WORD_BITS = 63  # of the random word that chooses a source: a cumulative share of 1 still fits a uint64


class RandomWindows:
    """Which source and which of its windows each sample slot draws."""

    def __init__(self, windows: Sequence[int], phases: Sequence[StepPhase] = ()) -> None:
        """Prepare the shares of the sources.

        windows: number of windows of each source. phases: how often each source is drawn from (none: in proportion to
        its windows, so all are equally likely).
        """
        self.windows = list(windows)
        phases = phases or [(0, windows)]
        self._first_steps = [first_step for first_step, _ in phases]
        # Fractions, because the bounds decide which source a slot draws: no rounding may move them.
        shares = [[Fraction(weight) / sum(map(Fraction, weights)) for weight in weights] for _, weights in phases]
        # Slots whose source word (below 2^63) is less than the first bound draw from the first source, those below the
        # second bound from the second source, and so on; the last source needs no bound.
        self._bounds = [
            [int(cumulative * (1 << _SOURCE_WORD_BITS)) for cumulative in itertools.accumulate(of_phase[:-1])]
            for of_phase in shares
        ]
        # Probability that two sample slots of a step draw the same window, in the phase in which it is largest.
        self.collision_probability = max(
            float(sum(share**2 / count for share, count in zip(of_phase, windows, strict=True))) for of_phase in shares
        )

    def choose(
        self, seed: int, step: int, slots: Sequence[int], stream: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the source of each slot, and the number of its window in that source: int64 [len(slots)] each.

        The last random word of a slot chooses the source, and the others choose the window, which is uniform within
        its source. With one source the windows are those of `window_starts`, for which all four words are used.
        """
        phase = sum(first_step <= step for first_step in self._first_steps) - 1
        bounds = self._bounds[phase]
        words = slot_random_words(seed, step, slots, stream)
        source_words = words[:, -1] >> np.uint64(64 - _SOURCE_WORD_BITS)
        sources = np.searchsorted(np.array(bounds, np.uint64), source_words, side="right")
        window_words = words[:, :-1] if bounds else words
        numbers = np.empty(len(words), dtype=np.int64)
        for source, windows in enumerate(self.windows):
            in_source = sources == source
            numbers[in_source] = uniform_integers(window_words[in_source], windows)
        return sources, numbers
