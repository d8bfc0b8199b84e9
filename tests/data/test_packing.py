"""Packing: every target once, no document cut where it fits, and the same result as best fit piece by piece."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tinytrain_dist.data.packing import Packing, pack_documents


def random_starts(seed: int, documents: int, longest: int) -> tuple[np.ndarray, int]:
    lengths = np.random.default_rng(seed).integers(1, longest, size=documents)
    return np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64), int(lengths.sum())


def windows_of(packing: Packing) -> list[list[tuple[int, int]]]:
    return [list(zip(*packing.pieces(window), strict=True)) for window in range(packing.windows)]


def best_fit_decreasing(lengths: list[int], capacity: int) -> Counter[tuple[int, ...]]:
    """The definition, piece by piece: the contents of all windows, as the lengths in them."""
    windows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [window for window in windows if sum(window) + length <= capacity]
        if fitting:
            max(fitting, key=sum).append(length)
        else:
            windows.append([length])
    return Counter(tuple(sorted(window)) for window in windows)


CASES = [(0, 400, 40, 16), (1, 400, 200, 64), (2, 1000, 9, 31), (3, 50, 5, 100), (4, 300, 66, 64)]


@pytest.mark.parametrize(("seed", "documents", "longest", "context_len"), CASES)
def test_every_target_is_in_one_window(seed: int, documents: int, longest: int, context_len: int) -> None:
    starts, tokens = random_starts(seed, documents, longest)
    packing = pack_documents(starts, tokens, context_len)
    targets = np.zeros(tokens, int)
    for window in windows_of(packing):
        assert sum(length for _, length in window) <= context_len + 1
        for start, length in window:
            targets[start + 1 : start + length] += 1
            document = np.searchsorted(starts, start, side="right") - 1
            end = starts[document + 1] if document + 1 < len(starts) else tokens
            assert start + length <= end, "a piece crosses a document's end"
            whole = end - starts[document]
            assert whole > context_len + 1 or (start == starts[document] and length == whole), "cut without need"
    expected = np.ones(tokens, int)
    expected[starts] = 0  # nothing predicts the first token of a document
    np.testing.assert_array_equal(targets, expected)


@pytest.mark.parametrize(("seed", "documents", "longest", "context_len"), CASES)
def test_it_is_best_fit(seed: int, documents: int, longest: int, context_len: int) -> None:
    starts, tokens = random_starts(seed, documents, longest)
    packing = pack_documents(starts, tokens, context_len)
    contents = Counter(tuple(sorted(length for _, length in window)) for window in windows_of(packing))
    assert contents == best_fit_decreasing(packing.lengths.tolist(), context_len + 1)


def test_documents_of_one_token_or_none_are_left_out() -> None:
    packing = pack_documents(np.array([0, 1, 1, 2, 6], np.int64), 7, 8)
    assert windows_of(packing) == [[(2, 4)]]
    assert pack_documents(np.array([0], np.int64), 1, 8).windows == 0


def test_a_long_document_is_cut_into_full_windows_that_share_a_token() -> None:
    packing = pack_documents(np.array([0], np.int64), 22, 8)
    assert sorted(piece for window in windows_of(packing) for piece in window) == [(0, 9), (8, 9), (16, 6)]


def test_packings_are_as_recorded() -> None:
    packing = pack_documents(np.array([0, 3, 9, 11, 30, 36, 41], np.int64), 50, 8)
    assert windows_of(packing) == [
        [(11, 9)],
        [(19, 9)],
        [(41, 9)],
        [(3, 6), (0, 3)],
        [(30, 6), (27, 3)],
        [(36, 5), (9, 2)],
    ]


def test_nearly_nothing_is_padding_in_a_large_corpus() -> None:
    starts, tokens = random_starts(5, 200_000, 1500)
    packing = pack_documents(starts, tokens, 1024)
    assert packing.lengths.sum() > 0.99 * packing.windows * 1025
