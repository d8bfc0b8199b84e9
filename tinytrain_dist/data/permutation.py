"""Permute 0 .. length - 1 by a key, in constant time per element: the order of the windows of an epoch.

Nothing of the size of the data is computed or kept, so an epoch of 10^12 windows costs no more than one of ten.

A balanced Feistel network (Luby and Rackoff 1988) permutes the numbers of 2h bits. Numbers of `length` or more are
permuted again until the result is smaller (cycle walking, Black and Rogaway 2002). All arithmetic is on integers, so
every platform computes the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ROUNDS = 8  # of the Feistel network; each takes one word of the key
MAX_LENGTH = 1 << 62

Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Permutation:
    """A permutation of 0 .. length - 1.

    length: 1 .. MAX_LENGTH. keys: ROUNDS random words, uint64; other keys give another permutation.
    """

    length: int
    keys: Words

    def __post_init__(self) -> None:
        """Check length and keys."""
        assert 1 <= self.length <= MAX_LENGTH
        assert len(self.keys) == ROUNDS

    def apply(self, indices: Indices) -> Indices:
        """Return the element at each index, both in 0 .. length - 1: int64 [n]."""
        return self._walk(indices, self.keys)

    def invert(self, elements: Indices) -> Indices:
        """Return the index of each element; the inverse of `apply`."""
        # A Feistel network with its halves swapped is its own inverse, with the keys in reverse order.
        return self._swap(self._walk(self._swap(elements), self.keys[::-1], swapped=True))

    @property
    def _half_bits(self) -> int:
        """Bits of one half: the fewest for which 2 halves hold every number below `length`."""
        return max(1, ((self.length - 1).bit_length() + 1) // 2)

    def _swap(self, numbers: Indices) -> Indices:
        half, mask = self._half_bits, (1 << self._half_bits) - 1
        return (numbers & mask) << half | numbers >> half

    def _walk(self, numbers: Indices, keys: Words, swapped: bool = False) -> Indices:
        """Apply the network to each number, again and again until the result is below `length`.

        The domain has at most 4 times as many numbers as `length`, so an element takes at most 4 turns on average.
        swapped: numbers and results have their halves swapped.
        """
        walked = numbers.astype(np.int64)
        outside = np.arange(len(walked))
        while len(outside):
            walked[outside] = self._rounds(walked[outside], keys)
            results = walked[outside]
            outside = outside[(self._swap(results) if swapped else results) >= self.length]
        return walked

    def _rounds(self, numbers: Indices, keys: Words) -> Indices:
        half, mask = np.uint64(self._half_bits), np.uint64((1 << self._half_bits) - 1)
        bits = numbers.astype(np.uint64)
        left, right = bits >> half, bits & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        return (left << half | right).astype(np.int64)


def _mix(words: Words) -> Words:
    """Return a hash of each word: the finalizer of splitmix64 (Steele, Lea and Flood 2014)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)  # modulo 2^64
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
