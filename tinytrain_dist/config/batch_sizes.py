"""Decide into which sizes a batch can be divided. Must not know torch, process groups or other settings.

Checks and their messages share this rule, so a message offers only accepted values.
"""

from __future__ import annotations

import math

MAX_DIVISOR = 1_000_000  # no larger numbers are tried: a message must not take long


def divides(batch_size: int, micro_batch_size: int, ranks: int, reproducible: bool = False) -> bool:
    """Return whether each rank gets the same number of micro-batches.

    With `reproducible`, their total must also be a power of two.
    The gradients of a reproducible run are summed in a binary tree over all micro-batches, which needs the power of
    two. The number of ranks divides it and so is a power of two as well.
    """
    if batch_size % (micro_batch_size * ranks):
        return False
    return not reproducible or is_power_of_two(batch_size // micro_batch_size)


def micro_batch_sizes(batch_size: int, ranks: int, reproducible: bool = False) -> list[int]:
    """Return every micro_batch_size with which this batch can be divided among these ranks, smallest first."""
    return [size for size in divisors(batch_size) if divides(batch_size, size, ranks, reproducible)]


def rank_counts(batch_size: int, micro_batch_size: int | None, reproducible: bool = False) -> list[int]:
    """Return every number of ranks among which this batch can be divided, smallest first.

    micro_batch_size: None if each rank computes its whole part of the batch in one pass.
    """
    if micro_batch_size is None:
        return divisors(batch_size)
    counts = divisors(batch_size // micro_batch_size)
    return [ranks for ranks in counts if divides(batch_size, micro_batch_size, ranks, reproducible)]


def nearest_batch_sizes(batch_size: int, micro_batch_size: int, ranks: int, reproducible: bool = False) -> list[int]:
    """Return the next smaller and the next larger batch_size that can be divided; fewer if there are none."""
    step = micro_batch_size * ranks
    below = batch_size // step * step
    sizes = [below, below + step]
    if reproducible:
        exponent = max(ranks, batch_size // micro_batch_size, 1).bit_length() - 1
        sizes = [micro_batch_size << exponent, micro_batch_size << exponent + 1]
    return [size for size in sizes if size >= 1 and divides(size, micro_batch_size, ranks, reproducible)]


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
