"""Measure the memory of a real step, and estimate it as `tinytrain plan` does.

Must not know what is asserted. On a CPU, the C library counts all bytes that any thread of the process holds, also
those of gloo and numpy. The count is read after every operation. torch's profiler cannot be used: it misses what
gloo's threads free, so its sum grows with each step. On a GPU, max_memory_allocated is read.
"""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

STEPS = 3  # DDP allocates its buckets again in the second step

# large matrices and few tokens, so that the update needs most memory
MUON: dict[str, Any] = {
    "optimizer": "muon",
    "num_layers": 2,
    "d_model": 384,
    "vocab_size": 64,
    "context_len": 4,
    "batch_size": 2,
}
# name -> ranks, settings; on top of MODEL
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "none": (1, {"parallel": "none"}),
    "ddp 2": (2, {"parallel": "ddp"}),
    "ddp 2, vocabulary 8192": (2, {"parallel": "ddp", "vocab_size": 8192}),
    "ddp 2, loss in chunks": (2, {"parallel": "ddp", "vocab_size": 8192, "loss_chunk_tokens": 64}),
    "ddp 2, accumulation": (2, {"parallel": "ddp", "micro_batch_size": 2}),
    "ddp 2, checkpointing": (2, {"parallel": "ddp", "activation_checkpointing": "block"}),
    "ddp 2, offload": (2, {"parallel": "ddp", "activation_checkpointing": "block", "activation_offload": True}),
    "fsdp 2, cp 2": (2, {"parallel": "fsdp", "cp": 2}),
    "ddp 2, reproducible": (2, {"parallel": "ddp", "reproducible": True, "micro_batch_size": 2}),
    "ddp 2, documents": (
        2,
        {"parallel": "ddp", "document_mask": True, "context_len": 512, "num_layers": 2, "d_model": 32},
    ),
    "fsdp 2": (2, {"parallel": "fsdp"}),
    "fsdp 2, checkpointing": (2, {"parallel": "fsdp", "activation_checkpointing": "block"}),
    "fsdp 2, selective, bf16": (2, {"parallel": "fsdp", "activation_checkpointing": "selective", "precision": "bf16"}),
    "fsdp 4, vocabulary 8192": (4, {"parallel": "fsdp", "vocab_size": 8192}),
    "hsdp 2 x 2, accumulation": (4, {"parallel": "hsdp", "dp_replicate": 2, "dp_shard": 2, "micro_batch_size": 2}),
    "ddp 2, muon": (2, {"parallel": "ddp", **MUON}),
    "fsdp 2, muon": (2, {"parallel": "fsdp", **MUON}),
}
MODEL: dict[str, Any] = {
    "num_layers": 6,
    "d_model": 128,
    "num_heads": 4,
    "vocab_size": 1024,
    "context_len": 64,
    "batch_size": 16,
    "device": "cpu",
}


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd u f uordblks fordblks k".split()]


def allocated_bytes() -> int:
    """Return the bytes that this process holds from malloc, in arenas and in separate mappings. Needs glibc 2.33."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


class _Watch(TorchDispatchMode):
    peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, allocated_bytes())
        return out


def measure(settings: dict[str, Any], context: Any = None) -> tuple[int, int, str]:
    """On a rank: return the measured and the estimated peak bytes of a step, and when the estimate has its peak.

    context: of this rank, if it has joined the others already.
    """
    from tinytrain_dist.config.schema import TrainingConfig
    from tinytrain_dist.distributed.context import init_distributed
    from tinytrain_dist.distributed.parallel_dims import choose_parallel_dims
    from tinytrain_dist.training.memory_estimate import estimate_memory
    from tinytrain_dist.training.train_step import build_train_step

    config, context = TrainingConfig(**settings), context or init_distributed(settings["device"])
    context = context.with_mesh(choose_parallel_dims(config, context.world_size, context.local_world_size))
    predicted = estimate_memory(config, context)
    _steps(build_train_step(config, context), 1)  # what libraries allocate once and keep does not belong to the step
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        _steps(build_train_step(config, context), STEPS)
        return torch.cuda.max_memory_allocated() - base, predicted.nbytes, predicted.peak
    base = allocated_bytes()
    with _Watch() as watch:
        _steps(build_train_step(config, context), STEPS)
    return watch.peak - base, predicted.nbytes, predicted.peak


def _steps(train_step: Any, count: int) -> None:
    from tinytrain_dist.training.memory_estimate import EmptyBatches, empty_windows

    share = train_step.share(0)
    batches = EmptyBatches(empty_windows(train_step.config, len(share.slots)).take_columns(share.columns))
    for step in range(count):
        train_step.run(step, batches).vote.result()
