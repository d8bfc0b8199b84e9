"""Wrap any module for DDP or FSDP2, and recover the original module and parameter names from a wrapper."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.dtensor import is_dtensor
from tinytrain_dist.distributed.process_end import keep_group
from tinytrain_dist.utils.parameter_names import original_name as original_name

if TYPE_CHECKING:  # importing FSDP takes as long as half of torch, so only what shards a model does it
    from torch.distributed.fsdp import FSDPModule


def apply_ddp(model: nn.Module, mesh: DeviceMesh | None = None) -> DistributedDataParallel:
    """Wrap any module for DDP over `mesh`, which has one axis (None: all ranks). A collective.

    All ranks get rank 0's weights. Gradients are averaged, as is usual with DDP. Errors: ValueError for a mesh with
    several axes.
    """
    if mesh is not None and mesh.ndim != 1:
        raise ValueError(f"apply_ddp: needs a mesh with one axis, got {mesh.ndim} axes; pass mesh['dp_replicate']")
    wrapped = DistributedDataParallel(
        model, process_group=mesh.get_group() if mesh is not None else None, gradient_as_bucket_view=True
    )
    keep_group(wrapped, wrapped.process_group)
    return wrapped


def apply_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Shard any module with FSDP2 over `mesh`, in place, and return it. A collective.

    * `mesh`: one axis (each rank is a shard), or two axes for HSDP (axis 0 numbers replicas, axis 1 their shards).
    * `param_dtype`: dtype in which forward and backward compute (None: float32). Weights and gradients stay float32.
    * `reduce_dtype`: dtype in which gradients are summed.

    Every element of the outermost ModuleLists becomes a unit, and the rest of the model is one more unit. Without a
    ModuleList, the model is a single unit. All ranks first get rank 0's weights, which FSDP2 itself does not ensure.
    Gradients are averaged, as is usual with FSDP.
    Errors: ValueError for a mesh of more than two axes, or for parameters that are not float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if mesh.ndim > 2:
        raise ValueError(f"apply_fsdp: needs a mesh with one or two axes, got {mesh.ndim} axes; pass a part of it")
    not_float32 = [name for name, param in model.named_parameters() if param.dtype != torch.float32]
    if not_float32:
        raise ValueError(
            f"apply_fsdp: master weights must be float32, but {not_float32[0]} is not; call model.float() first"
        )
    model.to(mesh.device_type)
    collectives.broadcast_tensors([tensor.data for tensor in (*model.parameters(), *model.buffers())])
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    if param_dtype is not None:
        # FSDP casts parameters but not buffers. Without autocast, a float32 buffer times bf16 weights is an error.
        original_forward = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(mesh.device_type, dtype=param_dtype):
                return original_forward(*args, **kwargs)

        model.forward = forward
    for unit in [*outermost_blocks(model), model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    return model


def is_fsdp_module(module: object) -> TypeGuard[FSDPModule]:
    """Return whether FSDP2 shards a module; does not import FSDP, because without that import it shards none."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return kind is not None and isinstance(module, kind)


def outermost_blocks(module: nn.Module) -> list[nn.Module]:
    """Return the elements of the outermost ModuleLists, in order."""
    blocks: list[nn.Module] = []
    for child in module.children():
        blocks += list(child) if isinstance(child, nn.ModuleList) else outermost_blocks(child)
    return blocks


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside DDP or torch.compile. All code that needs the inner model calls this."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    return model


def modules_without_collectives(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose forward runs no collective, except for that of context parallelism.

    With FSDP these are the blocks, whose weights are gathered before their forward begins; otherwise the whole model.
    Ranks that share sequences wait for each other in attention, so one slow rank makes its group slow.
    """
    inner = unwrap(model)
    is_sharded: bool = is_fsdp_module(inner)
    return outermost_blocks(inner) if is_sharded else [inner]


def gather_full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter and buffer whole, on the CPU, under its original name. A collective.

    Every rank receives the whole model. If it does not fit in the memory of one rank, save it with save_checkpoint.
    """
    state = unwrap(model).state_dict()
    return {
        original_name(name): (value.full_tensor() if is_dtensor(value) else value).detach().cpu().clone()
        for name, value in state.items()
    }
