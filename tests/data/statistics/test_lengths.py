"""Percentiles of lengths against sorted lists."""

from __future__ import annotations

import numpy as np
import pytest

from tinytrain_dist.data.statistics.lengths import LengthHistogram

PERCENTS = [0, 1, 10, 50, 90, 99, 100]


@pytest.mark.parametrize("count", [1, 2, 7, 1000])
def test_percentiles_are_those_of_a_sorted_list(count: int) -> None:
    lengths = np.random.default_rng(count).integers(1, 65_536, count)
    histogram = LengthHistogram()
    for part in np.array_split(lengths, 3):
        histogram.add(part)
    assert histogram.percentiles(PERCENTS) == np.percentile(lengths, PERCENTS, method="inverted_cdf").tolist()
    assert (histogram.documents, histogram.tokens) == (count, lengths.sum())
    assert (histogram.least, histogram.greatest, histogram.mean) == (lengths.min(), lengths.max(), lengths.mean())


def test_long_documents_are_rounded_down_by_little() -> None:
    lengths = np.concatenate([2 ** np.arange(17, 47), 3 * 2 ** np.arange(15, 45) + 1, [65_535, 65_536, 65_537]])
    histogram = LengthHistogram()
    histogram.add(lengths)
    found = histogram.percentiles([100 * rank / len(lengths) for rank in range(1, len(lengths) + 1)])
    for length, rounded in zip(np.sort(lengths).tolist(), found, strict=True):
        assert length * (1 - 2**-15) <= rounded <= length
    assert histogram.greatest == lengths.max()


def test_counts_between_bounds_and_sums_of_histograms() -> None:
    lengths = np.array([1, 1, 2, 3, 4, 7, 8, 100_000])
    histogram = LengthHistogram()
    for part in np.split(lengths, [3]):
        other = LengthHistogram()
        other.add(part)
        histogram.add_all(other)
    assert histogram.between([1, 2, 4, 8, 1 << 17]) == [2, 2, 2, 2]
    assert (histogram.least, histogram.greatest, histogram.documents) == (1, 100_000, 8)


def test_no_documents() -> None:
    histogram = LengthHistogram()
    histogram.add(np.empty(0, np.int64))
    histogram.add_all(LengthHistogram())
    assert histogram.percentiles(PERCENTS) == [0] * len(PERCENTS)
    assert (histogram.documents, histogram.mean, histogram.least) == (0, 0.0, 0)
