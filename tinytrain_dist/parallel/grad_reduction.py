"""Sum gradients and losses over all micro-batches on all ranks, and compute the norm of the summed gradient.

The protocol `GradReduction` has two implementations, and `build_grad_reduction` chooses one of them:

* `NativeGradReduction` lets DDP and FSDP sum in whatever order is fastest.
* `DeterministicGradReduction` sums along a fixed binary tree over the micro-batches of the global batch. It first adds
  micro-batches 0 and 1, 2 and 3, and so on, then the sums of neighbouring pairs. The tree does not depend on which rank
  computes which micro-batch. Floating-point addition is commutative but not associative, so equal trees mean equal
  bits.

Neither divides the sums. Each micro-batch's loss is divided once, by the global number of tokens, before backward. Must
not know the model's architecture or the optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.context import REPLICATE, SHARD, DistributedContext
from tinytrain_dist.distributed.dtensor import local_tensor, shard_rows
from tinytrain_dist.parallel.grad_view import GradientView
from tinytrain_dist.parallel.tree_reduction import (
    BinaryCounter,
    halving_row_sums,
    tree_all_reduce,
    tree_sum,
)
from tinytrain_dist.parallel.wrappers import is_fsdp_module

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from tinytrain_dist.parallel.fsdp_collectives import TreeReduceScatter

BUCKET_BYTES = 25 * 1024**2  # as in DDP
ROW_SUM_ELEMENTS = 1 << 24  # whose squares exist at once


class GradReduction(Protocol):
    """The methods that a training step calls, in this order. Every rank makes every call.

    `last`: whether the micro-step is the last one of its step. Their number may change from step to step.

    `view`: what does not depend on the order of the sums, such as the norms by layer and the losses.
    """

    view: GradientView

    def before_micro_step(self, micro_step: int, last: bool) -> None:
        """Prepare for the backward of a micro-step, 0 .. accumulation_steps - 1."""

    def after_micro_step(self, micro_step: int, last: bool) -> None:
        """Process the gradients that this backward left in `.grad`."""

    def finish(self) -> None:
        """Complete the sums. Afterwards `.grad` holds this rank's part of the gradient of the global batch."""

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of the whole gradient: float64 scalar, the same on every rank."""


def build_grad_reduction(
    model: nn.Module, plan: BatchPlan, context: DistributedContext, *, deterministic: bool
) -> GradReduction:
    """Return a reduction whose hooks are installed in `model`, as returned by parallelize.build_model."""
    if deterministic:
        return DeterministicGradReduction(model, plan, context)
    return NativeGradReduction(model, plan, context)


class NativeGradReduction:
    """Sums with DDP's and FSDP's own methods: overlapped with backward, in an order that depends on the mesh."""

    def __init__(self, model: nn.Module, plan: BatchPlan, context: DistributedContext) -> None:
        """`model`: as returned by parallelize.build_model."""
        self.model = model
        self.plan = plan
        self.context = context
        self.view = GradientView(model, plan, context)
        self.scatter = _configure_units(self.view.units, along_tree=collectives.uses_gloo())
        if isinstance(model, DistributedDataParallel):
            group = context.group(REPLICATE)
            # a lambda, because DDP checks the annotations of a hook, and a lambda has none
            model.register_comm_hook(None, lambda _, bucket: collectives.all_reduce_async(bucket.buffer(), group))

    def before_micro_step(self, micro_step: int, last: bool) -> None:
        """Tell DDP or FSDP whether this backward is the last, so that nothing is reduced twice."""
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last
        elif is_fsdp_module(self.model):
            self.model.set_is_last_backward(last)
            self.model.set_requires_all_reduce(last)
            # FSDP uses a sum right away if it adds it to the gradient of an earlier micro-step, or sums over replicas.
            # In all other cases, the sum may be completed late.
            is_used_right_away = micro_step > 0 or self.plan.replicate > 1
            if self.scatter is not None:
                self.scatter.late = not is_used_right_away

    def after_micro_step(self, micro_step: int, last: bool) -> None:
        """Complete the last unit's sum, if it is still in progress."""
        if self.scatter is not None:
            self.scatter.settle()

    def finish(self) -> None:
        """Do nothing: backward has completed the sums."""

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of the whole gradient: float64 scalar, the same on every rank.

        A collective of the ranks of each replica. Does not wait for the device.
        """
        norms = torch._foreach_norm(self.view.local_grads())
        total = torch.stack(list(norms)).double().square().sum()
        return self.context.all_reduce_sum(total, SHARD) if self.plan.shard > 1 else total


class DeterministicGradReduction:
    """Sums along the tree, so that the gradient is the same to the last bit on any number of ranks.

    * DDP: a rank computes consecutive micro-batches, and a BinaryCounter adds them. In the last backward, the counter's
      partial sums are added to each bucket, and then a tree sums the bucket over the ranks.
    * FSDP: the ranks of a replica compute consecutive micro-batches. In every micro-step, a tree sums over these ranks.
      A BinaryCounter adds the micro-steps. At the end, a tree sums over the replicas.
    """

    def __init__(self, model: nn.Module, plan: BatchPlan, context: DistributedContext) -> None:
        """`model`: as returned by parallelize.build_model."""
        self.model = model
        self.plan = plan
        self.context = context
        self.view = GradientView(model, plan, context)
        self.scatter = _configure_units(self.view.units, along_tree=True)
        self.counter = BinaryCounter()  # adds the micro-steps
        self.partial_sums: list[dict[nn.Parameter, Tensor]] = []  # DDP: the counter's levels, for the last backward
        self.exchanges: list[tuple[Any, Tensor, Tensor]] = []  # DDP: work, received parts and buffer of each bucket
        if isinstance(model, DistributedDataParallel):
            # a lambda, because DDP checks the annotations of a hook, and a lambda has none
            model.register_comm_hook(None, lambda _, bucket: self._exchange_bucket(bucket))

    def before_micro_step(self, micro_step: int, last: bool) -> None:
        """Tell DDP or FSDP whether this backward is the last; DDP's buckets then need the sums of the earlier ones."""
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last
            if last:
                self.partial_sums = [dict(zip(self.view.params, level, strict=True)) for level in self.counter.pop()]
        elif is_fsdp_module(self.model):
            # FSDP waits for its own streams only in the "last" backward. The counter reads .grad after every backward,
            # so each one is marked as the last.
            self.model.set_is_last_backward(True)
            self.model.set_requires_all_reduce(last)
            # FSDP never uses a sum right away: .grad is empty before each backward, and `finish` sums over replicas.
            assert self.scatter is not None, "made for FSDP"
            self.scatter.late = collectives.uses_gloo()

    def after_micro_step(self, micro_step: int, last: bool) -> None:
        """Move the gradients into the counter; after the last micro-step, add the counter's sums to the gradients."""
        if self.scatter is not None:
            self.scatter.settle()
        if not last:
            self.counter.add(micro_step, self.view.local_grads())
            for param in self.view.params:
                param.grad = None
        elif not isinstance(self.model, DistributedDataParallel):  # DDP's buckets already include them
            for partial_sums in self.counter.pop():
                torch._foreach_add_(self.view.local_grads(), partial_sums)

    def finish(self) -> None:
        """Wait for the buckets in flight and sum them (DDP), or sum the replicas (HSDP)."""
        self._sum_exchanged_buckets()
        if self.view.units and self.plan.replicate > 1:
            self._sum_replicas()

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of the whole gradient: float64 scalar, the same bits on any number of ranks.

        It is the sum of the squared norms of rows, because sharding never splits a row. In each replica, one rank
        computes a row's squared norm. The sum over shards adds only zeros to it, which is exact. Then every rank sums
        the vector of all rows in the same order.
        A collective of the ranks of each replica. Does not wait for the device.
        """
        parts: list[Tensor] = []
        for param in self.view.params:
            parts += self._row_squares(param)
        squares = torch.cat(parts)  # float64 [rows of all parameters]
        if self.plan.shard > 1:
            self.context.all_reduce_sum(squares, SHARD)
        return squares.sum()

    def _row_squares(self, param: nn.Parameter) -> list[Tensor]:
        """Return the squared norm of each row of a gradient, as tensors to concatenate: float64 [rows].

        Rows of other ranks are zero.
        """
        assert param.grad is not None, "every parameter takes part in the loss"
        grad = local_tensor(param.grad)
        # The bits that vector_norm returns for a row do not depend on the other rows; those of einsum and bmm do.
        # measured (2-core x86 VM, 2026-11-25): 10M weights, vector_norm 2 ms, sum(dtype=float64) 26 ms
        # On a GPU, those of vector_norm do as well, so the rows are summed by `halving_row_sums` there.
        if grad.ndim == 1:
            squares = grad.double().square()
        elif grad.is_cuda:
            # in blocks, because the squares of a whole embedding would need as much memory as its gradient
            blocks = grad.flatten(1).split(max(1, ROW_SUM_ELEMENTS // grad.flatten(1).shape[1]))
            squares = torch.cat([halving_row_sums(block.square()) for block in blocks]).double()
        else:
            squares = torch.linalg.vector_norm(grad.flatten(1), dim=1).double().square()
        if self.plan.shard == 1:
            return [squares]
        rows = param.shape[0]
        start, stop = shard_rows(rows, self.plan.shard, self.context.shard)
        return [_zeros(squares, start), squares, _zeros(squares, rows - stop)]

    def _exchange_bucket(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Add the partial sums to a bucket, then start to send every rank its part of the bucket. This is DDP's hook.

        `finish` waits for the parts, sums them and writes the result into the bucket. The hook returns the bucket to
        DDP before that. The gradients are views of the bucket, so they hold what `finish` writes.
        """
        buffer = bucket.buffer()
        for sum_of_param in self.partial_sums:
            torch._foreach_add_(bucket.gradients(), [sum_of_param[param] for param in bucket.parameters()])
        padding = -len(buffer) % self.plan.replicate
        padded = torch.nn.functional.pad(buffer, (0, padding)) if padding else buffer
        parts = torch.empty_like(padded)
        work = collectives.all_to_all(parts, padded, self.context.group(REPLICATE), wait=False)
        self.exchanges.append((work, parts, buffer))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    def _sum_exchanged_buckets(self) -> None:
        """Sum this rank's part of each bucket along the tree, gather all parts, and write them into the bucket."""
        # The buckets include the partial sums by now. Free these, because the gathers need memory.
        # measured (2-core x86 VM, 2026-11-25): this saves 10 % of a small step's peak memory
        self.partial_sums = []
        group = self.context.group(REPLICATE)
        gathers = []
        for work, parts, buffer in self.exchanges:
            work.wait()
            part = tree_sum(parts.view(self.plan.replicate, -1))
            whole = parts  # the parts have been summed, so their memory can be reused for the result
            gathers.append((collectives.all_gather(whole, part, group, wait=False), whole, buffer))
        for work, whole, buffer in gathers:
            work.wait()
            buffer.copy_(whole[: len(buffer)])
        self.exchanges = []

    def _sum_replicas(self) -> None:
        """Replace the gradients by their tree sum over the replicas."""
        group = self.context.group(REPLICATE)
        for bucket in _buckets(self.view.local_grads()):
            flat = torch.cat([grad.reshape(-1) for grad in bucket])
            tree_all_reduce(flat, group)
            sums = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(sums, bucket, strict=True)])


def _configure_units(units: list[FSDPModule], *, along_tree: bool) -> TreeReduceScatter | None:
    """Make FSDP sum gradients without dividing: the loss is already divided by the global number of tokens.

    Over gloo, weights are gathered by direct messages. `along_tree`: whether to sum along the tree. Returns what does
    so; None if FSDP's own collective sums, or without FSDP.
    """
    if not units:
        return None
    from tinytrain_dist.parallel.fsdp_collectives import DirectAllGather, TreeReduceScatter

    scatter = TreeReduceScatter() if along_tree else None
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if scatter is not None:
            unit.set_custom_reduce_scatter(scatter)
        if collectives.uses_gloo():
            unit.set_custom_all_gather(DirectAllGather())
    return scatter


def _zeros(like: Tensor, length: int) -> Tensor:
    return torch.zeros(length, dtype=like.dtype, device=like.device)


def _buckets(tensors: list[Tensor], max_bytes: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Return consecutive tensors in groups of `max_bytes` at most; a larger tensor is a group of its own."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups
