"""Collectives over a process group: gathers, sums, broadcasts, and errors that all ranks raise together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tinytrain_dist.errors import TinytrainError

Group = dist.ProcessGroup
T = TypeVar("T")


def is_main_rank() -> bool:
    """Whether this is rank 0, or there are no ranks."""
    return get_rank() == 0


def raise_on_all_ranks(error: Exception | None, group: Group | None = None) -> None:
    """Raise the first failing rank's error on every rank, after each has said how its part went. A collective."""
    for found in all_gather_object(error, group):
        if found is not None:
            raise found


def run_on_all_ranks(action: Callable[[], T], group: Group | None = None) -> T:
    """Do it on every rank; where a file or a user makes it fail on any of them, raise that on all. A collective."""
    result: list[T] = []
    error: Exception | None = None
    try:
        result.append(action())
    except (TinytrainError, OSError) as caught:
        error = caught
    raise_on_all_ranks(error, group)
    return result[0]


def get_rank() -> int:
    """Return this process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_gather_object(value: Any, group: Group | None = None) -> list[Any]:
    """Everybody's value, by rank, on every rank; alone, just this one."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def new_background_group() -> Group | None:
    """Make a group of all ranks over the CPU, for work beside training: its messages do not mix with others."""
    # a save may take longer than torch's half an hour, and ends the run only where somebody waits for it
    return dist.new_group(backend="gloo", timeout=timedelta(days=30)) if dist.is_initialized() else None


def group_size(group: Group | None) -> int:
    """Return the number of ranks in a group."""
    return dist.get_world_size(group)


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Give every rank rank 0's values, in place."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)


def all_to_all(output: Tensor, input: Tensor, group: Group | None, wait: bool = True) -> Any:
    """Part i of `input` goes to rank i of the group, which puts it into part (my index) of its `output`.

    wait=False returns a handle with wait(); the tensors must stay alive until then. So for `all_gather`.
    """
    return dist.all_to_all_single(output, input, group=group, async_op=not wait)


def uses_gloo() -> bool:
    """Whether training's own messages go over gloo, whose ring collectives are slow (see `all_gather`)."""
    return dist.get_backend() == "gloo"


class PendingMessages(dist.Work):
    """Messages in flight, as one handle."""

    def __init__(self, works: list[Any]) -> None:
        super().__init__()
        self._works = works

    def wait(self, *_: Any) -> bool:
        """Until all have arrived and left."""
        return all([work.wait() for work in self._works])


def all_gather(output: Tensor, input: Tensor | None, group: Group | None, wait: bool = True) -> Any:
    """Everybody's `input`, by rank, into the parts of `output`; None, over gloo only: the own part is there already.

    Over gloo each rank sends its own to each other one: the same bytes as the ring of gloo's all-gather, which takes
    2.7 times as long (measured, two ranks: 67 ms for 40 MB, and 25).
    """
    if uses_gloo():
        me, parts = dist.get_rank(group), output.view(group_size(group), -1)
        others = [rank for rank in range(len(parts)) if rank != me]
        if input is not None:
            parts[me].copy_(input.view(-1))
        receiving = [dist.irecv(parts[rank], group=group, group_src=rank) for rank in others]
        work = PendingMessages([*receiving, *(dist.isend(parts[me], group=group, group_dst=rank) for rank in others)])
        return work if not wait else work.wait()
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # its name since torch 2.13
    return gather(output, input, group=group, async_op=not wait)


def all_reduce_async(tensor: Tensor, group: Group | None) -> torch.futures.Future[Tensor]:
    """Sum `tensor` over the group in place; the future holds it when that is done."""
    work: Any = dist.all_reduce(tensor, group=group, async_op=True)
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda _: tensor)
    return summed
