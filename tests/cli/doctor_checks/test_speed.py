"""How slow ranks are found, and which nodes exchange data in which round."""

from __future__ import annotations

import pytest

from tinytrain_dist.cli.doctor_checks import speed as speed_checks


def test_outlier_is_below_eight_tenths_of_the_median() -> None:
    rates = {"a": 10.0, "b": 10.2, "c": 7.9}
    (said,) = speed_checks.outliers("matmul", "TFLOP/s", rates, "look there")
    assert said == "matmul: c has 7.9 TFLOP/s, the median of 3 is 10; look there"
    assert speed_checks.outliers("matmul", "TFLOP/s", {**rates, "c": 8.1}, "") == []


@pytest.mark.parametrize("nodes", [2, 3, 4, 5, 8])
def test_each_node_swaps_with_both_neighbours_and_with_one_at_a_time(nodes: int) -> None:
    rounds = speed_checks.ring_rounds(nodes)
    for pairs in rounds:
        busy = [node for pair in pairs for node in pair]
        assert len(busy) == len(set(busy))
    everyone = sorted(node for pairs in rounds for pair in pairs for node in pair)
    assert everyone == sorted(list(range(nodes)) * (2 if nodes > 2 else 1))
