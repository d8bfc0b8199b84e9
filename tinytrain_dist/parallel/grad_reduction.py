"""Turn the gradients and losses of many micro-batches on many ranks into one sum, and the norm of that sum.

There are two ways; `build_grad_reduction` chooses, and a step uses either through the protocol `GradReduction`:

* `NativeGradReduction` lets DDP and FSDP sum in whatever order is fastest.
* `DeterministicGradReduction` follows one binary tree over the micro-batches of the global batch, low bits of the index
  first, whatever rank holds which micro-batch. Floating-point addition is commutative but not associative, so equal
  trees mean equal bits.

Both sum over ranks and divide nothing: the loss is divided once, by the global number of tokens, before backward. Must
not know the model's architecture or the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.context import REPLICATE, SHARD, DistributedContext
from tinytrain_dist.distributed.dtensor import local_tensor, shard_rows
from tinytrain_dist.parallel.gradient_view import GradientView
from tinytrain_dist.parallel.tree_reduction import (
    BinaryCounter,
    DirectAllGather,
    TreeReduceScatter,
    tree_all_reduce,
    tree_sum,
)

BUCKET_BYTES = 25 * 1024**2  # as DDP's


class GradReduction(Protocol):
    """What a training step asks of the reduction, in the order of a step. Every rank makes every call.

    `params` and `layers`: see GradientView. `units`: the modules that FSDP shards.
    """

    params: list[nn.Parameter]
    layers: list[str]
    units: list[FSDPModule]

    def before_micro_step(self, micro_step: int) -> None:
        """Prepare for the backward of a micro-step, 0 .. accumulation_steps - 1."""

    def after_micro_step(self, micro_step: int) -> None:
        """Take over what that backward left in `.grad`."""

    def finish(self) -> None:
        """Complete the sums: from here `.grad` holds this rank's part of the gradient of the global batch."""

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of the whole gradient: float64 scalar, the same on every rank."""

    def layer_norms(self) -> Tensor:
        """Return the norms of gradient and weights by layer; see GradientView."""

    def losses(self, indices: Sequence[int], sums: Sequence[Tensor], num_micro_batches: int) -> Tensor:
        """Return the loss of every micro-batch on every rank; see GradientView."""


def build_grad_reduction(
    model: nn.Module, plan: BatchPlan, context: DistributedContext, *, deterministic: bool
) -> GradReduction:
    """Install a reduction in a model that parallelize.build_model returned, and return it."""
    if deterministic:
        return DeterministicGradReduction(model, plan, context)
    return NativeGradReduction(model, plan, context)


class NativeGradReduction:
    """Sums as the wrappers do it: overlapped with backward, in an order that depends on the mesh."""

    def __init__(self, model: nn.Module, plan: BatchPlan, context: DistributedContext) -> None:
        """`model`: as returned by parallelize.build_model."""
        self.model = model
        self.plan = plan
        self.context = context
        self.view = GradientView(model, plan, context)
        self.params = self.view.params
        self.layers = self.view.layers
        self.units = self.view.units
        self.scatter = TreeReduceScatter()  # used over gloo only
        sum_without_averaging(self.units)
        if collectives.uses_gloo():
            for unit in self.units:
                unit.set_custom_all_gather(DirectAllGather())
                unit.set_custom_reduce_scatter(self.scatter)
        if isinstance(model, DistributedDataParallel):
            group = context.group(REPLICATE)
            # a lambda, because DDP compares the annotations of a hook with its own types
            model.register_comm_hook(None, lambda _, bucket: collectives.all_reduce_async(bucket.buffer(), group))

    def before_micro_step(self, micro_step: int) -> None:
        """Tell the wrapper whether this backward is the last, so that nothing is reduced twice."""
        last = self.view.is_last(micro_step)
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last
        elif isinstance(self.model, FSDPModule):
            self.model.set_is_last_backward(last)
            self.model.set_requires_all_reduce(last)
            # A sum may come late only where nothing is added to it at once: there is no gradient of an earlier pass,
            # and replicas are not summed.
            first_pass_of_one_replica = micro_step == 0 and self.plan.replicate == 1
            self.scatter.late = collectives.uses_gloo() and first_pass_of_one_replica

    def after_micro_step(self, micro_step: int) -> None:
        """Wait for the last unit's sum, if it is late."""
        self.scatter.settle()

    def finish(self) -> None:
        """Do nothing: backward has completed the sums."""

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of the whole gradient: float64 scalar, the same on every rank.

        A collective of the shards of each replica. Waits for no device.
        """
        norms = torch._foreach_norm(self.view.local_grads())
        total = torch.stack(list(norms)).double().square().sum()
        return self.context.all_reduce_sum(total, SHARD) if self.plan.shard > 1 else total

    def layer_norms(self) -> Tensor:
        """Return the norms of gradient and weights by layer; see GradientView."""
        return self.view.layer_norms()

    def losses(self, indices: Sequence[int], sums: Sequence[Tensor], num_micro_batches: int) -> Tensor:
        """Return the loss of every micro-batch on every rank; see GradientView."""
        return self.view.losses(indices, sums, num_micro_batches)


class DeterministicGradReduction:
    """Sums that follow the tree, so that the gradient is the same to the last bit on any number of ranks.

    * DDP: a rank has neighbouring micro-batches. A binary counter adds them. In the last backward each bucket runs
      through the counter's carry, then through the tree over the ranks.
    * FSDP: the ranks of a replica have neighbouring micro-batches. A tree over them reduces every micro-step, the
      counter adds the micro-steps, and a tree adds the replicas at the end.
    """

    def __init__(self, model: nn.Module, plan: BatchPlan, context: DistributedContext) -> None:
        """`model`: as returned by parallelize.build_model."""
        self.model = model
        self.plan = plan
        self.context = context
        self.view = GradientView(model, plan, context)
        self.params = self.view.params
        self.layers = self.view.layers
        self.units = self.view.units
        self.scatter = TreeReduceScatter()
        self.counter = BinaryCounter()  # adds the micro-steps
        self.carry: list[dict[nn.Parameter, Tensor]] = []  # DDP: the counter's levels for the last backward
        self.exchanges: list[tuple[Any, Tensor, Tensor]] = []  # DDP: work, received parts and buffer of each bucket
        sum_without_averaging(self.units)
        for unit in self.units:
            unit.set_custom_reduce_scatter(self.scatter)
            if collectives.uses_gloo():
                unit.set_custom_all_gather(DirectAllGather())
        if isinstance(model, DistributedDataParallel):
            # a lambda, because DDP compares the annotations of a hook with its own types
            model.register_comm_hook(None, lambda _, bucket: self._exchange_bucket(bucket))

    def before_micro_step(self, micro_step: int) -> None:
        """Tell the wrapper whether this backward is the last; DDP's buckets then need the sums of those before it."""
        last = self.view.is_last(micro_step)
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last
            if last:
                self.carry = [dict(zip(self.params, level, strict=True)) for level in self.counter.pop()]
        elif isinstance(self.model, FSDPModule):
            # the counter reads .grad after each backward; FSDP waits for its own streams only on its "last" one
            self.model.set_is_last_backward(True)
            self.model.set_requires_all_reduce(last)
            # always allowed: gradients are moved out of .grad after each backward, and replicas are added later
            self.scatter.late = collectives.uses_gloo()

    def after_micro_step(self, micro_step: int) -> None:
        """Move the micro-batch's gradients into the counter, or after the last one the counter into the gradients."""
        self.scatter.settle()
        if not self.view.is_last(micro_step):
            self.counter.add(micro_step, self.view.local_grads())
            for param in self.params:
                param.grad = None
        elif not isinstance(self.model, DistributedDataParallel):  # DDP's buckets have taken the carry already
            for level in self.counter.pop():
                torch._foreach_add_(self.view.local_grads(), level)

    def finish(self) -> None:
        """Wait for the buckets in flight and sum them (DDP), or sum the replicas (HSDP)."""
        self._sum_exchanged_buckets()
        if self.units and self.plan.replicate > 1:
            self._sum_replicas()

    def squared_norm(self) -> Tensor:
        """Return the sum of squares of the whole gradient: float64 scalar, the same bits on any number of ranks.

        It is the sum of squared row norms: no sharding cuts a row. Each row is computed by one rank of a replica, its
        square is added to zeros over the shards (exact), and the vector of all rows is summed in one order everywhere.
        A collective of the shards of each replica. Waits for no device.
        """
        squares = torch.cat([part for param in self.params for part in self._row_squares(param)])  # float64 [all rows]
        if self.plan.shard > 1:
            self.context.all_reduce_sum(squares, SHARD)
        return squares.sum()

    def layer_norms(self) -> Tensor:
        """Return the norms of gradient and weights by layer; see GradientView."""
        return self.view.layer_norms()

    def losses(self, indices: Sequence[int], sums: Sequence[Tensor], num_micro_batches: int) -> Tensor:
        """Return the loss of every micro-batch on every rank; see GradientView."""
        return self.view.losses(indices, sums, num_micro_batches)

    def _row_squares(self, param: nn.Parameter) -> list[Tensor]:
        """Return the squared norms of a gradient's rows, float64 [rows] in pieces; rows of other ranks are zero."""
        assert param.grad is not None, "every parameter takes part in the loss"
        grad = local_tensor(param.grad)
        # vector_norm gives a row the same bits whatever rows lie beside it; einsum and bmm do not.
        # measured (2-core x86 VM, 2026-11-25): 10M weights, vector_norm 2 ms, sum(dtype=float64) 26 ms
        norms = torch.linalg.vector_norm(grad.flatten(1), dim=1) if grad.ndim > 1 else grad
        squares = norms.double().square()
        if self.plan.shard == 1:
            return [squares]
        rows = param.shape[0]
        start, stop = shard_rows(rows, self.plan.shard, self.context.shard)
        return [_zeros(squares, start), squares, _zeros(squares, rows - stop)]

    def _exchange_bucket(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """Add the carry, then send every rank its part of the bucket: DDP's hook. `finish` sums and returns the parts.

        The bucket goes back to DDP unsummed: gradients are views of it, so they hold what `finish` writes into it.
        """
        buffer = bucket.buffer()
        for level in self.carry:
            torch._foreach_add_(bucket.gradients(), [level[param] for param in bucket.parameters()])
        missing = -len(buffer) % self.plan.replicate
        padded = torch.nn.functional.pad(buffer, (0, missing)) if missing else buffer
        parts = torch.empty_like(padded)
        work = collectives.all_to_all(parts, padded, self.context.group(REPLICATE), wait=False)
        self.exchanges.append((work, parts, buffer))
        done: torch.futures.Future[Tensor] = torch.futures.Future()
        done.set_result(buffer)
        return done

    def _sum_exchanged_buckets(self) -> None:
        """Sum this rank's part of each bucket along the tree, gather the parts, and write them into the bucket."""
        # The carry is in the buckets by now, and the gathers need room.
        # measured (2-core x86 VM, 2026-11-25): 10 % of a small step's peak memory
        self.carry = []
        group = self.context.group(REPLICATE)
        gathers = []
        for work, parts, buffer in self.exchanges:
            work.wait()
            part = tree_sum(parts.view(self.plan.replicate, -1))
            whole = parts  # its content has been summed, so its memory can take the result
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


def sum_without_averaging(units: list[FSDPModule]) -> None:
    """Let FSDP sum gradients and divide by nothing: the loss is divided by the global count of tokens already."""
    for unit in units:
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def _zeros(like: Tensor, length: int) -> Tensor:
    return torch.zeros(length, dtype=like.dtype, device=like.device)


def _buckets(tensors: list[Tensor], max_bytes: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Return consecutive tensors in groups of `max_bytes` at most; a larger tensor is a group by itself."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups
