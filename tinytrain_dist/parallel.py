"""Owns how a finished model is spread over ranks: checkpointing, then compile, then DDP / FSDP2 / HSDP, in that order.

Must not know the optimizer or the loop. The order is said once, in `build_model`: recomputation wraps what is compiled,
and sharding comes last, so that its hooks see whole blocks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo.utils
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tinytrain_dist import distributed
from tinytrain_dist.config import TrainingConfig
from tinytrain_dist.distributed import REPLICATE, SHARD, DistributedContext
from tinytrain_dist.environment import compile_pays, why_not_compile
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model import TransformerLM
from tinytrain_dist.reduction import shard_rows

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def settle_compile(config: TrainingConfig, context: DistributedContext) -> tuple[TrainingConfig, str]:
    """The configuration with `compile` decided, the same on every rank, and a line that says so. A collective.

    Errors: ConfigError where compile = true, or bits are promised that need it, and it does not work on some rank.
    """
    wanted = compile_pays(config, context.device) if config.compile is None else config.compile
    if not wanted:
        return replace(config, compile=False), ""
    reason = why_not_compile(context.device, config.reproducible and config.precision == "bf16")
    found = [(host, reason) for host, reason in context.gather_objects((context.host, reason)) if reason]
    if not found:
        return replace(config, compile=True), "torch.compile is on; the first step takes longer"
    text = f"torch.compile does not work on {found[0][0]} ({found[0][1]})"
    if config.compile or config.reproducible:
        raise ConfigError(f"compile: {text}; install a C++ compiler (GPU: Triton) there, or set compile = false")
    return replace(config, compile=False), f"{text}; going on without it, slower"


def compiled_graphs() -> int:
    """How many graphs torch.compile has made in this process; a step that makes one has waited for it."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def build_model(config: TrainingConfig, context: DistributedContext, *, draw: bool = True) -> nn.Module:
    """A TransformerLM with its initial weights, wrapped for the context's layout.

    No rank ever holds more than its shards and one unit (a block, or the embedding): the model is described on the
    meta device, and each unit gets its weights, the same on any layout, just before it is sharded. draw=False leaves
    their values open, for a rehearsal.
    """
    assert context.layout is not None, "with_layout comes first"
    with torch.device("meta"):
        model = TransformerLM(config)
    blocks: list[nn.Module] = list(model.model.layers)
    if config.compile:
        torch._dynamo.config.optimize_ddp = False  # would cut blocks in two, which costs 4 % of a step
        model.lm_head.loss_piece = torch.compile(model.lm_head.loss_piece, dynamic=False)
    for block in blocks:
        checkpoint_activations(block, config.activation_checkpointing)
        if config.compile:
            block.compile()
    if context.layout.mode in ("none", "ddp"):
        _materialize(model, model, context.device, draw)
        # alone, the wrapper would only cost: nothing is to be summed
        return _wrap_ddp(model, context) if context.layout.replicate > 1 else model
    embed: Any = model.model.embed_tokens
    head = model.lm_head
    outer: list[list[nn.Module]] = [[embed, head]] if config.tie_embeddings else [[embed], [head]]
    units: list[list[nn.Module]] = [*outer, *([block] for block in blocks), [model]]
    mesh = context.mesh
    assert mesh is not None
    # canonical sums treat replicas themselves (see reduction.py), so there FSDP sees one replica only
    mesh = mesh[SHARD] if context.layout.mode == "fsdp" or config.reproducible else mesh
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
    if distributed.over_gloo():
        _gather_ahead([model, embed, *blocks, head])
    return model


def _gather_ahead(units: list[Any]) -> None:
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
        gradient_as_bucket_view=True,  # no second copy of the gradients; CanonicalReduction counts on it
        init_sync=False,  # weights are equal by construction, and replicas.check_replicas proves it
    )


