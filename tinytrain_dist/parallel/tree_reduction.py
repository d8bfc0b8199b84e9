"""Sum along one fixed binary tree, so that the result does not depend on which rank holds which part.

Floating-point addition is commutative but not associative, so equal trees mean equal bits. The leaves of the tree are
the micro-batches of a step.

A node of the tree is the sum of a block of leaves: a range whose length is a power of two and divides its start. A
range of leaves of any start and length consists of a few blocks (`blocks_in`). So whatever range of micro-batches a
rank computes, it can sum those blocks, and the ranks that receive them complete the same tree (`TreeExchange`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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


def blocks_in(leaves: range) -> list[range]:
    """Return the fewest blocks that together are a range of leaves, in order: at most 2 log2(length)."""
    blocks = []
    start = leaves.start
    while start < leaves.stop:
        length = start & -start or 1 << leaves.stop.bit_length()  # the largest power of two that divides the start
        while start + length > leaves.stop:
            length //= 2
        blocks.append(range(start, start + length))
        start += length
    return blocks


class BinaryCounter:
    """Adds lists of tensors along the tree, as a binary counter does: two sums that form a block are added at once.

    Blocks must come in the order of their leaves. If the first one begins at leaf 0, as many partial sums are in memory
    after n leaves as n has ones in binary. Otherwise there may be up to twice as many.
    """

    def __init__(self) -> None:
        self._sums: list[tuple[range, list[Tensor]]] = []  # in the order of leaves

    def add(self, block: range, tensors: list[Tensor]) -> None:
        """Add the sums of a block. Later calls sum in place, so the counter owns the tensors from now on."""
        while self._completes(block):
            left, left_sums = self._sums.pop()
            torch._foreach_add_(tensors, left_sums)
            block = range(left.start, block.stop)
        self._sums.append((block, tensors))

    def pop_completed_by(self, block: range) -> list[list[Tensor]]:
        """Return the sums that `add` would add to this block, in this order, and forget them."""
        sums = []
        while self._completes(block):
            left, left_sums = self._sums.pop()
            sums.append(left_sums)
            block = range(left.start, block.stop)
        return sums

    def pop_last(self) -> list[Tensor]:
        """Return the last sums, and forget them."""
        return self._sums.pop()[1]

    def pop_all(self) -> list[list[Tensor]]:
        """Return the sums of all blocks, in the order of leaves, and clear the counter."""
        sums = [tensors for _, tensors in self._sums]
        self._sums = []
        return sums

    def _completes(self, block: range) -> bool:
        """Return whether a block and the last one are the two halves of a larger block."""
        if not self._sums:
            return False
        last = self._sums[-1][0]
        return last.stop == block.start and len(last) == len(block) and last.start % (2 * len(last)) == 0


def add_parts(counter: BinaryCounter, leaves: range, parts: Tensor) -> None:
    """Add the parts of consecutive leaves to a counter: [number of leaves, n]. Keeps no reference to `parts`."""
    for block in blocks_in(leaves):
        summed = tree_sum(parts[block.start - leaves.start : block.stop - leaves.start])
        counter.add(block, [summed.clone() if len(block) == 1 else summed])


@dataclass
class PendingSum:
    """A sum over ranks in progress: parts on their way to this rank."""

    exchange: TreeExchange
    work: Any
    parts: Tensor
    sent: Tensor  # must live until it has been sent

    def complete(self) -> Tensor:
        """Wait for the parts, and return this rank's part of the sum."""
        if self.work is not None:
            self.work.wait()
        return self.exchange.sum_parts(self.parts)


class TreeExchange:
    """Sums flat tensors over the ranks of a group along the tree. Each rank holds the sums of some blocks of leaves.

    Each rank receives its part of all sums, and completes the tree for this part. If the leaves are divided evenly and
    their number is a power of two, a rank has one sum, and as many bytes are sent as by a ring reduce-scatter.
    """

    def __init__(self, leaves_of_ranks: Sequence[range], group: Group | None) -> None:
        """leaves_of_ranks: the leaves whose sums each rank of the group holds, in order. All together are one block."""
        self.group = group
        self.blocks = [blocks_in(leaves) for leaves in leaves_of_ranks]
        self.num_ranks = len(self.blocks)
        self.is_even = len({tuple(map(len, blocks)) for blocks in self.blocks}) == 1 and len(self.blocks[0]) == 1

    def padding(self, length: int) -> int:
        """Return how many elements a tensor of this length lacks to have one equal part for each rank."""
        return -length % self.num_ranks

    def start(self, sums: list[Tensor], wait: bool = False) -> PendingSum:
        """Start to send every rank its parts of this rank's sums: flat tensors of equal length, by block. A collective.

        Blocks if `wait`.
        """
        padding = self.padding(len(sums[0]))
        padded = [torch.nn.functional.pad(tensor, (0, padding)) if padding else tensor for tensor in sums]
        if self.is_even:
            (sent,) = padded
            parts = torch.empty_like(sent)
            return PendingSum(self, collectives.all_to_all(parts, sent, self.group, wait), parts, sent)
        # part of each rank, block, elements
        sent = torch.stack(padded).view(len(sums), self.num_ranks, -1).transpose(0, 1).flatten()
        length = len(padded[0]) // self.num_ranks
        received_sizes = [len(blocks) * length for blocks in self.blocks]
        parts = sent.new_empty(sum(received_sizes))
        sent_sizes = [len(sums) * length] * self.num_ranks
        work = collectives.all_to_all(
            parts, sent, self.group, wait, received_sizes=received_sizes, sent_sizes=sent_sizes
        )
        return PendingSum(self, work, parts, sent)

    def sum_parts(self, parts: Tensor) -> Tensor:
        """Return the sum of the received parts. Overwrites them."""
        if self.is_even:
            return tree_sum(parts.view(self.num_ranks, -1))
        counter = BinaryCounter()
        blocks = [block for blocks in self.blocks for block in blocks]
        for block, part in zip(blocks, parts.view(len(blocks), -1), strict=True):
            counter.add(block, [part])
        (total,) = counter.pop_last()
        return total.clone()  # the memory of the parts may then be reused

    def all_reduce(self, sums: list[Tensor]) -> Tensor:
        """Return the sum over all ranks on every rank. A collective; blocks on the CPU."""
        pending = self.start(sums, wait=True)
        part = pending.complete()
        whole = pending.parts[: len(part) * self.num_ranks]
        collectives.all_gather(whole, part, self.group)
        return whole[: len(sums[0])]


class SumsInProgress:
    """The sum that FSDP's units have begun but not completed, at most one at a time.

    `late`: whether to complete a sum only when the next one begins, or in `settle`, while backward continues.
    """

    def __init__(self) -> None:
        self.late = False
        self._complete: Callable[[], None] | None = None

    def begin(self, complete: Callable[[], None]) -> None:
        """Note a sum that `complete` waits for and writes; complete it now unless `late`."""
        self._complete = complete
        if not self.late:
            self.settle()

    def settle(self) -> None:
        """Complete the sum in progress, if there is one."""
        complete, self._complete = self._complete, None
        if complete is not None:
            complete()
