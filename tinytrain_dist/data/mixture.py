"""Choose the source of each sample, and count the samples of each source: pure functions of the sample's number.

Samples are numbered 0, 1, 2, ... over the whole run. A binary tree has the sources as its leaves: of the first g
samples of a node, floor(g W_left / W) are those of its left child, and the others those of its right child. So

* among the first g samples of a run, each source has its share of g, to within the depth of the tree;
* the number of a sample among those of its source follows from its number alone, in O(log(sources)) exact integer
  operations. No counter is kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

# Weights are integers whose sum is below 2^40, so that every product below fits an int64.
MAX_WEIGHT_BITS = 40
_DIGIT_BITS = MAX_WEIGHT_BITS // 2

Integers = npt.NDArray[np.int64]


class SamplePhase(NamedTuple):
    """The weights of the sources from a sample on, until the next phase begins."""

    first_sample: int
    weights: Sequence[float]


class Mixture:
    """The source of each sample, and its ordinal: which sample of that source it is, 0, 1, 2, ...

    The ordinals of a source have neither gaps nor repeats, and continue over phases.
    """

    def __init__(self, phases: Sequence[SamplePhase]) -> None:
        """Begin with the first phase, at sample 0.

        phases: in ascending order of their first samples; all have one weight per source.
        """
        assert phases[0].first_sample == 0
        self._firsts = [phase.first_sample for phase in phases]
        self._trees = [_WeightTree(integer_weights(phase.weights)) for phase in phases]
        # the samples of each source before each phase
        self._drawn: list[list[int]] = [[0] * len(phases[0].weights)]
        for tree, first, end in zip(self._trees, self._firsts, self._firsts[1:], strict=False):
            self._drawn.append([a + b for a, b in zip(self._drawn[-1], tree.counts(end - first), strict=True)])

    def locate(self, samples: Integers) -> tuple[Integers, Integers]:
        """Return source and ordinal of each sample: int64 [n] each. samples: below 2^62, in any order."""
        samples = samples.astype(np.int64)
        sources, ordinals = np.empty_like(samples), np.empty_like(samples)
        phases = np.searchsorted(np.array(self._firsts, np.int64), samples, side="right") - 1
        for phase in np.unique(phases).tolist():
            chosen = phases == phase
            sources[chosen], in_phase = self._trees[phase].locate(samples[chosen] - self._firsts[phase])
            ordinals[chosen] = in_phase + np.array(self._drawn[phase], np.int64)[sources[chosen]]
        return sources, ordinals

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` samples each source has."""
        phase = sum(first <= samples for first in self._firsts) - 1
        in_phase = self._trees[phase].counts(samples - self._firsts[phase])
        return [before + count for before, count in zip(self._drawn[phase], in_phase, strict=True)]


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Return integers in the ratio of the weights, as they are written in decimals: 0.7 and 0.3 give 7 and 3.

    Their sum is below 2^40. If the exact ratio needs a larger sum, they are rounded to multiples of 2^-40 of it. A
    weight above 0 stays above 0.
    """
    fractions = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    integers = [int(fraction * scale) for fraction in fractions]
    divisor = math.gcd(*integers)
    integers = [integer // divisor for integer in integers]
    total, largest = sum(integers), (1 << MAX_WEIGHT_BITS) - 1 - len(integers)
    if total > largest:
        integers = [max(integer * largest // total, min(integer, 1)) for integer in integers]
    return integers


class _WeightTree:
    """The binary tree of one phase. Node 1 is the root, and the children of node i are 2i and 2i + 1."""

    def __init__(self, weights: list[int]) -> None:
        """Build the tree over the sources. Their number is filled up to a power of two with weights of 0."""
        self.num_sources = len(weights)
        self.num_leaves = 1 << (len(weights) - 1).bit_length()
        self.weights = np.zeros(2 * self.num_leaves, np.int64)  # of each node
        self.weights[self.num_leaves : self.num_leaves + len(weights)] = weights
        for node in range(self.num_leaves - 1, 0, -1):
            self.weights[node] = self.weights[2 * node] + self.weights[2 * node + 1]

    def locate(self, samples: Integers) -> tuple[Integers, Integers]:
        """Return source and ordinal of samples, which are numbered from the beginning of the phase."""
        nodes, ordinals = np.ones_like(samples), samples
        for _ in range(self.num_leaves.bit_length() - 1):
            whole, left = self.weights[nodes], self.weights[2 * nodes]
            lefts_before = _scaled(ordinals, left, whole)
            goes_left = _scaled(ordinals + 1, left, whole) > lefts_before
            ordinals = np.where(goes_left, lefts_before, ordinals - lefts_before)
            nodes = np.where(goes_left, 2 * nodes, 2 * nodes + 1)
        return nodes - self.num_leaves, ordinals

    def counts(self, samples: int) -> list[int]:
        """Return how many of the first `samples` samples each source has."""
        count_of_node = [0, samples] + [0] * (2 * self.num_leaves - 2)
        for node in range(1, self.num_leaves):
            whole, left = int(self.weights[node]), int(self.weights[2 * node])
            count_of_node[2 * node] = count_of_node[node] * left // whole if whole else 0
            count_of_node[2 * node + 1] = count_of_node[node] - count_of_node[2 * node]
        return count_of_node[self.num_leaves : self.num_leaves + self.num_sources]


def _scaled(numbers: Integers, part: Integers, whole: Integers) -> Integers:
    """Return floor(numbers * part / whole), exactly, though the product may not fit 64 bits.

    part <= whole < 2^40.
    """
    periods, rest = np.divmod(numbers, whole)
    # long division of rest * part in two digits of 20 bits: each product is below 2^60
    high, remainder = np.divmod(rest * (part >> _DIGIT_BITS), whole)
    low = ((remainder << _DIGIT_BITS) + rest * (part & ((1 << _DIGIT_BITS) - 1))) // whole
    scaled: Integers = periods * part + (high << _DIGIT_BITS) + low
    return scaled
