"""Read what every gradient reduction needs from a model: parameters, local gradients, layers, losses.

Must not know in which order gradients are summed; see `grad_reduction` for that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tinytrain_dist.distributed.batch_plan import BatchPlan
from tinytrain_dist.distributed.context import SHARD, DistributedContext
from tinytrain_dist.distributed.dtensor import local_tensor
from tinytrain_dist.parallel.wrappers import is_fsdp_module

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


class GradientView:
    """The parameters of a wrapped model, with their gradients on this rank, their norms by layer, and the losses.

    * `params`: the parameters that need a gradient, in the order of the model.
    * `layers`: the names of their layers, in the same order, without duplicates.
    * `layer_sizes`: how many parameters each layer has over all ranks.
    * `units`: the modules that FSDP shards, outermost first; empty without FSDP.
    """

    def __init__(self, model: nn.Module, plan: BatchPlan, context: DistributedContext) -> None:
        self.plan = plan
        self.context = context
        self.params = [param for param in model.parameters() if param.requires_grad]
        self.units: list[FSDPModule] = [module for module in model.modules() if is_fsdp_module(module)]
        names = [name for name, param in model.named_parameters() if param.requires_grad]
        layer_of_param = [layer_of(name) for name in names]
        self.layers = list(dict.fromkeys(layer_of_param))
        self.layer_sizes = dict.fromkeys(self.layers, 0)
        for param, layer in zip(self.params, layer_of_param, strict=True):
            self.layer_sizes[layer] += param.numel()
        # float64 [layers x params]: 1 where the parameter belongs to the layer, else 0
        rows = [[float(layer == own_layer) for own_layer in layer_of_param] for layer in self.layers]
        self._is_param_in_layer = torch.tensor(rows, dtype=torch.float64, device=context.device)
        self._device_indices: dict[tuple[int, ...], Tensor] = {}  # see `losses`

    def local_grads(self) -> list[Tensor]:
        """Return this rank's part of every gradient, sharing its memory; parameters without one are left out."""
        return [local_tensor(param.grad) for param in self.params if param.grad is not None]

    def layer_norms(self) -> Tensor:
        """Return the gradient's norm in each layer, then the weights' norm in each layer: float64 [2 x layers].

        The result is the same on every rank. A collective of the ranks of each replica. Does not wait for the device.
        """
        grad_norms = torch.stack(list(torch._foreach_norm(self.local_grads()))).double()
        weight_norms = torch.stack(list(torch._foreach_norm([local_tensor(param) for param in self.params]))).double()
        # [2 x params]: squared norms of this rank's rows
        squares = torch.stack([grad_norms, weight_norms]).square()
        # [2 x layers]: sums over the parameters of each layer
        sums = squares.detach() @ self._is_param_in_layer.T
        if self.context.weight_shards > 1:
            self.context.all_reduce_sum(sums, SHARD)
        return sums.sqrt().flatten()

    def losses(self, indices: Sequence[int], sums: Sequence[Tensor], num_micro_batches: int) -> Tensor:
        """Return the loss of every micro-batch, float64 [num_micro_batches], on every rank.

        `indices`: the micro-batches of this rank. `sums`: their losses, as scalars on the device; with context
        parallelism those of this rank's columns. A collective of all ranks; does not wait for the device. Each value is
        added only to zeros, which is exact, and the columns of a micro-batch are then summed in order. So the vector is
        the same on any number of data-parallel ranks.
        """
        cp = self.plan.cp
        *_, cp_index = self.context.data_coordinates
        key = tuple(index * cp + cp_index for index in indices)
        if key not in self._device_indices:
            # cached, because copying an index from the host makes a step wait for the device
            self._device_indices[key] = torch.tensor(key, device=self.context.device)
        vector = torch.zeros(num_micro_batches * cp, dtype=torch.float64, device=self.context.device)
        vector.index_copy_(0, self._device_indices[key], torch.stack(list(sums)).double())
        if self.plan.world_size > 1:
            self.context.all_reduce_sum(vector)
        return vector if cp == 1 else vector.view(-1, cp).sum(dim=1)


def layer_of(name: str) -> str:
    """Return the layer of a parameter: layers.0, layers.1, ..., or the name of its module if it is in no block."""
    block = re.search(r"layers\.\d+", name)
    return block[0] if block else name.split(".")[-2]
