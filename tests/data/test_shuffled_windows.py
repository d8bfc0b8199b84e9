"""Shuffled windows: every token is a target once per epoch, and the next epoch has another order and offset."""

from __future__ import annotations

import numpy as np
import pytest

from tinytrain_dist.data.mixture import Integers, SamplePhase
from tinytrain_dist.data.shuffled_windows import ChosenWindows, ShuffledWindows, windows_per_epoch


def times_as_target(chosen: ChosenWindows, lengths: list[int], context_len: int) -> list[Integers]:
    """Count how often each token of each source is a target that counts."""
    counts = [np.zeros(length, np.int64) for length in lengths]
    for source, start, targets in zip(*(column.tolist() for column in chosen), strict=True):
        assert 0 <= start < lengths[source]
        assert 1 <= targets <= context_len
        np.add.at(counts[source], (start + 1 + np.arange(targets)) % lengths[source], 1)
    return counts


@pytest.mark.parametrize(
    "lengths", [[1000], [997, 311], [13, 12, 11, 1, 12_001], [5]], ids=["even", "two", "five", "shorter_than_a_window"]
)
def test_every_token_is_a_target_once_in_each_epoch(lengths: list[int]) -> None:
    context_len = 12
    windows = ShuffledWindows(lengths, context_len)
    per_epoch = sum(windows.windows)
    assert windows.windows == [windows_per_epoch(length, context_len) for length in lengths]
    for epoch in range(3):
        chosen = windows.choose(0, np.arange(epoch * per_epoch, (epoch + 1) * per_epoch))
        for counts in times_as_target(chosen, lengths, context_len):
            assert (counts == 1).all()
    assert windows.epochs(3 * per_epoch) == 3
    assert windows.epochs_of_sources(2 * per_epoch) == [2.0] * len(lengths)


def test_with_weights_every_source_has_epochs_of_its_own() -> None:
    lengths, context_len = [600, 100], 10
    windows = ShuffledWindows(lengths, context_len, [SamplePhase(0, [0.5, 0.5]), SamplePhase(60, [0.25, 0.75])])
    counts = times_as_target(windows.choose(0, np.arange(100)), lengths, context_len)
    assert [count.sum() for count in counts] == [400, 600]
    assert set(counts[0].tolist()) == {0, 1}
    assert set(counts[1].tolist()) == {6}
    assert windows.epochs_of_sources(100) == [40 / 60, 6.0]


def test_each_epoch_has_another_order_and_offset() -> None:
    windows = ShuffledWindows([10_000], 100)
    epochs = [windows.choose(0, np.arange(epoch * 100, (epoch + 1) * 100)) for epoch in range(20)]
    assert len({tuple((epoch.starts // 100).tolist()) for epoch in epochs}) == 20
    offsets = {frozenset((epoch.starts % 100).tolist()) for epoch in epochs}
    assert len(offsets) > 15
    other_seed = ShuffledWindows([10_000], 100).choose(1, np.arange(100))
    assert other_seed.starts.tolist() != epochs[0].starts.tolist()


def test_sources_of_one_length_have_orders_of_their_own() -> None:
    chosen = ShuffledWindows([5_000, 5_000], 50).choose(0, np.arange(200))
    assert chosen.starts[chosen.sources == 0].tolist() != chosen.starts[chosen.sources == 1].tolist()


def test_any_grouping_of_samples_has_the_same_windows() -> None:
    windows = ShuffledWindows([997, 311, 40], 12)
    samples = np.arange(400)
    whole = windows.choose(5, samples)
    for part in np.array_split(np.random.default_rng(0).permutation(samples), 7):
        fresh = ShuffledWindows([997, 311, 40], 12).choose(5, part)  # has no memory of earlier draws
        for column, expected in zip(fresh, whole, strict=True):
            assert np.array_equal(column, expected[part])


def test_a_corpus_of_a_quadrillion_tokens_takes_no_longer() -> None:
    windows = ShuffledWindows([10**15, 3 * 10**14 + 7], 2048)
    samples = np.arange(10**12, 10**12 + 4096)
    chosen = windows.choose(0, samples)
    assert len({*zip(chosen.sources.tolist(), chosen.starts.tolist(), strict=True)}) == 4096
    assert (chosen.starts < windows.lengths[chosen.sources]).all()


def test_windows_are_as_recorded() -> None:
    """A change would break the resume of every run that shuffles: give the new order another name."""
    chosen = ShuffledWindows([1000, 333], 16, [SamplePhase(0, [0.5, 0.5])]).choose(42, np.arange(8))
    assert chosen.sources.tolist() == [1, 0, 1, 0, 1, 0, 1, 0]
    assert chosen.starts.tolist() == [27, 98, 283, 162, 331, 738, 107, 690]
    last = ShuffledWindows([1000], 16).choose(42, np.arange(63, 126))
    assert sorted(last.targets.tolist())[:2] == [8, 16]
