"""Spread a model over ranks: activation checkpointing, then compile, then DDP / FSDP2 / HSDP, in that order.

Must not know the optimizer or the loop. Recomputation wraps what is compiled. Sharding comes last, so that its hooks
see whole blocks.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch._dynamo.utils
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed import collectives
from tinytrain_dist.distributed.context import REPLICATE, SHARD, DistributedContext
from tinytrain_dist.model.transformer import TransformerLM
from tinytrain_dist.parallel.activation_checkpointing import apply_activation_checkpointing


def build_model(config: TrainingConfig, context: DistributedContext, *, draw: bool = True) -> nn.Module:
    """Build a TransformerLM with its initial weights, wrapped for the context's mesh.

    No rank ever holds more than its shards and one unit (a block, or the embedding): the model is described on the
    meta device, and each unit gets its weights, the same on any mesh, just before it is sharded. draw=False leaves
    their values undefined, for a simulation.
    """
    assert context.parallel_dims is not None, "with_mesh comes first"
    with torch.device("meta"):
        model = TransformerLM(config)
    blocks: list[nn.Module] = list(model.model.layers)
    if config.compile:
        torch._dynamo.config.optimize_ddp = False  # would cut blocks in two, which costs 4 % of a step
        model.lm_head.loss_piece = torch.compile(model.lm_head.loss_piece, dynamic=False)
    for block in blocks:
        apply_activation_checkpointing(block, config.activation_checkpointing)
        if config.compile:
            block.compile()
    if context.parallel_dims.mode in ("none", "ddp"):
        _materialize(model, model, context.device, draw)
        # alone, the wrapper would only cost: nothing is to be summed
        return _wrap_ddp(model, context) if context.parallel_dims.replicate > 1 else model
    embed: Any = model.model.embed_tokens
    head = model.lm_head
    outer: list[list[nn.Module]] = [[embed, head]] if config.tie_embeddings else [[embed], [head]]
    units: list[list[nn.Module]] = [*outer, *([block] for block in blocks), [model]]
    mesh = context.mesh
    assert mesh is not None
    # deterministic sums add the replicas themselves (see grad_reduction.py), so there FSDP sees one replica only
    mesh = mesh[SHARD] if context.parallel_dims.mode == "fsdp" or config.reproducible else mesh
    for unit in units:
        for module in unit:
            _materialize(model, module, context.device, draw)
        model.tie_weights()
        # embedding and head are gathered in float32: the sum of their gradients over tokens needs it
        narrow = config.precision == "bf16" and unit[0] not in (embed, head)
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if narrow else None, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
        # their backward comes at once, so these weights stay gathered until then
        keep = False if unit in ([head], [blocks[-1]]) else None
        fully_shard(unit if len(unit) > 1 else unit[0], mesh=mesh, mp_policy=policy, reshard_after_forward=keep)
    if not config.tie_embeddings:
        embed.set_unshard_in_backward(False)  # a look-up's gradient needs no weights
    if collectives.uses_gloo():
        _prefetch_weights([model, embed, *blocks, head])
    return model


def _prefetch_weights(units: list[Any]) -> None:
    """Let each unit's weights be gathered while the unit before it computes; on a GPU, FSDP's streams do it."""
    for unit, following in itertools.pairwise(units):
        unit.set_modules_to_forward_prefetch([following])
    for unit in units:
        unit._set_unshard_async_op(True)


def _materialize(model: TransformerLM, module: nn.Module, device: torch.device, draw: bool) -> None:
    """Give the parameters of `module` that are still on the meta device their place and their initial value."""
    names = {param: name for name, param in model.named_parameters()}
    for owner in module.modules():
        for key, param in list(owner.named_parameters(recurse=False)):
            if param.device.type == "meta":
                value = model.initial_weight(names[param], param.shape) if draw else torch.empty(param.shape)
                setattr(owner, key, nn.Parameter(value.to(device)))
    model.tie_weights()


def _wrap_ddp(model: nn.Module, context: DistributedContext) -> DistributedDataParallel:
    return DistributedDataParallel(
        model,
        process_group=context.group(REPLICATE),
        device_ids=[context.device] if context.device.type == "cuda" else None,
        gradient_as_bucket_view=True,  # no second copy of the gradients; DeterministicGradReduction relies on it
        init_sync=False,  # weights are equal by construction, and replicas.check_replicas proves it
    )
