"""Exchange Python values, errors and tensors between ranks.

A function whose docstring says "A collective" must be called by every rank of its group, in the same order. `group` is
a process group (None: all ranks). Must not know meshes, models or files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from tinytrain_dist.distributed import process_end  # noqa: F401 - registers what the end of a process needs
from tinytrain_dist.distributed.torch_internals import all_gather_into, traceable_all_to_all
from tinytrain_dist.errors import TinytrainError

Group = dist.ProcessGroup
T = TypeVar("T")


# ---------------------------------------------------------------- ranks and groups


def get_rank() -> int:
    """Return this process's rank; 0 without a process group. Any rank may call it; never blocks."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_rank() -> bool:
    """Return whether this is rank 0 or there is no process group. Any rank may call it; never blocks."""
    return get_rank() == 0


def group_size(group: Group | None) -> int:
    """Return the number of ranks in a group. Any rank may call it; never blocks."""
    return dist.get_world_size(group)


def uses_gloo() -> bool:
    """Return whether training sends its tensors over gloo, whose ring collectives are slow (see `all_gather`)."""
    return dist.get_backend() == "gloo"


def new_background_group() -> Group | None:
    """Return a new gloo group of all ranks, for work that runs while training continues. A collective.

    Its messages are separate from those of training. Returns None without a process group.
    """
    if not dist.is_initialized():
        return None
    # A save may take longer than torch's default timeout of half an hour, and must not end a run in which no rank waits
    # for it.
    group: Group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return group


# ---------------------------------------------------------------- Python values and errors


def all_gather_object(value: Any, group: Group | None = None) -> list[Any]:
    """Return the values of all ranks, by rank; without a process group, a list with `value` alone.

    A collective; blocks until every rank has called it. Values are pickled.
    """
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def raise_on_all_ranks(error: Exception | None, group: Group | None = None) -> None:
    """Raise the same error on every rank: that of the lowest rank that has one. Do nothing if no rank has one.

    A collective; blocks until every rank has called it with its own error or None.
    """
    for rank_error in all_gather_object(error, group):
        if rank_error is not None:
            raise rank_error


def run_on_all_ranks(action: Callable[[], T], group: Group | None = None) -> T:
    """Run `action` on every rank and return its result; if it fails on any rank, raise that error on all.

    Only TinytrainError and OSError are shared in this way: they report mistakes of users and problems with files. A
    collective; blocks until every rank has run it.
    """
    result: list[T] = []
    error: Exception | None = None
    try:
        result.append(action())
    except (TinytrainError, OSError) as caught:
        error = caught
    raise_on_all_ranks(error, group)
    return result[0]


# ---------------------------------------------------------------- tensors


class PendingMessages(dist.Work):
    """One handle for several messages in flight."""

    def __init__(self, works: list[Any]) -> None:
        super().__init__()
        self._works = works

    def wait(self, *_: Any) -> bool:
        """Block until every message has been sent or received."""
        return all([work.wait() for work in self._works])


def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Overwrite each tensor with rank 0's, in place. Shapes are equal on all ranks. A collective; blocks."""
    for tensor in tensors:
        dist.broadcast(tensor, src=0)


def broadcast(tensor: Tensor, source: int, group: Group | None, wait: bool = True) -> Any:
    """Overwrite `tensor` with that of rank `source` of the group, in place.

    A collective, with tensors of the same shape on every rank. Blocks if `wait`; else returns a handle with `wait()`,
    and the tensor must stay alive until then.
    """
    return dist.broadcast(tensor, group=group, group_src=source, async_op=not wait)


def all_to_all(
    output: Tensor,
    input: Tensor,
    group: Group | None,
    wait: bool = True,
    *,
    received_sizes: list[int] | None = None,
    sent_sizes: list[int] | None = None,
) -> Any:
    """Send part i of `input` to rank i of the group, and write what rank i sends to this rank into part i of `output`.

    Dim 0 of each tensor is split into one part for each rank: equal parts, or parts of `received_sizes` (output) and
    `sent_sizes` (input).
    A collective. Blocks if `wait`; else returns a handle with `wait()`, and both tensors must stay alive until then.
    """
    return dist.all_to_all_single(output, input, received_sizes, sent_sizes, group=group, async_op=not wait)


def exchange_parts(parts: Tensor, group_name: str) -> Tensor:
    """Send part i of dim 0 to rank i of a group, and return what the ranks send to this rank: the same shape.

    Dim 0 has one part for each rank. `group_name`: ProcessGroup.group_name, because torch.compile needs a constant; it
    keeps the exchange in one graph. A collective, also in backward, where gradients return. Blocks on a CPU.
    """
    received: Tensor = _ExchangedParts.apply(parts, group_name)  # type: ignore[no-untyped-call]
    return received


class _ExchangedParts(torch.autograd.Function):
    """The all-to-all of `exchange_parts`. It is its own transpose, so backward is the same exchange."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group_name: str) -> Tensor:
        ctx.group_name = group_name
        return traceable_all_to_all(parts, group_name)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return traceable_all_to_all(grad_outputs[0], ctx.group_name), None


def all_gather(output: Tensor, input: Tensor | None, group: Group | None, wait: bool = True) -> Any:
    """Copy every rank's `input` into its part of `output`, in the order of ranks.

    * `output`: contiguous, with (group size) times as many elements as `input`.
    * `input`: over gloo it may be None, if this rank's part of `output` already holds its values.

    A collective. Blocks if `wait`; else returns a handle with `wait()`, and both tensors must stay alive until then.
    """
    if not uses_gloo():
        return all_gather_into(output, input, group, async_op=not wait)
    # Each rank sends its part directly to every other rank. Gloo's own all-gather is a ring, which moves as many bytes
    # but takes longer.
    # measured (2-core x86 VM, 2026-11-25): 40 MB on two ranks, ring 67 ms, direct 25 ms
    own_index = dist.get_rank(group)
    parts = output.view(group_size(group), -1)
    others = [index for index in range(len(parts)) if index != own_index]
    if input is not None:
        parts[own_index].copy_(input.view(-1))
    receives = [dist.irecv(parts[index], group=group, group_src=index) for index in others]
    sends = [dist.isend(parts[own_index], group=group, group_dst=index) for index in others]
    work = PendingMessages([*receives, *sends])
    return work.wait() if wait else work


def all_reduce_async(tensor: Tensor, group: Group | None) -> torch.futures.Future[Tensor]:
    """Start summing `tensor` over the group, in place; return a future whose value is `tensor` once it holds the sum.

    A collective, with tensors of the same shape on every rank; does not block.
    """
    work: Any = dist.all_reduce(tensor, group=group, async_op=True)
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda _: tensor)
    return summed