def checkpoint_activations(block: nn.Module, how: str) -> None:
    """Let `block` recompute in backward: everything (block), or all but matrix products (selective).

    The method is replaced and no module is put around it, so that parameter names stay as they are.
    """
    if how == "none":
        return
    kwargs: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        kwargs["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    plain: Callable[..., Tensor] = block.forward

    def forward(*args: Any) -> Any:
        return checkpoint(plain, *args, **kwargs)

    block.forward = forward


def _keep_products(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
    }
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def apply_ddp(model: nn.Module, mesh: DeviceMesh | None = None) -> DistributedDataParallel:
    """Wrap any module for DDP over `mesh` (1-D; None: all ranks). Gradients are averaged, as DDP does it.

    Rank 0's weights are given to all. Errors: ValueError for a mesh with several axes.
    """
    if mesh is not None and mesh.ndim != 1:
        raise ValueError(f"apply_ddp: needs a mesh with one axis, got {mesh.ndim} axes; pass mesh['dp_replicate']")
    return DistributedDataParallel(
        model, process_group=mesh.get_group() if mesh is not None else None, gradient_as_bucket_view=True
    )


def apply_fsdp(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Shard any module with FSDP2 over `mesh`: 1-D shards, 2-D replicates over axis 0 and shards over axis 1 (HSDP).

    Every element of the outermost ModuleLists becomes a unit, the rest is one more; without a ModuleList the model is a
    single unit. Weights are first made equal to rank 0's, which FSDP2 by itself does not do; they and their gradients
    stay float32, `param_dtype` is what forward and backward compute in. Gradients are averaged, as FSDP does it.
    Errors: ValueError for a mesh of more than two axes or parameters that are not float32.
    """
    if mesh.ndim > 2:
        raise ValueError(f"apply_fsdp: needs a mesh with one or two axes, got {mesh.ndim}")
    odd = [name for name, param in model.named_parameters() if param.dtype != torch.float32]
    if odd:
        raise ValueError(f"apply_fsdp: master weights must be float32, but {odd[0]} is not; call model.float() first")
    model.to(mesh.device_type)
    distributed.broadcast_tensors([tensor.data for tensor in (*model.parameters(), *model.buffers())])
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    if param_dtype is not None:
        # FSDP casts parameters, but not buffers: one float32 mask or rotary table would meet bf16 weights in a product
        plain = model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(mesh.device_type, dtype=param_dtype):
                return plain(*args, **kwargs)

        model.forward = forward
    for unit in [*_outermost_blocks(model), model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    return model


def _outermost_blocks(module: nn.Module) -> list[nn.Module]:
    blocks: list[nn.Module] = []
    for child in module.children():
        blocks += list(child) if isinstance(child, nn.ModuleList) else _outermost_blocks(child)
    return blocks


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP or torch.compile; the only place that knows how to get there."""
    while isinstance(model, DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod  # type: ignore[assignment]
    return model


def units_without_waiting(model: nn.Module) -> list[nn.Module]:
    """Modules in whose forward a rank meets no other: sharded blocks, which are whole by then, or all of the model."""
    inner = unwrap(model)
    return _outermost_blocks(inner) if isinstance(inner, FSDPModule) else [inner]


def original_name(name: str) -> str:
    """A parameter's name without the prefixes that wrappers put in front of any part of it."""
    for prefix in WRAPPER_PREFIXES:
        name = name.removeprefix(prefix).replace("." + prefix, ".")
    return name


def gather_full_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer whole, on the CPU, under its original name. A collective: every rank calls it.

    Every rank receives the whole model; to save a model that does not fit in one memory use save_checkpoint.
    """
    state = unwrap(model).state_dict()
    return {
        original_name(name): (t.full_tensor() if isinstance(t, DTensor) else t).detach().cpu().clone()
        for name, t in state.items()
    }


def shard_range(tensor: Tensor) -> tuple[int, int]:
    """First and last + 1 row of a parameter that lie on this rank."""
    if not isinstance(tensor, DTensor) or not tensor.ndim:
        return 0, tensor.shape[0] if tensor.ndim else 1
    return shard_rows(tensor.shape[0], *_place_in(tensor.device_mesh))


@functools.cache  # a mesh takes 0.1 ms to say it, which counts for hundreds of tensors
def _place_in(mesh: DeviceMesh) -> tuple[int, int]:
    """How many shards there are, and which this rank has: FSDP shards over the last axis."""
    return mesh.size(mesh.ndim - 1), mesh.get_local_rank(mesh.ndim - 1)
