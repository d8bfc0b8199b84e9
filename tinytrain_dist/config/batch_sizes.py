"""Decide into which sizes a batch can be divided. Must not know torch, process groups or other settings.

Checks and their messages share this rule, so a message offers only accepted values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

MAX_DIVISOR = 1_000_000  # no larger numbers are tried: a message must not take long
MAX_EXCESS = 1 / 16  # of the largest share of a rank, if a batch cannot be divided evenly


def divides(batch_size: int, micro_batch_size: int, ranks: int, reproducible: bool = False) -> bool:
    """Return whether a batch consists of whole micro-batches, at least one for each rank.

    With `reproducible`, their number must also be a power of two, because their gradients are summed in a binary tree.
    Ranks may have different numbers of micro-batches.
    """
    count, rest = divmod(batch_size, micro_batch_size)
    if rest or count < ranks:
        return False
    return not reproducible or is_power_of_two(count)


def micro_batch_sizes(batch_size: int, ranks: int, reproducible: bool = False) -> list[int]:
    """Return every micro_batch_size with which this batch can be divided among these ranks, smallest first."""
    return [size for size in divisors(batch_size) if divides(batch_size, size, ranks, reproducible)]


def even_micro_batch_sizes(sizes: Sequence[int], batch_size: int, ranks: int) -> list[int]:
    """Return those of the sizes with which the largest share of a rank is hardly larger than it must be.

    If some sizes divide the batch evenly among the ranks, these are all of them. Otherwise they are those with which
    the largest share exceeds the smallest possible one by at most MAX_EXCESS.
    """
    if batch_size % ranks == 0:
        return [size for size in sizes if batch_size // ranks % size == 0]
    shares = {size: largest_share(batch_size, size, ranks) for size in sizes}
    limit = min(shares.values(), default=0) * (1 + MAX_EXCESS)
    return [size for size in sizes if shares[size] <= limit]


def largest_share(batch_size: int, micro_batch_size: int, ranks: int) -> int:
    """Return the sequences of the rank that has most of them."""
    return -(-batch_size // micro_batch_size // ranks) * micro_batch_size


def nearest_batch_sizes(batch_size: int, micro_batch_size: int, ranks: int, reproducible: bool = False) -> list[int]:
    """Return the next smaller and the next larger batch_size that can be divided; fewer if there are none."""
    count = batch_size // micro_batch_size
    counts = [max(count, ranks), max(count + 1, ranks)]
    if reproducible:
        smallest = 1 << (ranks - 1).bit_length()
        power = 1 << max(count, 1).bit_length() - 1
        counts = [max(power, smallest), max(2 * power, smallest)]
    return [micro_batch_size * count for count in dict.fromkeys(counts)]


def is_power_of_two(number: int) -> bool:
    """Return whether a whole number, at least 1, is a power of two."""
    return number & (number - 1) == 0


def divisors(number: int) -> list[int]:
    """Return the divisors of a number, smallest first. Of a huge number, some are left out."""
    small = [size for size in range(1, min(math.isqrt(number), MAX_DIVISOR) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def nearest_multiples(number: int, step: int) -> list[int]:
    """Return the next smaller and the next larger multiple of `step`, or only the larger one if the other is 0."""
    below = number // step * step
    return [size for size in (below, below + step) if size >= 1]
