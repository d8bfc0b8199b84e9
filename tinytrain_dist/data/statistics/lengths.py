"""Collect lengths of documents in a histogram of fixed size, and compute percentiles from it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_EXACT_BITS = 16
_HALF = 1 << (_EXACT_BITS - 1)
_MOST_BITS = 48
_BINS = 2 * _HALF + (_MOST_BITS - _EXACT_BITS) * _HALF


class LengthHistogram:
    """How many documents have each length, in 9 MB for any number of them.

    Lengths below 65,536 are exact. Longer ones are rounded down to 16 binary digits, that is by less than 0.004 %.
    Number, sum, least and greatest length are exact.
    """

    def __init__(self) -> None:
        """Begin without documents."""
        self.counts = np.zeros(_BINS, np.int64)
        self.documents = 0
        self.tokens = 0
        self.least = 0
        self.greatest = 0

    def add(self, lengths: npt.NDArray[np.int64]) -> None:
        """Add documents of these lengths, each below 2^48."""
        if not len(lengths):
            return
        bins = _bins(lengths)
        if int(bins.max()) < 2 * _HALF:  # the usual case, in which the small part of the table suffices
            counts = np.bincount(bins)
            self.counts[: len(counts)] += counts
        else:
            np.add.at(self.counts, bins, 1)
        least = int(lengths.min())
        self.least = min(self.least, least) if self.documents else least
        self.greatest = max(self.greatest, int(lengths.max()))
        self.documents += len(lengths)
        self.tokens += int(lengths.sum())

    def add_all(self, other: LengthHistogram) -> None:
        """Add the documents of another histogram."""
        if other.documents:
            self.least = min(self.least, other.least) if self.documents else other.least
        self.greatest = max(self.greatest, other.greatest)
        self.counts += other.counts
        self.documents += other.documents
        self.tokens += other.tokens

    @property
    def mean(self) -> float:
        """The mean length; 0 without documents."""
        return self.tokens / self.documents if self.documents else 0.0

    def percentiles(self, percents: Sequence[float]) -> list[int]:
        """Return for each percentage the least length that so many percent of the documents do not exceed.

        Without documents all are 0.
        """
        if not self.documents:
            return [0] * len(percents)
        cumulative = np.cumsum(self.counts)
        ranks = [max(1, int(np.ceil(self.documents * percent / 100 - 1e-9))) for percent in percents]
        bins = np.searchsorted(cumulative, ranks)
        return [int(length) for length in _lengths(bins.astype(np.int64))]

    def between(self, bounds: Sequence[int]) -> list[int]:
        """Return how many documents have a length in bounds[i] .. bounds[i + 1] - 1, for each i."""
        cumulative = np.concatenate([[0], np.cumsum(self.counts)])
        at = cumulative[_bins(np.asarray(bounds, np.int64))]
        return [int(count) for count in np.diff(at)]


def _bins(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the bin of each length: its leading 16 binary digits, behind those of all shorter lengths."""
    exponents = np.maximum(np.frexp(lengths.astype(np.float64))[1] - _EXACT_BITS, 0)
    bins: npt.NDArray[np.int64] = (lengths >> exponents) + exponents * _HALF
    return bins


def _lengths(bins: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the least length of each bin."""
    exponents = np.maximum(bins // _HALF - 1, 0)
    lengths: npt.NDArray[np.int64] = (bins - exponents * _HALF) << exponents
    return lengths
