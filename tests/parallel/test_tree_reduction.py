"""Check the reduction tree: any number of parts, and one order of additions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinytrain_dist.parallel.tree_reduction import (
    BinaryCounter,
    TreeExchange,
    add_parts,
    blocks_in,
    halving_row_sums,
    tree_sum,
)


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


@given(st.integers(0, 70), st.integers(0, 70))
def test_a_range_of_leaves_is_the_fewest_nodes_of_the_tree(start: int, length: int) -> None:
    blocks = blocks_in(range(start, start + length))
    assert [leaf for block in blocks for leaf in block] == list(range(start, start + length))
    for block in blocks:
        assert len(block) & (len(block) - 1) == 0
        assert block.start % len(block) == 0
    counter = BinaryCounter()
    for block in blocks:  # no two of them form a larger one
        counter.add(block, [torch.zeros(1)])
    assert len(counter.pop_all()) == len(blocks) <= max(1, 2 * length.bit_length())


def values_of(count: int) -> torch.Tensor:
    """Return values whose sum depends on the order of additions: [count, 30]."""
    return torch.randn(count, 30, generator=torch.Generator().manual_seed(count)) ** 3


@given(st.sampled_from([1, 2, 4, 8, 16, 32]), st.lists(st.integers(1, 32), max_size=8))
def test_any_micro_steps_give_the_sum_of_the_tree(count: int, cuts: list[int]) -> None:
    values = values_of(count)
    edges = sorted({0, count, *(cut for cut in cuts if cut < count)})
    counter = BinaryCounter()
    for start, stop in itertools.pairwise(edges):
        unused = torch.full((2, 30), torch.nan)  # of ranks without a micro-batch
        add_parts(counter, range(start, stop), torch.cat([values[start:stop], unused]))
    (total,) = counter.pop_last()
    assert counter.pop_all() == []
    assert torch.equal(total, tree_sum(values))


def test_kept_sums_do_not_share_the_memory_of_received_parts() -> None:
    """The counter would keep all parts of a micro-step; `all_reduce` writes into the memory of the parts."""
    for leaves in (range(1), range(1, 4), range(4)):
        parts = values_of(4)
        counter = BinaryCounter()
        add_parts(counter, leaves, parts)
        assert parts.untyped_storage().data_ptr() not in [
            sums.untyped_storage().data_ptr() for (sums,) in counter.pop_all()
        ]
    parts = values_of(3).flatten()  # of three blocks
    total = TreeExchange([range(1), range(1, 2), range(2, 4)], group=None).sum_parts(parts)
    assert total.untyped_storage().data_ptr() != parts.untyped_storage().data_ptr()


@given(st.sampled_from([2, 4, 8, 16, 32]), st.integers(2, 32))
def test_any_number_of_ranks_completes_the_tree(count: int, ranks: int) -> None:
    ranks = min(ranks, count)
    values = values_of(count)
    leaves = [range(rank * count // ranks, (rank + 1) * count // ranks) for rank in range(ranks)]
    exchange = TreeExchange(leaves, group=None)
    sums = [tree_sum(values[block.start : block.stop]) for own in leaves for block in blocks_in(own)]
    assert torch.equal(exchange.sum_parts(torch.cat(sums)), tree_sum(values))
    is_power_of_two = ranks & (ranks - 1) == 0
    assert exchange.is_even == is_power_of_two, "a power of two sends one sum"


@pytest.mark.parametrize("width", [1, 2, 3, 7, 64, 101])
def test_a_row_has_the_same_sum_whatever_the_other_rows(width: int):
    torch.manual_seed(0)
    values = torch.randn(33, width)
    whole = halving_row_sums(values.clone())
    torch.testing.assert_close(whole, values.double().sum(1).float())
    for start, stop in ((0, 1), (3, 10), (16, 33)):
        assert torch.equal(halving_row_sums(values[start:stop].clone()), whole[start:stop])
