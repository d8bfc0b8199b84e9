"""Check which rank is named as slow, and how often."""

from __future__ import annotations

from tinytrain_dist.metrics.slow_ranks import SlowRankDetector


def named(works: list[list[float]]) -> list[tuple[int, str]]:
    """Return (step, first words) of each warning, given the work of all ranks at logged steps 1, 2, ..."""
    detector = SlowRankDetector(["a", "b", "c", "d"])
    warnings = [(step, detector.update([0.0] * len(work), work).warning[:6]) for step, work in enumerate(works, 1)]
    return [(step, text) for step, text in warnings if text]


def test_a_slow_rank_is_named_at_the_second_time_and_again_only_after_it_recovered() -> None:
    fine, slow_1, slow_3 = [1.0, 1.1, 1.0, 1.0], [1.0, 1.3, 1.0, 1.0], [1.0, 1.0, 1.0, 1.5]
    assert named([slow_1, fine, slow_1, fine]) == []
    assert named([slow_1, slow_1, slow_1, slow_1]) == [(2, "rank 1")]
    assert named([slow_1, slow_1, fine, slow_1, slow_1]) == [(2, "rank 1"), (5, "rank 1")]
    assert named([slow_1, slow_3, slow_3]) == [(3, "rank 3")]
    assert named([[1.0, 1.25], [1.0, 1.25]]) == [(2, "rank 1")], "of two ranks the faster one is the measure"
    assert named([[1.0], [1.0]]) == []
    assert named([[0.0, 0.0], [0.0, 0.0]]) == []


def test_a_difference_of_a_few_milliseconds_is_noise() -> None:
    assert named([[0.006, 0.015], [0.006, 0.015]]) == []
    assert named([[0.006, 0.017], [0.006, 0.017]]) == [(2, "rank 1")]
    assert named([[0.1, 0.13], [0.1, 0.109], [0.1, 0.13]]) == [], "it begins again after an interval without"


def test_the_warning_has_the_host_and_all_three_times() -> None:
    detector = SlowRankDetector(["a", "b", "c"])
    detector.update([0.0, 0.5, 0.0], [1.0, 2.0, 1.0])
    slowest = detector.update([0.0, 0.5, 0.0], [1.0, 2.0, 1.0])
    assert (slowest.rank, slowest.ratio) == (1, 2.0)
    assert slowest.warning == (
        "rank 1 (b) is slow: its own work takes 2.000 s per step, 2.0 times the median of 1.000 s; it waits for data "
        "for 0.500 s and spends the rest in the forward pass. All other ranks wait for this rank"
    )
