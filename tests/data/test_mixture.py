"""Mixtures of sources: exact shares, ordinals without gaps, phases, and numbers far beyond 64-bit products."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from tinytrain_dist.data.mixture import MAX_WEIGHT_BITS, Mixture, SamplePhase, integer_weights

WEIGHTS = {
    "one": [1.0],
    "thirds": [1.0, 2.0],
    "decimals": [0.7, 0.2, 0.1],
    "with_zero": [0.0, 3.0, 0.0, 1.0, 2.5],
    "uneven": [1e-6, 1.0, 123_456.789],
    "windows": [1_234_567_891, 98_765_432_123, 7],
    "many": [math.pi**power for power in range(37)],
}


def mixture(*phases: tuple[int, Sequence[float]]) -> Mixture:
    return Mixture([SamplePhase(first, weights) for first, weights in phases])


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("first", [0, 10**12 - 5, (1 << 61) + 3])
def test_sources_have_their_shares_and_ordinals_count_them(weights: list[float], first: int) -> None:
    mixed = mixture((0, weights))
    samples = np.arange(first, first + 2_000)
    sources, ordinals = mixed.locate(samples)
    drawn = mixed.counts(first)
    assert sum(drawn) == first
    for sample, source, ordinal in zip(samples.tolist(), sources.tolist(), ordinals.tolist(), strict=True):
        assert ordinal == drawn[source], f"sample {sample}"  # neither gap nor repeat
        drawn[source] += 1
    assert drawn == mixed.counts(first + 2_000)
    integers = integer_weights(weights)
    for source, count in enumerate(drawn):
        share = Fraction(integers[source], sum(integers)) * (first + 2_000)
        assert abs(count - share) < math.log2(len(weights)) + 1


def test_any_part_in_any_order_is_the_same() -> None:
    mixed = mixture((0, WEIGHTS["many"]), (300, WEIGHTS["many"][::-1]), (777, [1.0] * 37))
    samples = np.arange(1_000)
    whole = mixed.locate(samples)
    order = np.random.default_rng(0).permutation(samples)
    for part in np.array_split(order, [1, 17, 400, 400]):
        for have, expected in zip(mixed.locate(part), whole, strict=True):
            assert np.array_equal(have, expected[part])


def test_phases_change_the_shares_and_continue_the_ordinals() -> None:
    mixed = mixture((0, [0.7, 0.3, 0.0]), (1_000, [0.2, 0.0, 0.8]), (10**12, [0.0, 1.0, 0.0]))
    assert mixed.counts(1_000) == [700, 300, 0]
    assert mixed.counts(2_000) == [900, 300, 800]
    sources, ordinals = mixed.locate(np.arange(990, 1_010))
    for source in range(3):
        chosen = ordinals[sources == source]
        assert chosen.tolist() == list(range(mixed.counts(990)[source], mixed.counts(1_010)[source]))
    assert set(sources[:10].tolist()) == {0, 1}
    assert set(sources[10:].tolist()) == {0, 2}
    last_sources, last_ordinals = mixed.locate(np.array([10**12, 10**12 + 5]))
    assert last_sources.tolist() == [1, 1]
    assert last_ordinals.tolist() == [300, 305]


def test_sources_alternate_rather_than_come_in_blocks() -> None:
    sources, _ = mixture((0, [1.0, 1.0, 2.0])).locate(np.arange(8))
    assert sorted(sources[:4].tolist()) == sorted(sources[4:].tolist()) == [0, 1, 2, 2]


def test_weights_are_taken_as_they_are_written() -> None:
    assert integer_weights([0.7, 0.3]) == [7, 3]
    assert integer_weights([50, 25.0]) == [2, 1]
    assert integer_weights([0.0, 1e-3]) == [0, 1]
    tiny = integer_weights([1e-300, 1.0, 0.0, 1e10])
    assert tiny[0] == 1
    assert tiny[2] == 0
    assert sum(tiny) < 1 << MAX_WEIGHT_BITS


def test_sources_are_as_recorded() -> None:
    """A change would break the resume of every run that shuffles."""
    sources, ordinals = mixture((0, [0.5, 0.3, 0.2])).locate(np.arange(10))
    assert sources.tolist() == [2, 1, 0, 1, 0, 2, 0, 1, 0, 0]
    assert ordinals.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 4]
