"""Owns the proof that replicas are equal: a fingerprint of the bits of each tensor, and whose differs from the others'.

Must not know what the tensors are for or when they are compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytrain_dist.distributed import DistributedContext, Group, gather_to_all
from tinytrain_dist.errors import ReplicasDiffer
from tinytrain_dist.optim import local


def check_replicas(tensors: Iterable[tuple[str, Tensor]], context: DistributedContext) -> None:
    """Prove that all replicas of each shard hold the same bits. A collective.

    Errors: ReplicasDiffer naming the first tensor that differs and the ranks and hosts on both sides.
    """
    named = dict(tensors)
    compare(list(named), fingerprints(named.values()).tolist(), context)


def fingerprints(tensors: Iterable[Tensor]) -> Tensor:
    """One number for the bits of each tensor's local part, int64 [n], on their device; nothing waits for it."""
    return torch.stack([_bit_sum(local(tensor)) for tensor in tensors])


def compare(
    names: Sequence[str], prints: Sequence[float], context: DistributedContext, group: Group | None = None
) -> None:
    """Errors: ReplicasDiffer on all ranks if fingerprints of replicas of one shard are not the same. A collective.

    Where one side has the majority, the others are named as wrong. Ranks exchange a digest, and the rest only in need.
    """
    digest = hashlib.blake2b(repr(list(prints)).encode(), digest_size=8).hexdigest()
    everyone = gather_to_all((context.shard, context.host, digest), group)
    odd, right, majority = _odd_ranks([(shard, found) for shard, _, found in everyone])
    if not odd:
        return
    details = gather_to_all(list(prints), group)
    differ = [name for name, a, b in zip(names, details[odd[0]], details[right], strict=True) if a != b]
    wrong = " and ".join(f"rank {rank} ({everyone[rank][1]})" for rank in odd)
    raise ReplicasDiffer(
        f"replicas differ: {differ[0]}{f' and {len(differ) - 1} more' if differ[1:] else ''} on {wrong} has other bits "
        f"than on rank {right} ({everyone[right][1]}){'' if majority else '; which of them is wrong is not known'}. "
        "This state is not saved; resume from the last checkpoint, and if it comes back look at that host's memory"
    )


def _odd_ranks(found: Sequence[tuple[int, str]]) -> tuple[list[int], int, bool]:
    """By rank (shard, digest) -> ranks unlike the majority of the first shard that differs, one of it, if there is one.

    Without a majority the lowest rank counts as right.
    """
    for shard in sorted({shard for shard, _ in found}):
        ranks = [rank for rank, (theirs, _) in enumerate(found) if theirs == shard]
        votes = Counter(found[rank][1] for rank in ranks)
        if len(votes) > 1:
            digest, count = votes.most_common(1)[0]
            majority = 2 * count > len(ranks)
            right = next(rank for rank in ranks if not majority or found[rank][1] == digest)
            return [rank for rank in ranks if found[rank][1] != found[right][1]], right, majority
    return [], 0, True


def _bit_sum(tensor: Tensor) -> Tensor:
    """The sum of the bits, weighted by position with odd numbers: no single flip is lost, and swapped values show.

    On a CPU as fast as memory is read (measured: 7 times faster than 64-bit products of all values): blocks are summed
    onto each other in 32 bits, and 64-bit products are taken of what is left when the sum has been folded.
    """
    flat = tensor.detach().reshape(-1).view(torch.uint8)
    bits = (F.pad(flat, (0, -len(flat) % 4)) if len(flat) % 4 else flat).view(torch.int32)
    block, least = (1 << 17, 1 << 12) if bits.device.type == "cpu" else (1 << 24, 1 << 24)  # a GPU's launches are dear
    sums = torch.zeros(min(block, len(bits)), dtype=torch.int32, device=bits.device)
    for values in bits.split(max(1, len(sums))):
        into = sums[: len(values)]
        torch.add(values, into, alpha=3, out=into)
    factor = 5
    while len(sums) > least:
        half = -(-len(sums) // 2)
        sums, rest = sums[:half], sums[half:]
        sums[: len(rest)].add_(rest, alpha=factor)
        factor += 2
    return (sums.long() * (2 * torch.arange(len(sums), device=sums.device) + 1)).sum()
