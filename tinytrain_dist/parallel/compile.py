"""Decide whether torch.compile is used: whether the run is long enough to pay for it, and whether it works here."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch._dynamo.utils

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model.matmul import CPU_LACKS_BF16


def compile_pays_off(config: TrainingConfig, device: torch.device) -> bool:
    """Whether the run is long enough for torch.compile; from the configuration and the kind of device alone.

    So two machines never differ. Compiling takes 10 to 60 s and saves a fifth to a third of the time of a step; the
    bounds are runs of about five minutes on two CPU cores, or on one large GPU.
    """
    weights = config.model.approximate_parameter_count
    flops = 6.0 * weights * config.total_steps * config.batch_size * config.context_len
    return flops >= (1e17 if device.type == "cuda" else 3e13)


def why_not_compile(device: torch.device, exact_bf16: bool = False) -> str:
    """Empty if torch.compile works on this device here, else what it says: it needs a C++ compiler or Triton.

    exact_bf16: a layout must not decide bits. Where bf16 products are computed in float32, only torch 2.13 can be kept
    from leaving out the rounding of weights before them (joint_graph.py, pointless_convert).
    """
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if exact_bf16 and device.type == "cpu" and CPU_LACKS_BF16 and version < (2, 13):
        return f"torch {torch.__version__} leaves out roundings to bf16 that decide bits; 2.13 does not"
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=device))
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    return ""


def resolve_compile(config: TrainingConfig, context: DistributedContext) -> tuple[TrainingConfig, str]:
    """Decide `compile` for all ranks; return the configuration, and a line for the log. A collective.

    Errors: ConfigError where compile = true, or bits are promised that need it, and it does not work on some rank.
    """
    wanted = compile_pays_off(config, context.device) if config.compile is None else config.compile
    if not wanted:
        return replace(config, compile=False), ""
    reason = why_not_compile(context.device, config.reproducible and config.precision == "bf16")
    found = [(host, reason) for host, reason in context.all_gather_object((context.host, reason)) if reason]
    if not found:
        return replace(config, compile=True), "torch.compile is on; the first step takes longer"
    text = f"torch.compile does not work on {found[0][0]} ({found[0][1]})"
    if config.compile or config.reproducible:
        raise ConfigError(f"compile: {text}; install a C++ compiler (GPU: Triton) there, or set compile = false")
    return replace(config, compile=False), f"{text}; continuing without it, slower"


def compiled_graph_count() -> int:
    """How many graphs torch.compile has made in this process; a step that makes one has waited for it."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
