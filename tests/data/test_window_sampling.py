"""Check which windows a step draws: a uniform, pinned and pure function of (seed, step, sample slot).

Ranks can draw their slots on their own because any grouping of slots draws the same windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.data.window_sampling import EVAL_STREAM, TRAIN_STREAM, window_starts

SEEDS = st.integers(0, 2**64 - 1)
STEPS = st.integers(0, 2**40)


def drawn(seed: int, step: int, slots: Sequence[int], windows: int, stream: int = TRAIN_STREAM) -> list[int]:
    starts: list[int] = window_starts(seed, step, slots, windows, stream).tolist()
    return starts


# --- independence of slots -----------------------------------------------------------------------------------------


@given(
    seed=SEEDS,
    step=STEPS,
    windows=st.integers(1, 2**40),
    slots=st.lists(st.integers(0, 2**20), unique=True, max_size=12),
    data=st.data(),
)
def test_the_draw_of_a_slot_does_not_depend_on_other_slots(
    seed: int, step: int, windows: int, slots: list[int], data: st.DataObject
) -> None:
    alone = {slot: drawn(seed, step, [slot], windows)[0] for slot in slots}
    order = data.draw(st.permutations(slots))
    expected = [alone[slot] for slot in order]
    assert drawn(seed, step, order, windows) == expected
    cut = data.draw(st.integers(0, len(order)))
    assert drawn(seed, step, order[:cut], windows) + drawn(seed, step, order[cut:], windows) == expected
    assert all(0 <= start < windows for start in alone.values())


@given(seed=SEEDS, step=STEPS, first=st.integers(0, 1000), size=st.integers(0, 40))
def test_successive_slots_draw_the_same_together_and_alone(seed: int, step: int, first: int, size: int) -> None:
    together = drawn(seed, step, list(range(first, first + size)), 1000)
    assert together == [drawn(seed, step, [slot], 1000)[0] for slot in range(first, first + size)]
    assert together == drawn(seed, step, range(first, first + size), 1000)


def test_a_slot_may_be_requested_twice() -> None:
    assert drawn(1, 2, [5, 5, 4, 5], 10**6) == [drawn(1, 2, [slot], 10**6)[0] for slot in (5, 5, 4, 5)]


# --- draws that are pinned, and draws that differ ------------------------------------------------------------------

PINNED_STARTS = [466_853, 483_027, 656_003, 391_089, 367_886]


def test_the_draw_is_pinned() -> None:
    starts = drawn(seed=1, step=2, slots=[0, 1, 2, 3, 10], windows=1_000_000)
    assert starts == PINNED_STARTS, (
        f"window_starts(1, 2, [0, 1, 2, 3, 10], 1_000_000) is {starts}. Every run that is resumed now continues with "
        "other data than it would have drawn. If numpy's Philox changed, work around the change. If the sampler was "
        "changed on purpose, say so in CHANGELOG.md, raise the checkpoint format, and put the new numbers here."
    )


def test_draws_differ_between_seeds_steps_and_streams() -> None:
    starts = [
        start
        for seed in (0, 1, 2**32, 2**63, 2**64 - 1)
        for step in (0, 1, 2, 64, 2**32)
        for stream in (TRAIN_STREAM, EVAL_STREAM)
        for start in drawn(seed, step, range(64), 2**60, stream)
    ]
    assert len(starts) == 5 * 5 * 2 * 64
    assert len(set(starts)) == len(starts)


def test_neighbouring_steps_and_slots_share_no_random_words() -> None:
    # If the blocks of words overlapped, a neighbour of (step, slot) would draw the same window.
    starts = [start for step in range(50) for start in drawn(7, step, range(50), 2**60)]
    assert len(set(starts)) == 2500


# --- uniformity ----------------------------------------------------------------------------------------------------


def test_the_draw_is_uniform() -> None:
    windows, draws = 7, 70_000
    counts = np.bincount(window_starts(3, 0, range(draws), windows), minlength=windows)
    assert len(counts) == windows
    expected = draws / windows
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 22.5  # 6 degrees of freedom: exceeded by one seed in 1,000, and this seed is fixed


def test_the_draw_is_uniform_where_a_remainder_would_show() -> None:
    # 2^64 is 8/3 of this number. If no word were rejected, starts in the lower two thirds would be drawn three times
    # for every two in the upper third.
    windows = 3 << 61
    starts = window_starts(3, 0, range(20_000), windows)
    share_of_lower_half = (starts < windows // 2).mean()
    assert abs(share_of_lower_half - 0.5) < 4 * 0.5 / 20_000**0.5
    assert starts.max() < windows


def test_every_window_of_a_tiny_file_is_drawn_also_the_last() -> None:
    assert set(drawn(0, 0, range(200), 5)) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("windows", [1, 2, 2**32, 2**63 - 1])
def test_starts_are_int64_and_below_any_number_of_windows(windows: int) -> None:
    starts = window_starts(5, 1, range(50), windows)
    assert starts.dtype == np.int64
    assert (starts >= 0).all()
    assert (starts < windows).all()
