"""Send bytes between ranks, each to the ranks that need them. Must not know what the bytes are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from tinytrain_dist.distributed.collectives import Group

MESSAGE_BYTES = 1 << 26


def exchange_bytes(
    sent: Sequence[tuple[int, Tensor]], received: Sequence[tuple[int, Tensor]], group: Group | None, tag: int = 0
) -> None:
    """Send and receive flat uint8 tensors on the CPU; blocks until all have arrived.

    sent, received: (other rank, tensor). For each pair of ranks, both sides list tensors of the same sizes in the same
    order, with the same `tag`. Ranks that exchange nothing need not call it.
    """
    works: list[Any] = []
    for source, tensor in received:
        works += [dist.irecv(part, src=source, group=group, tag=tag) for part in _parts(tensor)]
    for target, tensor in sent:
        works += [dist.isend(part, dst=target, group=group, tag=tag) for part in _parts(tensor)]
    for work in works:
        work.wait()


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    return tensor.split(MESSAGE_BYTES) if tensor.numel() else ()
