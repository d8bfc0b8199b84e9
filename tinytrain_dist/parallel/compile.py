"""Apply torch.compile, and decide whether a run uses it.

A run uses it if the run is long enough for compiling to pay off, and if the compiler works on every rank.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.sections import BF16_PRECISIONS
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.distributed.torch_internals import (
    assume_vector_instructions,
    check_vector_instructions,
    compiler_keeps_bf16_rounding,
    keep_graphs_whole_under_ddp,
)
from tinytrain_dist.distributed.torch_internals import compiled_graph_count as compiled_graph_count
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model.matmul import CPU_LACKS_BF16

# Compiling pays off in runs of at least so many floating-point operations: about five minutes on two CPU cores, or on
# one large GPU. Compiling takes 10 to 60 s and saves a fifth to a third of the time of a step.
MIN_CPU_FLOPS = 3e13
MIN_GPU_FLOPS = 1e17


def apply_compile(model: Any, *, on_cuda: bool = False) -> None:
    """Compile a TransformerLM in place: each Transformer block, and the loss of one chunk of tokens.

    Each block is compiled by itself. All blocks have the same code, so the compiler runs only once for all of them.
    Under DDP, blocks are not split at DDP's buckets, because splitting them makes a step 4 % slower. A block is one
    graph: code that would split it is an error, and not silently slower.

    on_cuda: also compile the last norm. On a CPU this would change bits, and gains nothing.
    """
    keep_graphs_whole_under_ddp()
    model.lm_head.loss_piece = torch.compile(model.lm_head.loss_piece, dynamic=False, fullgraph=True)
    for block in model.model.layers:
        block.compile(dynamic=False, fullgraph=True)
    if on_cuda:
        model.model.norm.compile(dynamic=False, fullgraph=True)


def compile_pays_off(config: TrainingConfig, device: torch.device) -> bool:
    """Return whether the run is long enough for torch.compile.

    Depends only on the configuration and the kind of device, so that all machines make the same choice.
    """
    weights = config.model.approximate_parameter_count
    flops = 6.0 * weights * config.batch_sizes.before(config.total_steps) * config.context_len
    return flops >= (MIN_GPU_FLOPS if device.type == "cuda" else MIN_CPU_FLOPS)


def why_not_compile(device: torch.device, exact_bf16: bool = False) -> str:
    """Return "" if torch.compile works on this device, else the reason. It needs a C++ compiler, or Triton on a GPU.

    `exact_bf16`: whether bf16 results must have the same bits on any mesh. A CPU without bf16 units computes bf16
    products in float32, so the compiler must not remove the rounding of weights to bf16 before a product.
    """
    if exact_bf16 and device.type == "cpu" and CPU_LACKS_BF16 and not compiler_keeps_bf16_rounding():
        return f"torch {torch.__version__} removes roundings to bf16, which changes bits; 2.13 and newer do not"
    assumed = device.type == "cpu" and assume_vector_instructions()
    reason = _try_compiler(device)
    if reason and assumed:  # perhaps only because the C++ compiler is older than the processor
        check_vector_instructions()
        reason = _try_compiler(device)
    return reason


def _try_compiler(device: torch.device) -> str:
    """Compile a small function and call it; return "" or what went wrong."""
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:
        first_line = (str(error).strip().splitlines() or [""])[0]
        return f"{type(error).__name__}: {first_line[:200]}"
    return ""


def resolve_compile(config: TrainingConfig, context: DistributedContext) -> tuple[TrainingConfig, str]:
    """Decide `compile` for all ranks; return the configuration, and a line for the log. A collective.

    Errors: ConfigError if torch.compile does not work on some rank although compile = true, reproducible = true, or a
    kernel needs it.
    """
    wanted = compile_pays_off(config, context.device) if config.compile is None else config.compile
    compiles_kernel = config.document_mask and context.device.type == "cuda"
    if not wanted and not compiles_kernel:
        return replace(config, compile=False), ""
    own_reason = why_not_compile(context.device, config.reproducible and config.precision in BF16_PRECISIONS)
    failures = [(host, reason) for host, reason in context.all_gather_object((context.host, own_reason)) if reason]
    if not failures:
        return replace(config, compile=wanted), "torch.compile is on; the first step takes longer" if wanted else ""
    host, reason = failures[0]
    text = f"torch.compile does not work on {host} ({reason})"
    if compiles_kernel:
        raise ConfigError(f"document_mask: {text}, but its kernel needs it; install Triton there")
    if config.compile or config.reproducible:
        raise ConfigError(f"compile: {text}; install a C++ compiler (GPU: Triton) there, or set compile = false")
    return replace(config, compile=False), f"{text}; continuing without it, which is slower"
