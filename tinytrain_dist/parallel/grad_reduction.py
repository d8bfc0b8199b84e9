"""Sum gradients and losses over all micro-batches on all ranks, and compute the norm of the summed gradient.

The protocol `GradReduction` has two implementations, and `build_grad_reduction` chooses one of them:

* `NativeGradReduction` lets DDP and FSDP sum in whatever order is fastest.
* `DeterministicGradReduction` sums along a fixed binary tree over the micro-batches of the global batch. It first adds
  micro-batches 0 and 1, 2 and 3, and so on, then the sums of neighbouring pairs. The tree does not depend on which rank
  computes which micro-batch. Floating-point addition is commutative but not associative, so equal trees mean equal
  bits. With context parallelism, the gradient of a micro-batch is itself a tree sum over the ranks that share it.

Neither divides the sums. Each micro-batch's loss is divided once, by the global number of tokens, before backward. Must
not know the model's architecture or the optimizer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.batch_plan import BatchPlan, BatchShare
from tinytrain_dist.distributed.context import CONTEXT, DATA, REPLICATE, SHARD, DistributedContext
from tinytrain_dist.distributed.dtensor import local_tensor, shard_rows
from tinytrain_dist.parallel.grad_view import GradientView
from tinytrain_dist.parallel.tree_reduction import (
    BinaryCounter,
    PendingSum,
    SumsInProgress,
    TreeExchange,
    halving_row_sums,
)
from tinytrain_dist.parallel.wrappers import is_fsdp_module

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

    from tinytrain_dist.parallel.fsdp_collectives import GlobalTreeReduceScatter

BUCKET_BYTES = 25 * 1024**2  # as in DDP
ROW_SUM_ELEMENTS = 1 << 24  # whose squares exist at once


class GradReduction(Protocol):
    """The methods that a training step calls, in this order. Every rank makes every call.

    `share`: what this rank computes in the step. The number of micro-steps may change from step to step, and one rank
    may have one more of them than another.

    `view`: what does not depend on the order of the sums, such as the norms by layer and the losses.
    """

    view: GradientView

    def before_micro_step(self, share: BatchShare, micro_step: int) -> None:
        """Prepare for the backward of one of the share's micro-steps."""

    def after_micro_step(self, share: BatchShare, micro_step: int) -> None:
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
        self.in_progress = SumsInProgress()
        _configure_units(self.view.units)
        if collectives.uses_gloo():
            _sum_along_tree(self.view.units, self.in_progress)
        if isinstance(model, DistributedDataParallel):
            group = context.group(REPLICATE)
            # a lambda, because DDP checks the annotations of a hook, and a lambda has none
            model.register_comm_hook(None, lambda _, bucket: collectives.all_reduce_async(bucket.buffer(), group))

    def before_micro_step(self, share: BatchShare, micro_step: int) -> None:
        """Tell DDP or FSDP whether this backward is the last, so that nothing is reduced twice."""
        last = share.is_last(micro_step)
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last
        elif is_fsdp_module(self.model):
            self.model.set_is_last_backward(last)
            self.model.set_requires_all_reduce(last)
            # FSDP uses a sum right away if it adds it to the gradient of an earlier micro-step, or sums over replicas.
            # In all other cases, the sum may be completed late.
            is_used_right_away = micro_step > 0 or self.context.weight_replicas > 1
            self.in_progress.late = collectives.uses_gloo() and not is_used_right_away

    def after_micro_step(self, share: BatchShare, micro_step: int) -> None:
        """Complete the last unit's sum, if it is still in progress."""
        self.in_progress.settle()

    def finish(self) -> None:
        """Do nothing: backward has completed the sums."""

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of the whole gradient: float64 scalar, the same on every rank.

        A collective of the ranks of each replica. Does not wait for the device.
        """
        norms = torch._foreach_norm(self.view.local_grads())
        total = torch.stack(list(norms)).double().square().sum()
        return self.context.all_reduce_sum(total, SHARD) if self.context.weight_shards > 1 else total


class DeterministicGradReduction:
    """Sums along the tree, so that the gradient is the same to the last bit on any number of ranks.

    * DDP: a rank computes consecutive micro-batches, and a BinaryCounter adds them. In the last backward, the counter's
      partial sums are added to each bucket as far as the tree adds them, and a TreeExchange sums over the ranks.
    * FSDP: the ranks of a replica compute consecutive micro-batches. In every micro-step, the owner of a shard receives
      the gradients of all ranks, and adds them to a BinaryCounter. At the end, a TreeExchange sums over the replicas.
    * Context parallelism: the ranks that share a micro-batch first sum its gradient. With DDP, they do this in every
      micro-step.
    """

    def __init__(self, model: nn.Module, plan: BatchPlan, context: DistributedContext) -> None:
        """`model`: as returned by parallelize.build_model."""
        self.model = model
        self.plan = plan
        self.context = context
        self.view = GradientView(model, plan, context)
        self.in_progress = SumsInProgress()
        self.scatters: list[GlobalTreeReduceScatter] = []  # FSDP: of each unit
        if context.weight_shards > 1:
            self.scatters = _sum_along_global_tree(self.view.units, self.in_progress, plan.cp)
        self.column_sums: TreeExchange | None = None  # DDP: sums the columns of a micro-batch over the ranks of cp
        self.replica_axis = REPLICATE
        if plan.cp > 1 and not self.scatters:
            self.column_sums = TreeExchange([range(i, i + 1) for i in range(plan.cp)], context.group(CONTEXT))
            self.replica_axis = DATA
        _configure_units(self.view.units)
        self.counter = BinaryCounter()  # without shards: adds the micro-steps
        # DDP, for the last backward: sums that are added to the last gradients, and sums that are sent beside them
        self.added_sums: list[dict[nn.Parameter, Tensor]] = []
        self.other_sums: list[dict[nn.Parameter, Tensor]] = []
        self.exchange: TreeExchange | None = None  # of the step that runs
        self.exchanges: list[tuple[PendingSum, Tensor]] = []  # DDP: the sum and the buffer of each bucket
        self._exchange_of_plan: dict[BatchPlan, TreeExchange] = {}
        if isinstance(model, DistributedDataParallel):
            # a lambda, because DDP checks the annotations of a hook, and a lambda has none
            model.register_comm_hook(None, lambda _, bucket: self._exchange_bucket(bucket))

    def before_micro_step(self, share: BatchShare, micro_step: int) -> None:
        """Tell DDP or FSDP whether this backward is the last; DDP's buckets then need the sums of the earlier ones."""
        last = share.is_last(micro_step)
        if last and self.plan.replicate > 1:
            self.exchange = self._exchange_for(share.plan)
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last
            if last:
                added = self.counter.pop_completed_by(share.replica_part(micro_step))
                self.added_sums, self.other_sums = map(self._by_parameter, (added, self.counter.pop_all()))
        elif is_fsdp_module(self.model):
            # FSDP waits for its own streams only in the "last" backward. `after_micro_step` changes .grad after every
            # backward, so each one is marked as the last.
            self.model.set_is_last_backward(True)
            self.model.set_requires_all_reduce(last)
            # FSDP never uses a sum right away: .grad is empty before each backward, and `finish` sums over replicas.
            self.in_progress.late = collectives.uses_gloo()
            for scatter in self.scatters:
                scatter.begin_micro_step(share.replica_part(micro_step), last)

    def after_micro_step(self, share: BatchShare, micro_step: int) -> None:
        """Move the gradients into the counter; after the last micro-step, add the counter's sums to the gradients."""
        self.in_progress.settle()
        leaf = share.replica_part(micro_step)
        if not share.is_last(micro_step):
            if not self.scatters:  # otherwise they have the sums, and .grad is undefined
                self._sum_columns(self.view.local_grads())
                self.counter.add(leaf, self.view.local_grads())
            for param in self.view.params:
                param.grad = None
        elif not self.scatters and not isinstance(self.model, DistributedDataParallel):
            for partial_sums in self.counter.pop_completed_by(leaf):
                torch._foreach_add_(self.view.local_grads(), partial_sums)

    def finish(self) -> None:
        """Wait for the buckets in flight and sum them (DDP), or sum the replicas (HSDP)."""
        self._sum_exchanged_buckets()
        units = [scatter.pop_sums() for scatter in self.scatters if scatter.output is not None]
        if self.scatters and self.plan.replicate > 1:
            self._sum_replicas(units)

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
        if self.context.weight_shards > 1:
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
        if self.context.weight_shards == 1:
            return [squares]
        rows = param.shape[0]
        start, stop = shard_rows(rows, self.context.weight_shards, self.context.shard)
        return [_zeros(squares, start), squares, _zeros(squares, rows - stop)]

    def _exchange_for(self, plan: BatchPlan) -> TreeExchange:
        """Return the exchange of the replicas' sums in a step with this plan."""
        if plan not in self._exchange_of_plan:
            leaves = [plan.micro_batches_of(replica) for replica in range(plan.replicate)]
            self._exchange_of_plan[plan] = TreeExchange(leaves, self.context.group(self.replica_axis))
        return self._exchange_of_plan[plan]

    def _by_parameter(self, sums: list[list[Tensor]]) -> list[dict[nn.Parameter, Tensor]]:
        return [dict(zip(self.view.params, tensors, strict=True)) for tensors in sums]

    def _sum_columns(self, grads: list[Tensor]) -> None:
        """Replace the gradients of a micro-batch on this rank's columns by those on all columns. A collective of cp."""
        if self.column_sums is None:
            return
        for bucket in _buckets(grads):
            total = self.column_sums.all_reduce([torch.cat([grad.flatten() for grad in bucket])])
            parts = total.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket, strict=True)])

    def _exchange_bucket(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Add partial sums to a bucket, then start to send every rank its part of the bucket. This is DDP's hook.

        `finish` waits for the parts, sums them and writes the result into the bucket. The hook returns the bucket to
        DDP before that. The gradients are views of the bucket, so they hold what `finish` writes.
        """
        buffer = bucket.buffer()
        params = bucket.parameters()
        self._sum_columns([buffer])
        for sum_of_param in self.added_sums:
            torch._foreach_add_(bucket.gradients(), [sum_of_param[param] for param in params])
        others = [torch.cat([sum_of_param[param].reshape(-1) for param in params]) for sum_of_param in self.other_sums]
        if self.exchange is not None:  # otherwise there is one data-parallel rank
            self.exchanges.append((self.exchange.start([*others, buffer]), buffer))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    def _sum_exchanged_buckets(self) -> None:
        """Sum this rank's part of each bucket along the tree, gather all parts, and write them into the bucket."""
        # The messages include the partial sums by now. Free these, because the gathers need memory.
        # measured (2-core x86 VM, 2026-11-25): this saves 10 % of a small step's peak memory
        self.added_sums, self.other_sums = [], []
        group = self.context.group(self.replica_axis)
        gathers = []
        for pending, buffer in self.exchanges:
            part = pending.complete()
            # the parts have been summed, so their memory can be reused for the result
            whole = pending.parts[: len(part) * self.plan.replicate]
            gathers.append((collectives.all_gather(whole, part, group, wait=False), whole, buffer))
        for work, whole, buffer in gathers:
            work.wait()
            buffer.copy_(whole[: len(buffer)])
        self.exchanges = []

    def _sum_replicas(self, units: list[list[Tensor]]) -> None:
        """Replace the gradients by their tree sum over the replicas. units: the sums of each unit, gradients last."""
        assert self.exchange is not None, "before_micro_step has run"
        for bucket in _buckets([sums[-1] for sums in units]):
            sums_of_bucket, units = units[: len(bucket)], units[len(bucket) :]
            total = self.exchange.all_reduce([torch.cat(sums) for sums in zip(*sums_of_bucket, strict=True)])
            torch._foreach_copy_(bucket, list(total.split([len(grads) for grads in bucket])))


def _configure_units(units: list[FSDPModule]) -> None:
    """Make FSDP sum gradients without dividing: the loss is already divided by the global number of tokens.

    Over gloo, weights are gathered by direct messages.
    """
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
        if collectives.uses_gloo():
            from tinytrain_dist.parallel.fsdp_collectives import DirectAllGather

            unit.set_custom_all_gather(DirectAllGather())


def _sum_along_tree(units: list[FSDPModule], in_progress: SumsInProgress) -> None:
    """Make FSDP sum the gradients of each micro-step along a tree over the ranks."""
    for unit in units:
        from tinytrain_dist.parallel.fsdp_collectives import TreeReduceScatter

        unit.set_custom_reduce_scatter(TreeReduceScatter(in_progress))


def _sum_along_global_tree(
    units: list[FSDPModule], in_progress: SumsInProgress, cp: int
) -> list[GlobalTreeReduceScatter]:
    """Make FSDP sum gradients along the tree over all micro-batches; return what does so, for each unit."""
    from tinytrain_dist.parallel.fsdp_collectives import GlobalTreeReduceScatter

    scatters = [GlobalTreeReduceScatter(in_progress, cp) for _ in units]
    for unit, scatter in zip(units, scatters, strict=True):
        unit.set_custom_reduce_scatter(scatter)
    return scatters


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
