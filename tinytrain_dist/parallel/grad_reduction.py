"""Turn the gradients and losses of many micro-batches on many ranks into one sum, and the norm of that sum.

Must not know the model's architecture or the optimizer. There are two ways:

- `NativeGradReduction` lets DDP and FSDP sum in whatever order is fastest.
- `DeterministicGradReduction` follows one binary tree over the micro-batches of the global batch, low bits of the index
  first, whatever rank holds which micro-batch. Floating-point addition is commutative but not associative, so equal
  trees mean equal bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.context import REPLICATE, SHARD, DistributedContext
from tinytrain_dist.distributed.dtensor import local_tensor, shard_rows
from tinytrain_dist.parallel.tree_reduction import (
    BinaryCounter,
    DirectAllGather,
    TreeReduceScatter,
    tree_all_reduce,
    tree_sum,
)


class NativeGradReduction:
    """Sums as the wrappers do it: overlapped with backward, in an order that depends on the layout."""

    def __init__(self, model: nn.Module, plan: BatchPlan, context: DistributedContext) -> None:
        """`model`: as returned by parallel.build_model."""
        self.model, self.plan, self.context = model, plan, context
        self.params = [param for param in model.parameters() if param.requires_grad]
        layers = [layer_of(name) for name, param in model.named_parameters() if param.requires_grad]
        self.layers = list(dict.fromkeys(layers))
        rows = [[float(layer == mine) for mine in layers] for layer in self.layers]
        self._members = torch.tensor(rows, dtype=torch.float64, device=context.device)
        self.places: dict[tuple[int, ...], Tensor] = {}
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.scatter = TreeReduceScatter()
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)  # the loss is divided by the global count already
            unit.set_force_sum_reduction_for_comms(True)
            if collectives.uses_gloo():
                unit.set_custom_all_gather(DirectAllGather())
                unit.set_custom_reduce_scatter(self.scatter)
        self.install()

    def install(self) -> None:
        """Install the hooks in the wrapper."""
        if isinstance(self.model, DistributedDataParallel):
            group = self.context.group(REPLICATE)
            # a lambda: DDP compares a hook's annotations with its own types
            self.model.register_comm_hook(None, lambda _, bucket: collectives.all_reduce_async(bucket.buffer(), group))

    def before_micro_step(self, micro_step: int) -> None:
        """Say whether this backward is the last, so that nothing is reduced twice."""
        last = self._is_last(micro_step)
        if isinstance(self.model, DistributedDataParallel):
            self.model.require_backward_grad_sync = last
        elif isinstance(self.model, FSDPModule):
            self.model.set_is_last_backward(last)
            self.model.set_requires_all_reduce(last)
        # a sum may come late where nothing is added to it at once: no gradient of an earlier pass, no replicas' sum
        self.scatter.late = collectives.uses_gloo() and micro_step == 0 and self.plan.replicate == 1

    def after_micro_step(self, micro_step: int) -> None:
        """Take what backward left in `.grad`."""
        self.scatter.settle()

    def finish(self) -> None:
        """Complete the sums: from here `.grad` holds the gradient of the global batch."""

    def squared_norm(self) -> Tensor:
        """Sum of squares of the whole gradient, float64 scalar, the same on every rank."""
        norms = torch._foreach_norm(self._local_grads())
        total = torch.stack(list(norms)).double().square().sum()
        return self.context.all_reduce_sum(total, SHARD) if self.plan.shard > 1 else total

    def layer_norms(self) -> Tensor:
        """Norms of the whole gradient and of the weights by entry of `layers`: float64 [2 x layers], on every rank."""
        pairs = (
            [local_tensor(param.grad) for param in self.params if param.grad is not None],
            list(map(local_tensor, self.params)),
        )
        squares = torch.stack([torch.stack(list(torch._foreach_norm(t))).double().square() for t in pairs])
        sums = squares.detach() @ self._members.T
        return (self.context.all_reduce_sum(sums, SHARD) if self.plan.shard > 1 else sums).sqrt().flatten()

    def losses(self, indices: Sequence[int], sums: Sequence[Tensor], num_micro_batches: int) -> Tensor:
        """Return the loss of every micro-batch, float64 [num_micro_batches], on every rank.

        Each value is added to zeros only, which is exact: the same vector comes out on any number of ranks.
        """
        key = tuple(indices)
        if key not in self.places:  # made once: an index from the host would make every step wait for the device
            self.places[key] = torch.tensor(key, device=self.context.device)
        vector = torch.zeros(num_micro_batches, dtype=torch.float64, device=self.context.device)
        vector.index_copy_(0, self.places[key], torch.stack(list(sums)).double())
        return self.context.all_reduce_sum(vector) if self.plan.ranks > 1 else vector

    def _is_last(self, micro_step: int) -> bool:
        return micro_step == self.plan.accumulation_steps - 1

    def _local_grads(self) -> list[Tensor]:
        return [local_tensor(param.grad) for param in self.params if param.grad is not None]


class DeterministicGradReduction(NativeGradReduction):
    """Sums that follow the tree, so that the gradient is the same to the last bit on any number of ranks.

    DDP: a rank owns neighbouring micro-batches. A binary counter adds them, and in the last backward each bucket runs
    through its carry before the tree over the ranks. FSDP: the ranks of a replica own neighbours; every micro-step is
    reduced by a tree over them, the counter adds the micro-steps, and a tree adds the replicas at the end.
    """

    def install(self) -> None:
        """Put the tree in place of the wrapper's own sums."""
        self.counter = BinaryCounter()
        self.carry: list[dict[nn.Parameter, Tensor]] = []
        self.exchanges: list[tuple[Any, Tensor, Tensor]] = []
        if isinstance(self.model, DistributedDataParallel):
            self.model.register_comm_hook(None, lambda _, bucket: self._exchange_bucket(bucket))
        for unit in self.units:
            unit.set_custom_reduce_scatter(self.scatter)

    def before_micro_step(self, micro_step: int) -> None:
        """Say whether this backward is the last; DDP's buckets then need the sums of the micro-batches before it."""
        super().before_micro_step(micro_step)
        if isinstance(self.model, FSDPModule):
            # the counter reads .grad after each backward; only on its "last" one does FSDP wait for its own streams
            self.model.set_is_last_backward(True)
            self.scatter.late = collectives.uses_gloo()  # gradients are taken away after each, and replicas come later
        if isinstance(self.model, DistributedDataParallel) and self._is_last(micro_step):
            self.carry = [dict(zip(self.params, level, strict=True)) for level in self.counter.pop()]

    def after_micro_step(self, micro_step: int) -> None:
        """Move the micro-batch's gradients into the counter, or after the last one the counter into the gradients."""
        self.scatter.settle()
        if not self._is_last(micro_step):
            self.counter.add(micro_step, self._local_grads())
            for param in self.params:
                param.grad = None
        elif not isinstance(self.model, DistributedDataParallel):
            for level in self.counter.pop():
                torch._foreach_add_(self._local_grads(), level)

    def finish(self) -> None:
        """Wait for the buckets in flight and sum them (DDP), or sum the replicas (HSDP)."""
        group, gathers = self.context.group(REPLICATE), []
        self.carry = []  # it is in the buckets, and the gathers below need room (measured: 10 % of a small step's peak)
        for work, parts, buffer in self.exchanges:
            work.wait()
            part = tree_sum(parts.view(self.plan.replicate, -1))
            whole = parts  # its content is summed, so its memory can take the result
            gathers.append((collectives.all_gather(whole, part, group, wait=False), whole, buffer))
        for work, whole, buffer in gathers:
            work.wait()
            buffer.copy_(whole[: len(buffer)])
        self.exchanges = []
        if self.units and self.plan.replicate > 1:
            for bucket in _buckets(self._local_grads()):
                flat = torch.cat([grad.reshape(-1) for grad in bucket])
                tree_all_reduce(flat, group)
                pieces = flat.split([grad.numel() for grad in bucket])
                torch._foreach_copy_(bucket, [p.view_as(g) for p, g in zip(pieces, bucket, strict=True)])

    def squared_norm(self) -> Tensor:
        """Sum of squares of the whole gradient through the sums of its rows, which no sharding cuts.

        Each row's norm is taken by one rank, its square added to zeros over the shards (exact), and the float64 vector
        of all rows is summed in one order everywhere.
        """
        sums = []
        for param in self.params:
            assert param.grad is not None, "every parameter takes part in the loss"
            rows = param.shape[0]
            start, stop = shard_rows(rows, self.plan.shard, self.context.shard)
            grad = local_tensor(param.grad)
            # measured: vector_norm gives a row the same bits whatever rows lie beside it (einsum and bmm do not), and
            # at 10M weights takes 2 ms, where sum(dtype=float64) takes 26
            mine = (torch.linalg.vector_norm(grad.flatten(1), dim=1) if grad.ndim > 1 else grad).double().square()
            sums += [mine] if self.plan.shard == 1 else [_zeros(mine, start), mine, _zeros(mine, rows - stop)]
        vector = torch.cat(sums)
        if self.plan.shard > 1:
            self.context.all_reduce_sum(vector, SHARD)
        return vector.sum()

    def _exchange_bucket(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """DDP hook: carry, then send every rank its part of the bucket; `finish` sums the parts and puts them back.

        The bucket is handed back unsummed: gradients are views of it, so what `finish` writes is what they hold.
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


def layer_of(name: str) -> str:
    """Return the layer of a parameter: layers.0, layers.1, ..., and outside of them its module."""
    found = re.search(r"layers\.\d+", name)
    return found[0] if found else name.split(".")[-2]


def _zeros(like: Tensor, length: int) -> Tensor:
    return torch.zeros(length, dtype=like.dtype, device=like.device)


def _buckets(tensors: list[Tensor], most_bytes: int = 25 * 1024**2) -> list[list[Tensor]]:
    """Consecutive tensors in groups of about most_bytes."""
    groups: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > most_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    return groups
