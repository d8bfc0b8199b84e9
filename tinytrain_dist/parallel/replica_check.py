"""Check that replicas hold the same bits, by comparing a fingerprint of each tensor, and name the ranks that differ.

Must not know what the tensors are for, or when they are compared.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from blake3 import blake3
from torch import Tensor

from tinytrain_dist.distributed.collectives import Group, all_gather_object
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.dtensor import local_tensor, tensor_bytes
from tinytrain_dist.distributed.shard_transfer import TensorShard
from tinytrain_dist.errors import ReplicaMismatchError


def check_replicas(tensors: Iterable[tuple[str, Tensor]], context: DistributedContext) -> None:
    """Check that all replicas of each shard hold the same bits. A collective; blocks until every rank has called it.

    Errors: ReplicaMismatchError naming the first tensor that differs, and the ranks and hosts on both sides.
    """
    named = dict(tensors)
    compare_fingerprints(list(named), fingerprints(named.values()).tolist(), context)


def fingerprints(tensors: Iterable[Tensor]) -> Tensor:
    """Return a fingerprint of each tensor's local part: int64 [n], on the device of the first. Does not wait for it.

    A CPU and a GPU compute different numbers, so compare only fingerprints from the same kind of device.
    """
    numbers = [_fingerprint(local_tensor(tensor)) for tensor in tensors]
    if not numbers:
        return torch.empty(0, dtype=torch.int64)
    return torch.stack([number.to(numbers[0].device, non_blocking=True) for number in numbers])


class ReplicaComparison:
    """A comparison of replicas for one save. It begins when the save begins, and is finished in the save's thread.

    The fingerprints of rows that a rank copies are computed in the thread, so that training does not wait for them.
    Rows that a rank does not copy are fingerprinted at once, while other ranks copy.
    """

    def __init__(self, shards: Iterable[TensorShard], beside: bool, context: DistributedContext) -> None:
        """Compute the fingerprints that cannot be computed later. On a GPU, these are all of them.

        `beside`: whether training continues during the save, and so changes rows that are not copied.
        """
        self.context = context
        self.needed = context.weight_replicas > 1
        early_shards = []
        if self.needed:
            early_shards = [
                shard for shard in shards if shard.local_rows.is_cuda or (beside and not shard.rows_to_save.numel())
            ]
        self._early_names = [shard.name for shard in early_shards]
        self._early_fingerprints = fingerprints(shard.local_rows for shard in early_shards)

    def finish(self, shards: Iterable[TensorShard], group: Group | None) -> None:
        """Compute the remaining fingerprints, and compare all. `shards`: all shards, as they will be written.

        A collective; blocks until every rank of `group` has called it. Errors: ReplicaMismatchError.
        """
        if not self.needed:
            return
        by_name = dict(zip(self._early_names, self._early_fingerprints.tolist(), strict=True))
        rows_of_name = {
            shard.name: shard.rows_to_save if shard.rows_to_save.numel() else shard.local_rows for shard in shards
        }
        late_names = [name for name in rows_of_name if name not in by_name]
        late_fingerprints = fingerprints(rows_of_name[name] for name in late_names).tolist()
        by_name |= dict(zip(late_names, late_fingerprints, strict=True))
        names = list(rows_of_name)
        compare_fingerprints(names, [by_name[name] for name in names], self.context, group)


def compare_fingerprints(
    names: Sequence[str], prints: Sequence[float], context: DistributedContext, group: Group | None = None
) -> None:
    """Compare the fingerprints of the tensors `names` between the replicas of each shard.

    Ranks exchange one digest of all fingerprints, and the fingerprints themselves only if digests differ. A collective;
    blocks until every rank of `group` has called it.
    Errors: ReplicaMismatchError on all ranks. If most replicas agree, the other ranks are named as wrong.
    """
    own_digest = hashlib.blake2b(repr(list(prints)).encode(), digest_size=8).hexdigest()
    by_rank = all_gather_object((context.shard, context.host, own_digest), group)
    wrong_ranks, right_rank, has_majority = _deviating_ranks([(shard, digest) for shard, _, digest in by_rank])
    if not wrong_ranks:
        return
    prints_by_rank = all_gather_object(list(prints), group)
    pairs = zip(names, prints_by_rank[wrong_ranks[0]], prints_by_rank[right_rank], strict=True)
    differing = [name for name, wrong, right in pairs if wrong != right]
    more = f" and {len(differing) - 1} more tensor(s)" if len(differing) > 1 else ""
    wrong_text = " and ".join(f"rank {rank} ({by_rank[rank][1]})" for rank in wrong_ranks)
    doubt = "" if has_majority else "; it is not known which of them is wrong"
    raise ReplicaMismatchError(
        f"replicas differ: {differing[0]}{more} on {wrong_text}: the bits differ from those on rank {right_rank} "
        f"({by_rank[right_rank][1]}){doubt}. This state is not saved; resume from the last checkpoint, and if the "
        "error returns, check that host's memory"
    )


def _deviating_ranks(digests: Sequence[tuple[int, str]]) -> tuple[list[int], int, bool]:
    """Return the ranks that deviate, a rank that is right, and whether the ranks that are right are the majority.

    `digests`: (shard, digest) by rank. Only the first shard whose replicas differ counts. If there is no majority, the
    lowest rank with this shard counts as right. Returns ([], 0, True) if there is no difference.
    """
    for shard in sorted({shard for shard, _ in digests}):
        ranks = [rank for rank, (shard_of_rank, _) in enumerate(digests) if shard_of_rank == shard]
        votes = Counter(digests[rank][1] for rank in ranks)
        if len(votes) > 1:
            majority_digest, count = votes.most_common(1)[0]
            has_majority = 2 * count > len(ranks)
            right_digest = majority_digest if has_majority else digests[ranks[0]][1]
            right_rank = next(rank for rank in ranks if digests[rank][1] == right_digest)
            wrong_ranks = [rank for rank in ranks if digests[rank][1] != right_digest]
            return wrong_ranks, right_rank, has_majority
    return [], 0, True


def _fingerprint(tensor: Tensor) -> Tensor:
    """Return the fingerprint of a plain tensor, int64 scalar on its device: BLAKE3 on a CPU, else a weighted sum."""
    if tensor.device.type != "cpu":
        return weighted_bit_sum(tensor)
    digest = blake3(tensor_bytes(tensor.detach().contiguous())).digest(length=8)
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


def weighted_bit_sum(tensor: Tensor, block_size: int = 1 << 22) -> Tensor:
    """Return the sum of a tensor's values as integers, weighted by position with odd numbers.

    A single flipped bit, or two swapped values, always changes the sum. For a GPU; on a CPU, BLAKE3 takes a fifth of
    the time. Computed in small blocks, because the products take twice the memory of the values, and a GPU in training
    has little to spare.
    """
    bits = tensor.detach().reshape(-1)
    bits = bits.view(torch.int32 if tensor.element_size() == 4 else torch.int8)
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    weights = 2 * torch.arange(min(block_size, len(bits)), device=bits.device) + 1
    for block in bits.split(block_size):
        total = 3 * total + (block * weights[: len(block)]).sum()
    return total
