"""Check the reduction tree: any number of parts, and one order of additions."""

from __future__ import annotations

import pytest
import torch

from tinytrain_dist.parallel.tree_reduction import BinaryCounter, halving_row_sums, tree_sum


def test_the_tree_takes_any_number_of_parts() -> None:
    for count in range(1, 10):
        parts = torch.arange(count * 2, dtype=torch.float32).view(count, 2)
        assert tree_sum(parts).tolist() == parts.sum(0).tolist()
    big, small = torch.tensor([[2.0**24], [1.0], [1.0], [1.0], [-(2.0**24)]]), 2.0
    assert tree_sum(big).item() == small  # ((2^24 + 1) + (1 + 1)) - 2^24, the first sum rounded down


def test_the_counter_adds_in_the_order_of_the_tree() -> None:
    leaves = [2.0**24, 1.0, 1.0, 1.0]  # (2^24 + 1) + (1 + 1), the first sum rounded down; in a row it stays 2^24
    counter = BinaryCounter()
    for leaf, value in enumerate(leaves[:-1]):
        counter.add(range(leaf, leaf + 1), [torch.tensor([value])])
    levels = counter.pop_completed_by(range(3, 4))
    assert len(levels) == 2, "three leaves are two ones in binary"
    total = torch.tensor([leaves[-1]])
    for (level,) in levels:
        total += level
    assert total.item() == tree_sum(torch.tensor(leaves).view(4, 1)).item() == 2.0**24 + 2
    assert counter.pop_all() == [], "pop empties the counter"


@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 101])
def test_a_row_has_the_same_sum_whatever_the_other_rows(width: int):
    torch.manual_seed(0)
    values = torch.randn(33, width)
    whole = halving_row_sums(values.clone())
    torch.testing.assert_close(whole, values.double().sum(1).float())
    for start, stop in ((0, 1), (3, 10), (16, 33)):
        assert torch.equal(halving_row_sums(values[start:stop].clone()), whole[start:stop])
