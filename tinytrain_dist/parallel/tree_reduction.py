"""Sum along one fixed binary tree, so that the result does not depend on which rank holds which part.

Floating-point addition is commutative but not associative, so equal trees mean equal bits. The leaves of the tree are
the micro-batches of a step. A tree over ranks (`tree_reduce_scatter`) and a tree over the micro-steps of a rank
(`BinaryCounter`) both add neighbours first, so together they form that one tree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.collectives import Group


def tree_sum(parts: Tensor) -> Tensor:
    """Sum over dim 0 by adding neighbours, then neighbours of those sums, and so on: [n, ...] -> [...].

    A part without a neighbour is added in a later round.
    """
    while len(parts) > 1:
        even_count = len(parts) // 2 * 2
        unpaired = parts[even_count:]  # one or none
        parts = parts[0:even_count:2] + parts[1::2]
        parts = torch.cat([parts, unpaired]) if len(unpaired) else parts
    return parts[0]


def halving_row_sums(values: Tensor) -> Tensor:
    """Sum each row by adding its second half to its first half again and again: [rows, n] -> [rows]. Overwrites values.

    The bits of a row's sum do not depend on the other rows. Those of a GPU's own reductions do, because their order
    depends on the number of rows. measured (H200, 2026-11-27): the first 7 of 2,048 rows of 8,192 values, summed alone
    and with the others, differ in bits; the first 16 do not
    """
    width = values.shape[1]
    while width > 1:
        half = (width + 1) // 2  # an odd one in the middle waits for a later round
        values[:, : width - half].add_(values[:, half:width])
        width = half
    return values[:, 0]


def tree_reduce_scatter(output: Tensor, input: Tensor, group: Group | None) -> None:
    """Sum all ranks' `input` along the tree, and write this rank's part of the sum into `output`.

    `input`: flat, with (group size) times as many elements as `output`; part i of the sum goes to rank i. A collective;
    blocks on the CPU. Moves as many bytes as a ring reduce-scatter.
    """
    parts = torch.empty_like(input)
    collectives.all_to_all(parts, input, group)
    output.copy_(tree_sum(parts.view(collectives.group_size(group), -1)))


def tree_all_reduce(flat: Tensor, group: Group | None) -> None:
    """Replace the one-dimensional tensor `flat` on every rank by the tree sum over the group. A collective."""
    size = collectives.group_size(group)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % size))
    part = torch.empty(len(padded) // size, dtype=flat.dtype, device=flat.device)
    tree_reduce_scatter(part, padded, group)
    collectives.all_gather(padded, part, group)
    flat.copy_(padded[: len(flat)])


class BinaryCounter:
    """Adds lists of tensors one by one along the tree, like a binary counter: level j holds the sum of 2^j leaves.

    After n leaves, as many partial sums are in memory as n has ones in binary.
    """

    def __init__(self) -> None:
        self._levels: dict[int, list[Tensor]] = {}

    def add(self, leaf: int, tensors: list[Tensor]) -> None:
        """Add the tensors of one leaf; leaves must come in the order 0, 1, 2, ...

        Later calls sum in place, so the counter owns the tensors from now on.
        """
        level = 0
        while leaf >> level & 1:
            torch._foreach_add_(tensors, self._levels.pop(level))
            level += 1
        self._levels[level] = tensors

    def pop(self) -> list[list[Tensor]]:
        """Return the partial sums, lowest level first, and clear the counter.

        Adding them to the last leaf in this order completes the tree.
        """
        levels = [self._levels[level] for level in sorted(self._levels)]
        self._levels = {}
        return levels
