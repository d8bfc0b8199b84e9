"""N-grams of windows in a text, against a set of all n-grams."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.data.statistics.overlap import EvaluationWindows, NgramSearch, rolling_hashes


def ngrams_of(tokens: npt.ArrayLike, starts: set[int], length: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return the place and the tokens of each n-gram in which no document begins."""
    ids = np.asarray(tokens).tolist()
    return [
        (place, tuple(ids[place : place + length]))
        for place in range(len(ids) - length + 1)
        if not starts & set(range(place + 1, place + length))
    ]


def search_blocks(search: NgramSearch, tokens: npt.NDArray[np.integer], starts: set[int], block: int) -> None:
    """Search a text block by block, as a stream is read."""
    for first in range(0, len(tokens), block):
        part = tokens[first : first + block + search.length - 1]
        in_part = sorted(start - first for start in starts if first <= start < first + len(part))
        search.add(part, min(block, len(tokens) - first), np.array(in_part, np.int64))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("block", [1, 4, 50, 1000])
def test_what_is_found_is_in_a_set_of_all_ngrams(length: int, block: int) -> None:
    draw = np.random.default_rng(length)
    ids = {1: 2000, 2: 40, 3: 10, 5: 4, 13: 2}[length]  # so that some n-grams are found, and others are not
    text = draw.integers(0, ids, 700).astype(np.uint16)
    starts = {0, *draw.integers(0, 700, 20).tolist()}
    rows = draw.integers(0, ids, (12, 40)).astype(np.int32)
    begins = draw.random((12, 40)) < 0.03
    used = draw.integers(0, 41, 12)
    search = NgramSearch(EvaluationWindows(rows, begins, used), length)
    search_blocks(search, text, starts, block)
    in_text = {ngram for _, ngram in ngrams_of(text, starts, length)}
    for first, last in ((0, 12), (3, 7), (5, 5)):
        found = search.result(first, last)
        longest = 0
        for row, has, hits in zip(range(first, last), found.ngrams.tolist(), found.found.tolist(), strict=True):
            expected = ngrams_of(rows[row, : used[row]], set(np.flatnonzero(begins[row]).tolist()), length)
            assert has == len(expected)
            places = [place for place, ngram in expected if ngram in in_text]
            assert hits == len(places)
            runs = np.split(places, np.flatnonzero(np.diff(places) != 1) + 1) if places else []
            longest = max([longest, *(len(run) + length - 1 for run in runs)])
        assert found.longest[2] == longest
    assert 0 < search.result(0, 12).found.sum() < search.result(0, 12).ngrams.sum()


def test_a_planted_passage_is_found_across_blocks_but_not_across_documents() -> None:
    planted = np.arange(1000, 1020)
    windows = EvaluationWindows(planted[None, :].astype(np.uint16), np.zeros((1, 20), np.bool_), np.array([20]))
    for block in (7, 30, 400):
        for place in range(0, 60, 7):
            text = np.full(200, 5, np.uint16)
            text[place : place + 20] = planted
            whole = NgramSearch(windows, 13)
            search_blocks(whole, text, {0, place}, block)
            assert whole.result(0, 1).longest == (0, 0, 20)
            cut = NgramSearch(windows, 13)  # a document begins inside: 12 tokens before it, and 8 behind
            search_blocks(cut, text, {0, place + 12}, block)
            assert cut.result(0, 1).found.tolist() == [0]
            later = NgramSearch(windows, 13)
            search_blocks(later, text, {0, place + 7}, block)
            assert later.result(0, 1).longest == (0, 7, 13)


def test_a_passage_ends_with_its_window() -> None:
    windows = EvaluationWindows(np.array([[1, 2, 3], [2, 1, 9]]), np.zeros((2, 3), np.bool_), np.array([3, 3]))
    search = NgramSearch(windows, 1)  # the last token of a window, and the first of the next, are both found
    search.add(np.array([1, 2, 3]), 3, np.array([0]))
    assert search.result(0, 2).found.tolist() == [3, 2]
    assert search.result(0, 2).longest == (0, 0, 3)


def test_equal_hashes_are_compared() -> None:
    """With the multiplier 0 a hash is that of the last token alone."""
    rows = np.array([[1, 2, 3, 4], [9, 9, 9, 4]])
    windows = EvaluationWindows(rows[:1], np.zeros((1, 4), np.bool_), np.array([4]))
    search = NgramSearch(windows, 3, multipliers=(0,))
    search.add(np.array([7, 7, 3, 4, 1, 2, 3]), 7, np.array([0]))
    assert search.result(0, 1).found.tolist() == [1]
    assert search.result(0, 1).longest == (0, 0, 3)


def test_a_multiplier_with_which_ngrams_collide_is_not_used() -> None:
    rows = np.array([[1, 2, 3, 4], [9, 9, 9, 4]])
    windows = EvaluationWindows(rows, np.zeros((2, 4), np.bool_), np.array([4, 4]))
    search = NgramSearch(windows, 3, multipliers=(0, 0x9E3779B97F4A7C15))
    assert search.multiplier
    search.add(np.array([9, 9, 4]), 3, np.array([0]))
    assert search.result(0, 2).found.tolist() == [0, 1]


@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 14))
def test_equal_ngrams_have_equal_hashes(tokens: list[int], length: int) -> None:
    hashes = rolling_hashes(np.array(tokens, np.uint16), length, 0x9E3779B97F4A7C15)
    ngrams = [ngram for _, ngram in ngrams_of(tokens, set(), length)]
    assert len(hashes) == len(ngrams)
    assert len(set(hashes.tolist())) == len(set(ngrams)) == len(set(zip(hashes.tolist(), ngrams, strict=True)))


def test_windows_without_ngrams() -> None:
    for shape in ((0, 20), (2, 5)):
        windows = EvaluationWindows(np.zeros(shape, np.uint16), np.zeros(shape, np.bool_), np.full(shape[0], shape[1]))
        search = NgramSearch(windows, 13)
        search.add(np.zeros(100, np.uint16), 88, np.array([0]))
        assert search.result(0, shape[0]).found.tolist() == [0] * shape[0]
        assert search.result(0, shape[0]).longest[2] == 0
