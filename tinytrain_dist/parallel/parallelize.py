"""Build the model and distribute it over ranks: context parallelism, activation checkpointing, compile, DDP / FSDP2.

The order matters. Context parallelism changes what a block computes, so it comes first. Activation checkpointing comes
next, so that the recomputation is compiled too. Offload of activations comes after compile, because it is not part of
what is compiled. DDP and FSDP come last, so that their hooks run around whole blocks. Must not know the optimizer or
the training loop.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.sections import BF16_PRECISIONS
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import REPLICATE, SHARD, DistributedContext
from tinytrain_dist.distributed.process_end import keep_group
from tinytrain_dist.distributed.torch_internals import (
    replicate_without_compiler,
    separate_reduce_scatters,
    unshard_asynchronously,
)
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.parallel.activation_checkpointing import apply_activation_checkpointing
from tinytrain_dist.parallel.activation_offload import apply_activation_offload
from tinytrain_dist.parallel.compile import apply_compile
from tinytrain_dist.parallel.context_parallel import apply_context_parallel


def build_model(config: TrainingConfig, context: DistributedContext, *, draw: bool = True) -> nn.Module:
    """Return a TransformerLM with its initial weights, wrapped for the context's mesh. A collective.

    The model is first built on the meta device, where it takes no memory, and then gets its weights. They are the same
    on any mesh. With FSDP, one unit (such as a block) gets its weights at a time, so no rank ever holds more than its
    shards and one whole unit. draw=False leaves the weights undefined, for simulations.
    """
    assert context.parallel_dims is not None, "call with_mesh first"
    with torch.device("meta"):
        model = TransformerLM(config)
    if context.parallel_dims.cp > 1:
        apply_context_parallel(model, context)
    for block in model.model.layers:
        apply_activation_checkpointing(block, config.activation_checkpointing)
    if config.compile:
        apply_compile(model, on_cuda=context.device.type == "cuda")
    if config.activation_offload:
        apply_activation_offload(list(model.model.layers), context.device)
    if context.parallel_dims.mode not in ("none", "ddp"):
        return shard_with_fsdp(model, config, context, draw=draw)
    _materialize(model, model, context.device, draw=draw)
    if context.weight_replicas == 1:
        return model  # there is nothing to sum, and DDP would only cost time
    return replicate_with_ddp(model, context, compiled=bool(config.compile))


def replicate_with_ddp(
    model: nn.Module, context: DistributedContext, *, compiled: bool = True
) -> DistributedDataParallel:
    """Wrap a model for DDP over all replicas of the weights. The model must have its weights already.

    compiled: whether torch.compile may be applied to parts of it, now or later.
    """
    wrap = DistributedDataParallel if compiled else replicate_without_compiler
    wrapped = wrap(
        model,
        process_group=context.group(REPLICATE),
        device_ids=[context.device] if context.device.type == "cuda" else None,
        bucket_cap_mb=bucket_megabytes(context, context.device.type),
        gradient_as_bucket_view=True,  # no second copy of the gradients; DeterministicGradReduction relies on it
        init_sync=False,  # weights are equal by construction, and replica_check.check_replicas verifies it
    )
    keep_group(wrapped, wrapped.process_group)
    return wrapped


def bucket_megabytes(context: DistributedContext, device_type: str) -> int | None:
    """Return the size of DDP's buckets on such devices; None for DDP's own choice of 25 MB.

    Between nodes, a message of 25 MB takes about as long to begin as to send, so larger buckets are faster. On a CPU
    the size stays, because over gloo the bits of a sum depend on its place in the bucket.
    """
    across_nodes = context.world_size > context.local_world_size
    return 100 if device_type == "cuda" and across_nodes else None


def wants_separate_reduce_scatters(config: TrainingConfig, context: DistributedContext, device_type: str) -> bool:
    """Return whether FSDP's reduce-scatters on such devices get a communicator of their own.

    It takes memory, and it only helps if a replica spans nodes: then the all-gathers of the next blocks do not queue
    behind slow reduce-scatters. The sums of reproducible mode are no reduce-scatters.
    """
    assert context.parallel_dims is not None, "call with_mesh first"
    spans_nodes = context.weight_shards > context.local_world_size
    return device_type == "cuda" and spans_nodes and not config.reproducible


def shard_with_fsdp(model: Any, config: TrainingConfig, context: DistributedContext, *, draw: bool) -> nn.Module:
    """Give a TransformerLM on the meta device its weights, and shard it with FSDP2, one unit at a time.

    FSDP uses the axis of the shards; HSDP uses both axes of the mesh. The units are the embedding, the head (with tied
    weights, both together are one unit), each block, and the rest of the model.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    blocks: list[nn.Module] = list(model.model.layers)
    embed: Any = model.model.embed_tokens
    head: nn.Module = model.lm_head
    embed_and_head: list[list[nn.Module]] = [[embed, head]] if config.tie_embeddings else [[embed], [head]]
    units: list[list[nn.Module]] = [*embed_and_head, *([block] for block in blocks), [model]]
    mesh = _fsdp_mesh(config, context)
    for unit in units:
        for module in unit:
            _materialize(model, module, context.device, draw=draw)
        model.tie_weights()
        # The weights of embedding and head are gathered in float32, because their gradients are sums over many tokens.
        in_bf16 = config.precision in BF16_PRECISIONS and unit[0] not in (embed, head)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if in_bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        # Backward uses the head and the last block right after forward, so their weights stay gathered in between.
        stays_gathered = head in unit or unit[0] in (blocks if config.reshard_after_forward is False else blocks[-1:])
        fully_shard(
            unit if len(unit) > 1 else unit[0],
            mesh=mesh,
            mp_policy=policy,
            reshard_after_forward=False if stays_gathered else None,
        )
    if not config.tie_embeddings:
        embed.set_unshard_in_backward(False)  # the gradient of a look-up does not depend on the weights
    if collectives.uses_gloo():
        _prefetch_weights([model, embed, *blocks, head])
    if wants_separate_reduce_scatters(config, context, context.device.type):
        separate_reduce_scatters(model, context.timeout)
    return model  # type: ignore[no-any-return]


def _fsdp_mesh(config: TrainingConfig, context: DistributedContext) -> DeviceMesh:
    """Return the mesh that FSDP sums over: one axis for FSDP, two for HSDP.

    With reproducible = true, grad_reduction.py sums over the replicas itself, so FSDP gets a mesh of one replica only.
    """
    assert context.mesh is not None, "call with_mesh first"
    assert context.parallel_dims is not None, "call with_mesh first"
    one_axis = context.parallel_dims.mode == "fsdp" or config.reproducible
    return context.mesh[SHARD] if one_axis else context.mesh


def _prefetch_weights(units: list[Any]) -> None:
    """Gather each unit's weights while the unit before it computes. On a GPU, FSDP's streams do this already."""
    for unit, following in itertools.pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
    for unit in units:
        unshard_asynchronously(unit)


def _materialize(model: TransformerLM, module: nn.Module, device: torch.device, *, draw: bool) -> None:
    """Create on `device` the parameters of `module` that are still on the meta device, with their initial values.

    `module` is a part of `model`, which computes each initial value from the parameter's name. With draw=False, values
    are undefined.
    """
    names = {param: name for name, param in model.named_parameters()}
    for owner in module.modules():
        for key, param in list(owner.named_parameters(recurse=False)):
            if param.device.type == "meta":
                value = model.initial_weight(names[param], param.shape) if draw else torch.empty(param.shape)
                setattr(owner, key, nn.Parameter(value.to(device)))
    model.tie_weights()
