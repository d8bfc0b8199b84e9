"""Choose the settings whose default depends on the device: `precision` and `micro_batch_size`.

Must not know how a step is computed. After `resolve_device_defaults`, `precision` has no value "auto" any more.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from tinytrain_dist.config.schema import TrainingConfig
from tinytrain_dist.config.sections import BF16_PRECISIONS
from tinytrain_dist.distributed.context import DistributedContext
from tinytrain_dist.errors import ConfigError
from tinytrain_dist.model import fp8

# A GPU of this compute capability has units for bf16 and TF32. An older one emulates bf16, slower than float32.
MIN_CAPABILITY = (8, 0)


def set_device_defaults(config: TrainingConfig, *, on_gpu: bool, in_bf16: bool) -> TrainingConfig:
    """Return the configuration with the defaults for one kind of device.

    on_gpu: whether the device is a GPU, whose memory may be too small for a whole batch. in_bf16: what precision =
    auto means there.
    """
    if config.precision == "auto":
        config = replace(config, precision="bf16" if in_bf16 else "fp32")
    if on_gpu and config.micro_batch_size is None:
        config = replace(config, micro_batch_size="auto")
    return config


def resolve_device_defaults(config: TrainingConfig, context: DistributedContext) -> tuple[TrainingConfig, str]:
    """Choose `precision` and `micro_batch_size` for all ranks; return them, and a line for the log. A collective.

    Errors: ConfigError if precision is bf16 or fp8, and the GPU of some rank has no units for it.
    """
    on_gpu = context.device.type == "cuda"
    if not on_gpu:
        return set_device_defaults(config, on_gpu=False, in_bf16=False), ""
    in_fp8 = config.precision == "fp8"
    needed = fp8.MIN_CAPABILITY if in_fp8 else MIN_CAPABILITY
    has_units = torch.cuda.get_device_capability(context.device) >= needed
    own_name = "" if has_units else torch.cuda.get_device_name(context.device)
    older_gpus = [(rank, *found) for rank, found in enumerate(context.all_gather_object((context.host, own_name)))]
    older_gpus = [(rank, host, name) for rank, host, name in older_gpus if name]
    if older_gpus and config.precision in BF16_PRECISIONS:
        rank, host, name = older_gpus[0]
        newer = "RTX 40, L4, H100 and newer" if in_fp8 else "A100 and newer"
        instead = "bf16 or auto" if in_fp8 else "fp32 or auto"
        raise ConfigError(
            f"precision: {config.precision} needs GPUs of compute capability {needed[0]}.{needed[1]} or higher "
            f"({newer}), but rank {rank} ({host}) has {name}; set precision = {instead}"
        )
    resolved = set_device_defaults(config, on_gpu=True, in_bf16=not older_gpus)
    return resolved, _precision_note(config, resolved, bool(older_gpus))


def _precision_note(config: TrainingConfig, resolved: TrainingConfig, older_gpus: bool) -> str:
    """Return the line for the log of a run on GPUs: the chosen precision, and how float32 products are computed."""
    note = f"precision = {config.precision}"
    if config.precision == "auto":
        note += f": {resolved.precision}"
    if resolved.precision == "fp32" and not older_gpus:
        how = "float32, because reproducible = true" if config.reproducible else "TF32"
        note += f"; matrix products are computed in {how}"
    return note
