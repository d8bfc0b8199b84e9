"""Find which n-grams of evaluation windows occur in a text, exactly: hashes only choose what is compared.

An n-gram is `length` successive tokens of one document. Must not know files.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]
Integers = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]

_ODD_NUMBERS = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB, 0xD6E8FEB86659FD93)
_WORD = 1 << 64
_FILTER_PER_NGRAM = 32  # so that 3 % of other n-grams pass the filter
_LEAST_FILTER_BITS, _MOST_FILTER_BITS = 16, 28
_COMPARED_AT_ONCE = 1 << 16
_HASHED_AT_ONCE = 1 << 20


class EvaluationWindows(NamedTuple):
    """Windows of tokens of one width."""

    tokens: npt.NDArray[Any]  # [n, width]
    begins: Bools  # [n, width]: where documents begin
    used: Integers  # [n]: tokens of each window before its padding


class WindowOverlap(NamedTuple):
    """What was found of each window."""

    ngrams: Integers  # [n]: n-grams in each window
    found: Integers  # [n]: those of them that occur in the text
    longest: tuple[
        int, int, int
    ]  # window, first token and tokens of the longest passage that was found; tokens 0: none


def rolling_hashes(tokens: npt.NDArray[Any], length: int, multiplier: int) -> Words:
    """Return a hash of each n-gram, by its first token: uint64 [tokens - length + 1].

    It is a polynomial in `multiplier` modulo 2^64 of mixed tokens. It is computed from hashes of 1, 2, 4, ... tokens.
    """
    count = len(tokens) - length + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    power = tokens.astype(np.int64).view(np.uint64) + np.uint64(1)  # hashes of `width` tokens
    for odd in _ODD_NUMBERS[1:3]:  # one-to-one, so two tokens never have the same hash
        power *= np.uint64(odd)
        power ^= power >> np.uint64(32)
    width, done = 1, 0
    result = np.zeros(count, np.uint64)  # hashes of the first `done` tokens
    while True:
        if length & width:
            result *= np.uint64(pow(multiplier, width, _WORD))
            result += power[done : done + count]
            done += width
        if done == length:
            return result
        power = power[:-width] * np.uint64(pow(multiplier, width, _WORD)) + power[width:]
        width *= 2


class NgramSearch:
    """The n-grams of evaluation windows, and which of them occurred in the text so far.

    Memory: about 40 bytes for each token of the windows, and 32 to 64 for each distinct n-gram (at most 256 MB).
    """

    def __init__(self, windows: EvaluationWindows, length: int, multipliers: tuple[int, ...] = _ODD_NUMBERS) -> None:
        """Collect the n-grams. multipliers: of the hashes; the first with which no two n-grams collide is used."""
        assert length >= 1
        self.length = length
        self.windows = windows
        self._flat = np.ascontiguousarray(windows.tokens).reshape(-1)
        self._places = _ngram_places(windows, length)  # of each n-gram in the flat array
        for multiplier in multipliers:
            self.multiplier = multiplier
            if self._index():
                break
        else:
            raise AssertionError("no multiplier separates the n-grams")
        bits = int(np.clip((_FILTER_PER_NGRAM * len(self._hashes)).bit_length(), _LEAST_FILTER_BITS, _MOST_FILTER_BITS))
        self._shift = np.uint64(64 - bits)
        self._filter = np.zeros(1 << bits, np.bool_)
        self._filter[self._hashes >> self._shift] = True
        self._found = np.zeros(len(self._hashes), np.bool_)

    def _index(self) -> bool:
        """Sort the n-grams by hash; return whether those with the same hash are the same n-gram."""
        hashes = np.empty(len(self._places), np.uint64)
        for first in range(0, len(self._places), _HASHED_AT_ONCE):
            places = self._places[first : first + _HASHED_AT_ONCE]
            low, high = int(places[0]), int(places[-1])
            of_range = rolling_hashes(self._flat[low : high + self.length], self.length, self.multiplier)
            hashes[first : first + len(places)] = of_range[places - low]
        # hashes of the distinct n-grams, ascending; the place of one of each; which of them each n-gram is
        self._hashes, firsts, self._which = np.unique(hashes, return_index=True, return_inverse=True)
        self._examples = self._places[firsts]
        return all(
            self._equal(self._flat, self._places[part], self._which[part]).all()
            for part in _parts(len(self._places), _COMPARED_AT_ONCE)
        )

    def _equal(self, tokens: npt.NDArray[Any], places: Integers, which: npt.NDArray[np.intp]) -> Bools:
        """Return whether the n-gram at each place of `tokens` is the distinct n-gram with this number."""
        steps = np.arange(self.length)
        same: Bools = (tokens[places[:, None] + steps] == self._flat[self._examples[which][:, None] + steps]).all(
            axis=1
        )
        return same

    def add(self, tokens: npt.NDArray[Any], count: int, starts: Integers) -> None:
        """Search the n-grams that begin with one of the first `count` tokens.

        tokens: these, and at least length - 1 further ones unless the text ends before. starts: ascending, at which of
        the tokens documents begin.
        """
        hashes = rolling_hashes(tokens, self.length, self.multiplier)[:count]
        places = np.flatnonzero(self._filter[hashes >> self._shift])
        if not len(places):
            return
        which = np.searchsorted(self._hashes, hashes[places])
        which[which == len(self._hashes)] = 0
        kept = (self._hashes[which] == hashes[places]) & ~self._found[which]
        places, which = places[kept], which[kept]
        # an n-gram in which a document begins belongs to no document
        next_starts = np.append(starts, len(tokens))[np.searchsorted(starts, places, side="right")]
        kept = next_starts >= places + self.length
        places, which = places[kept], which[kept]
        for part in _parts(len(places), _COMPARED_AT_ONCE):
            same = self._equal(tokens, places[part], which[part])
            self._found[which[part][same]] = True

    @property
    def distinct(self) -> int:
        """Number of distinct n-grams of the windows."""
        return len(self._hashes)

    def result(self, first: int, last: int) -> WindowOverlap:
        """Return what was found of the windows first .. last - 1."""
        width = self.windows.tokens.shape[1]
        low, high = np.searchsorted(self._places, [first * width, last * width])
        found = self._found[self._which[low:high]]
        places = self._places[low:high] - first * width
        found_places = places[found]
        num_windows = last - first
        counts = np.bincount(places // width, minlength=num_windows)
        found_counts = np.bincount(found_places // width, minlength=num_windows)
        return WindowOverlap(counts, found_counts, self._longest(found_places, width))

    def _longest(self, places: Integers, width: int) -> tuple[int, int, int]:
        """Return the longest run of successive n-grams that were found, as WindowOverlap has it."""
        if not len(places):
            return 0, 0, 0
        is_first = np.ones(len(places), np.bool_)
        is_first[1:] = (np.diff(places) != 1) | (places[1:] // width != places[:-1] // width)
        firsts = np.flatnonzero(is_first)
        runs = np.diff(firsts, append=len(places))
        longest = int(np.argmax(runs))
        window, token = divmod(int(places[firsts[longest]]), width)
        return window, token, int(runs[longest]) + self.length - 1


def _ngram_places(windows: EvaluationWindows, length: int) -> Integers:
    """Return the places of all n-grams in the flattened windows, ascending."""
    num_windows, width = windows.tokens.shape
    if width < length:
        return np.empty(0, np.int64)
    documents = np.cumsum(windows.begins, axis=1, dtype=np.int32)
    within = documents[:, length - 1 :] == documents[:, : width - length + 1]
    within &= np.arange(length, width + 1) <= windows.used[:, None]
    complete = np.zeros((num_windows, width), np.bool_)
    complete[:, : width - length + 1] = within
    return np.flatnonzero(complete).astype(np.int64)


def _parts(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]
